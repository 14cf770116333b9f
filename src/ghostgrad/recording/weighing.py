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
        self._there = {None, *map(address_of, there)}
        self._saved: dict[int | None, Tensor] = {}
        self._kept: dict[int | None, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Autograd saves this. What takes its place has no graph: with one, an output would hold itself for good."""
        tensor = tensor.detach()
        self._count(tensor, self._saved)
        return tensor

    def keep(self, use: Use) -> None:
        """A use was met, and would be kept in its smallest form."""
        for tensor in use.compact(0).operands:
            self._count(tensor, self._kept)

    def _count(self, tensor: Tensor, found: dict[int | None, Tensor]) -> None:
        address = address_of(tensor)
        if address not in self._there:
            found[address] = tensor

    def of_a_record(self, n: int) -> Footprint:
        """What was counted, for each of ``n`` records."""
        held, kept = (sum(map(_bytes, found.values())) for found in (self._saved, self._kept))
        return Footprint(held / n, kept / n)


def address_of(tensor: Tensor) -> int | None:
    """Of a tensor's memory, which tells apart what is alive at one time; None for one that is not dense."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else None


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
