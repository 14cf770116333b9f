"""What a forward's graph holds, and what would be kept in its place if the graph were let go layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ghostgrad.gradients import Use


class Footprint(NamedTuple):
    """Bytes for each record.

    Attributes:
        held: what the graph holds.
        kept: what uses take in the end.
    """

    held: float
    kept: float


class Weighing:
    """Counts memory once, wherever it is met again. It keeps what it counts alive, so that no address is another's.

    Args:
        there: the model's own tensors, which are not counted.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        self._there = {_address(tensor) for tensor in there if _is_dense(tensor)}
        self._saved: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Autograd saves this. What takes its place has no graph: with one, an output would hold itself for good."""
        tensor = tensor.detach()
        if _is_dense(tensor) and _address(tensor) not in self._there:
            self._saved[_address(tensor)] = tensor
        return tensor

    def keep(self, use: Use) -> None:
        """A use was met, and would be kept in its smallest form."""
        self._kept.update({_address(tensor): tensor for tensor in use.compact(0).operands if _is_dense(tensor)})

    def of_a_record(self, n: int) -> Footprint:
        """What was counted, for each of ``n`` records."""
        held, kept = (sum(map(_bytes, found.values())) for found in (self._saved, self._kept))
        return Footprint(held / n, kept / n)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
