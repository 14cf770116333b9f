"""Proof on the first batch that a record's gradient stays when another record leaves the batch or changes.

What `proofs.check_forward` shows of outputs, for what the backward does besides: an autograd function, or a hook on a value
inside, that scales gradients by something of the batch leaves every output as it is, stays linear, and mixes no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from ghostgrad.errors import PrivacyError
from ghostgrad.layers import Rows
from ghostgrad.recording.draws import without_draws
from ghostgrad.recording.losses import watch
from ghostgrad.recording.modules import Modules
from ghostgrad.recording.proofs import DOES_NOT_RUN, mask_records
from ghostgrad.recording.rows import some_of, with_first_replaced
from ghostgrad.tree import map_tensors, tensors

_SAME_SIZE = {torch.float64: 1e-7, torch.float32: 1e-3}
_OTHER_SIZE = {torch.float64: 1e-6, torch.float32: 2e-2}
_HALF = 5e-2, 0.5
"""How far a weight's gradient may move, relative to it: batches of other sizes round differently, and add up less."""

_SMALL = {torch.float64: 1e-9, torch.float32: 1e-4}
_SMALL_HALF = 1e-2
"""What is nothing beside the gradient of the whole model."""

_ROUND_OFF = 16
"""In units of the precision and of the output gradients: all there is of weights whose gradients cancel."""


class _Gradients(NamedTuple):
    """By name of the weight, and how large those of the outputs were."""

    of: dict[str, Tensor]
    outputs: float
    shapes: list[torch.Size | None]
    """Of the outputs; None for one without records."""


def check_backward(modules: Modules, args: Any, kwargs: Any, n: int, *, other_sizes: bool) -> None:
    """Put another record in the place of one, and leave half of them out: the gradient of the others must stay.

    By plain autograd, on copies, without dropout. ``other_sizes`` is whether the model draws the same for the records of a
    smaller batch, so that halves can be compared.

    Raises:
        PrivacyError: when it does not stay.
    """
    batch, everyone = (args, kwargs), range(n)
    pairs = [(with_first_replaced(batch, n, batch_first=modules.batch_first), everyone, range(1, n))]
    if other_sizes:
        halves = range(n // 2, n), range(n - n // 2)
        pairs += [(some_of(batch, n, half, batch_first=modules.batch_first), half, half) for half in halves]
    for other, records, kept in pairs:
        before = _gradients(modules, batch, n, everyone, kept)
        after = None if before is None else _gradients(modules, other, n, records, kept, like=before.shapes)
        if before is not None and after is not None:
            _compare(type(modules.root).__name__, before, after, same_size=len(records) == n)


def _gradients(
    modules: Modules, batch: Any, n: int, records: range, kept: range, like: Sequence[torch.Size | None] | None = None
) -> _Gradients | None:
    """Of the records ``kept``, added up, in a batch of ``records`` out of ``n``; ``like`` has the shapes in a batch of all.

    None where the model does not run on it, or puts out something that does not grow with the batch.
    """
    root, m = modules.root, len(records)
    buffers = {name: buffer.clone() for name, buffer in root.named_buffers()}
    args, kwargs = map_tensors(lambda t: t.detach().clone(), batch)
    rows = Rows(m, modules.batch_first, type(root).__name__)
    with without_draws(root), torch.enable_grad():
        try:
            found = [t for t in tensors(functional_call(root, buffers, args, kwargs)) if t.is_floating_point()]
            shapes = [out.shape if out.requires_grad and rows.dim(out) is not None else None for out in found]
            if like is not None:
                shapes = [shape if known else None for shape, known in zip(shapes, like, strict=True)]
                if not _grew(like, shapes, n, m):
                    return None
            outs = [out for out, shape in zip(found, shapes, strict=True) if shape]
            grads = [_direction(out, rows, n, records) for out in outs]
            if outs:
                mask = torch.tensor([record in kept for record in records])
                watch.original(outs, mask_records(grads, rows, mask))
        except DOES_NOT_RUN:
            modules.take_gradients()
            return None
        by_name = modules.take_gradients()
    for path, part in root.named_modules():
        if getattr(part, "scale_grad_by_freq", False):  # by how often the batch has an id; in its rule, the record
            by_name.pop(f"{path}.weight" if path else "weight", None)
    size = float(sum(grad.double().square().sum() for grad in grads)) ** 0.5
    return _Gradients({name: grad.to_dense() for name, grad in by_name.items()}, size, shapes)


def _grew(whole: Sequence[torch.Size | None], part: Sequence[torch.Size | None], n: int, m: int) -> bool:
    """Whether each output has as many rows of each record as in the batch of all."""
    return all(
        one is None or (other is not None and one.numel() * m == other.numel() * n)
        for one, other in zip(whole, part, strict=True)
    )


def _direction(out: Tensor, rows: Rows, n: int, records: range) -> Tensor:
    """A gradient for an output; each record has the same in every batch."""
    dim = rows.dim(out) or 0
    fold = out.shape[dim] // rows.n
    shape = list(out.shape)
    shape[dim] = fold * n
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return whole.narrow(dim, records.start * fold, len(records) * fold).to(out)


def _compare(root: str, before: _Gradients, after: _Gradients, *, same_size: bool) -> None:
    whole = float(sum(grad.double().square().sum() for grad in before.of.values() if grad.isfinite().all())) ** 0.5
    for name in before.of.keys() & after.of.keys():
        one, other, kind = before.of[name].double(), after.of[name].double(), before.of[name].dtype
        tolerance = (_SAME_SIZE if same_size else _OTHER_SIZE).get(kind, _HALF[not same_size])
        gap, size = float((one - other).norm()), max(float(one.norm()), float(other.norm()))
        nothing = max(_SMALL.get(kind, _SMALL_HALF) * whole, _ROUND_OFF * torch.finfo(kind).eps * before.outputs)
        if gap > tolerance * size and gap > nothing:  # False where one is not finite
            raise PrivacyError(
                f"{root}: the gradient of {name} for a record changes when another record leaves the batch or changes, though "
                f"the outputs stay: an autograd function or a hook inside the model scales gradients by something of the batch "
                f"(its statistics, its size), so each record rescales the others. Scale by something of the record, or by a "
                f"constant."
            )
