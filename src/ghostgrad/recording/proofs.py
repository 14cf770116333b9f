"""Proofs on the user's own model and first batch that a record's row is a record: nothing of it reaches another row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ghostgrad.errors import PrivacyError
from ghostgrad.layers import Rows
from ghostgrad.recording.rows import without_first
from ghostgrad.tree import map_tensors, tensors

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far an output may move, relative to the largest, when another record leaves the batch (matrix products of other
sizes round differently)."""


def random_halves(n: int) -> tuple[Tensor, Tensor]:
    """Two complementary masks [n], neither empty, without a pattern that a layout could share."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    first = torch.zeros(n, dtype=torch.bool)
    first[order[: n // 2]] = True
    return first, ~first


def mask_records(grads: Sequence[Tensor | None], rows: Rows, keep: Tensor) -> list[Tensor | None]:
    """Output gradients with the records outside ``keep`` [n] set to zero."""

    def mask(grad: Tensor) -> Tensor:
        dim = rows.dim(grad) or 0
        whose = keep.to(grad.device).repeat_interleave(grad.shape[dim] // rows.n)
        shape = [1] * grad.dim()
        shape[dim] = -1
        return torch.where(whose.view(shape), grad, torch.zeros((), dtype=grad.dtype, device=grad.device))

    return [None if grad is None else mask(grad) for grad in grads]


def check_rows(grads: Sequence[Tensor | None], rows: Rows, keep: Tensor) -> None:
    """At a probe, while only the records in ``keep`` have an output gradient: the other rows must have none.

    Raises:
        PrivacyError: when they do. Rows that are not finite are passed over: 0 * inf is not a leak.
    """
    for grad in grads:
        if grad is None:
            continue
        others = rows.split(grad)[~keep.to(grad.device)]
        if bool((others[others.isfinite()] != 0).any()):
            raise PrivacyError(
                f"{rows.path}: the gradient of one record reaches the rows of others, so clipping rows does not bound a "
                f"record. Either the model mixes records (batch statistics, centring over the batch, in-batch negatives) or "
                f"the rows of this layer are not ordered by record. Use a model that treats records one by one "
                f"(GroupNorm for BatchNorm; ModuleValidator.fix does that), and fold with the record as the slowest index."
            )


def check_forward(root: nn.Module, args: Any, kwargs: Any, n: int, *, batch_first: bool) -> None:
    """Leave one record out of the forward: the outputs of the others must stay.

    Finds what gradients cannot see: detached batch statistics, expert capacity, statistics of the model's own input.
    Runs the model in eval mode on copies, without touching its buffers or the random state. Models that draw random
    numbers in eval mode too cannot be compared and are passed over.

    Raises:
        PrivacyError: when an output of a record depends on another record.
    """

    def run(batch: Any, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        call_args, call_kwargs = map_tensors(lambda t: t.detach().clone(), batch)
        buffers = {name: buffer.clone() for name, buffer in root.named_buffers()}
        return [t for t in tensors(functional_call(root, buffers, call_args, call_kwargs)) if t.is_floating_point()]

    with torch.no_grad(), torch.random.fork_rng(), _eval_mode(root):
        try:
            whole, again = run((args, kwargs), 0), run((args, kwargs), 1)
            if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(whole, again, strict=True)):
                return
            rest = run(without_first((args, kwargs), n, batch_first=batch_first), 0)
        except (RuntimeError, ValueError, AssertionError, IndexError):
            return  # the model does not run on fewer records; the gradient proof still holds it to its rows
    rows = Rows(n, batch_first, type(root).__name__)
    for before, after in zip(whole, rest, strict=True):
        _compare(rows, before, after)


def _compare(rows: Rows, before: Tensor, after: Tensor) -> None:
    dim = rows.dim(before)
    if dim is None:
        return
    fold = before.shape[dim] // rows.n
    before = before.narrow(dim, fold, before.shape[dim] - fold)
    finite = before.isfinite() & after.isfinite() if before.shape == after.shape else torch.zeros(1, dtype=torch.bool)
    gap = (before - after)[finite].abs().max() if finite.any() else torch.zeros(())
    if before.shape != after.shape or bool(gap > _TOLERANCE.get(before.dtype, 1e-3) * before[finite].abs().max()):
        raise PrivacyError(
            f"{rows.path}: the output for a record changes when another record leaves the batch, so a record's influence is "
            f"not bounded by clipping its own gradient. Remove what depends on the whole batch (statistics over the batch, "
            f"capacity limits, in-batch comparisons), or compute it within each record."
        )


@contextmanager
def _eval_mode(root: nn.Module) -> Iterator[None]:
    training = [module for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
