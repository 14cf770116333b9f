"""For rules that run a layer again: its own batch dimension, its own precision, and the check that it is the same run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.gradients import wide
from ghostgrad.layers.call import Call

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far a recomputed output may be from the first one, relative to the largest."""


@contextmanager
def recomputing(call: Call) -> Iterator[None]:
    """Grad mode on (a backward runs without it), autocast off, and the random numbers of the call if it drew any."""
    device = next(iter(call.parameters.values())).device.type
    again = nullcontext() if call.randomness is None else call.randomness.again()
    with torch.enable_grad(), torch.autocast(device, enabled=False), again:
        yield


def working_dtype(call: Call) -> torch.dtype:
    """The precision to compute again in: at least float32, but the call's own where it drew random numbers.

    How many of these a kernel draws, and in which order, may depend on the type.
    """
    found = next(grad for grad in call.grad_outputs if grad is not None)
    return wide(found).dtype if call.randomness is None else found.dtype


def rows_first(call: Call, tensor: Tensor, dim: int) -> Tensor:
    """``tensor`` with the layer's own batch dimension ``dim`` in front: [n * fold, ...].

    The layer says itself where its batch is (``batch_first``), so nothing is guessed from the model's layout.

    Raises:
        UnsupportedModuleError: when that dimension is not a whole number of rows for each record.
    """
    n = call.rows.n
    known = call.rows.places.by_rank.get(tensor.dim(), dim)
    if known != dim or tensor.dim() <= dim or not tensor.shape[dim] or tensor.shape[dim] % n:
        raise UnsupportedModuleError(
            f"{call.path}: met a tensor of shape {list(tensor.shape)} in a batch of {n} records; with "
            f"batch_first={getattr(call.module, 'batch_first', False)} this {type(call.module).__name__} has its batch in "
            f"dimension {dim}, which must hold the records (or a whole number of rows for each). Set batch_first to the "
            f"layout of the input."
        )
    return tensor.movedim(dim, 0)


def positions(call: Call, rows: Tensor) -> Tensor:
    """[n * fold, t, f] as a factor of a matrix product, [n, 1, fold * t, f]: all of a record's positions in one row."""
    return rows.reshape(call.rows.n, 1, -1, rows.shape[-1])


def check_same(call: Call, recomputed: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Hold a second run to what the first one put out.

    Raises:
        UnsupportedModuleError: when they differ by more than rounding.
    """
    for again, first in zip(recomputed, outputs, strict=True):
        both = again.isfinite() & first.isfinite()
        gap = (again - first)[both].abs()
        largest = first[both].abs().max() if bool(both.any()) else first.new_zeros(())
        if bool((gap > _TOLERANCE.get(first.dtype, 1e-3) * largest.clamp(min=1e-6)).any()):
            raise UnsupportedModuleError(
                f"{call.path}: this {type(call.module).__name__} put out something else than its weights and inputs give "
                f"when it is computed again (weights replaced during the call, or random numbers that cannot be drawn again), so "
                f"its per-sample gradients cannot be told. Register a rule for it, or freeze it."
            )
