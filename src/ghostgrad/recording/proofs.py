"""Proofs on the user's own model and first batch that a record's row is a record: nothing of it reaches another row."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ghostgrad.errors import PrivacyError
from ghostgrad.layers import Call, Rows, Rule
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


def check_call(rule: Rule, call: Call, keep: Tensor) -> bool:
    """At a probe, while only the records in ``keep`` have an output gradient: the other rows must have none.

    Returns:
        Whether the kept records had a gradient here: zeros everywhere show nothing.

    Raises:
        PrivacyError: when they do. Rows that are not finite are passed over: 0 * inf is not a leak.
    """
    rows = rule.rows(call.module, call.rows)
    call = replace(call, rows=rows)
    shown = False
    for index, grad in enumerate(call.grad_outputs):
        if grad is None:
            continue
        led = rule.led(call, grad, index)
        by_record = led.reshape(rows.n, -1, *led.shape[1:])
        shown = shown or bool(by_record[keep.to(grad.device)].count_nonzero())
        others = by_record[~keep.to(grad.device)]
        if bool((others[others.isfinite()] != 0).any()):
            raise PrivacyError(
                f"{rows.path}: the gradient of one record reaches the rows of others, so clipping rows does not bound a "
                f"record. Either the model mixes records (batch statistics, centring over the batch, in-batch negatives) or "
                f"the rows of this layer are not ordered by record. Use a model that treats records one by one "
                f"(GroupNorm for BatchNorm; ModuleValidator.fix does that), and fold with the record as the slowest index."
            )
    return shown


def check_forward(root: nn.Module, args: Any, kwargs: Any, n: int, *, batch_first: bool) -> None:
    """Leave one record out of the forward: the outputs of the others must stay, and so must what is written to buffers.

    Finds what gradients cannot see: detached batch statistics, expert capacity, statistics of the model's own input, sums
    of records kept in a buffer. Runs the model on copies, in training mode (without dropout) and in eval mode; its buffers
    and the random state stay untouched. A mode in which it draws random numbers cannot be compared and is passed over.

    Raises:
        PrivacyError: when an output of a record, or a buffer, depends on another record.
    """
    rows = Rows(n, batch_first, type(root).__name__)
    batch = (args, kwargs)
    rest = without_first(batch, n, batch_first=batch_first)
    for training in (True, False):
        with torch.no_grad(), torch.random.fork_rng(), _mode(root, training=training), NoDraws():
            try:
                whole, again = _forward(root, batch, seed=0), _forward(root, batch, seed=1)
                if any(
                    not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(whole[0], again[0], strict=True)
                ):
                    continue
                without = _forward(root, rest, seed=0)
            except (RuntimeError, ValueError, AssertionError, IndexError):
                continue  # the model does not run on fewer records; the gradient proof still holds it to its rows
        for before, after in zip(whole[0], without[0], strict=True):
            _compare(rows, before, after)
        _compare_buffers(rows.path, whole[1], without[1])


@contextmanager
def no_gradients() -> Iterator[None]:
    """For a forward that wants none, without the warning of re-entrant checkpointing that it misses them."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        yield


def _forward(root: nn.Module, batch: Any, *, seed: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Floating-point outputs, and the buffers as the forward left them."""
    torch.manual_seed(seed)
    args, kwargs = map_tensors(lambda t: t.detach().clone(), batch)
    buffers = {name: buffer.clone() for name, buffer in root.named_buffers()}
    with no_gradients():
        outputs = tensors(functional_call(root, buffers, args, kwargs))
    return [t for t in outputs if t.is_floating_point()], buffers


def _compare(rows: Rows, before: Tensor, after: Tensor) -> None:
    dim = rows.dim(before)
    if dim is None:
        return
    fold = before.shape[dim] // rows.n
    before = before.narrow(dim, fold, before.shape[dim] - fold)
    if before.shape != after.shape or not _close(before, after):
        raise PrivacyError(
            f"{rows.path}: the output for a record changes when another record leaves the batch, so a record's influence is "
            f"not bounded by clipping its own gradient. Remove what depends on the whole batch (statistics over the batch, "
            f"capacity limits, in-batch comparisons), or compute it within each record."
        )


def _compare_buffers(path: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for name, value in before.items():
        if value.shape != after[name].shape or (value.is_floating_point() and not _close(value, after[name])):
            raise PrivacyError(
                f"{path}: the forward writes something of the records into the buffer {name!r}, which is saved with the "
                f"model without any noise. Do not keep statistics of the data in the model, or freeze them (eval mode)."
            )


def _close(before: Tensor, after: Tensor) -> bool:
    finite = before.isfinite() & after.isfinite()
    if not bool(finite.any()):
        return True
    gap = (before - after)[finite].abs().max()
    return bool(gap <= _TOLERANCE.get(before.dtype, 1e-3) * before[finite].abs().max())


class NoDraws(TorchFunctionMode):
    """Leaves dropout out wherever it is called, so that the rest of a forward can be compared."""

    _DROPOUTS = frozenset(
        {
            torch.dropout, torch.feature_dropout, torch.alpha_dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d,
            F.alpha_dropout, F.feature_alpha_dropout,
        }
    )  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@contextmanager
def shaken(root: nn.Module) -> Iterator[None]:
    """Moves every parameter a little inside: with a zero-initialised head nothing would show that records meet."""
    generator = torch.Generator().manual_seed(0)
    before = [(p, p.detach().clone()) for p in root.parameters() if p.is_floating_point()]
    try:
        for p, value in before:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
            p.data.add_(noise, alpha=0.02 + 0.1 * float(value.abs().mean()) if p.numel() else 0.0)
        yield
    finally:
        for p, value in before:
            p.data.copy_(value)


@contextmanager
def _mode(root: nn.Module, *, training: bool) -> Iterator[None]:
    """Everything in eval mode, or, for ``training``, only dropout."""
    switched = [
        module
        for module in root.modules()
        if module.training and (not training or isinstance(module, nn.modules.dropout._DropoutNd))
    ]
    try:
        for module in switched:
            module.training = False
        yield
    finally:
        for module in switched:
            module.training = True
