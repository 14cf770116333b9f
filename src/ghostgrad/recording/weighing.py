"""What a forward's graph holds, and what would be kept in its place if the graph were let go layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ghostgrad.gradients import wide


class Weight(NamedTuple):
    """Bytes for each record.

    Attributes:
        held: what the graph holds.
        kept: what uses would take in the end.
    """

    held: float
    kept: float


class Weighing:
    """Counts storages once, in bytes. It keeps what it counts alive, so that no address is met twice.

    Args:
        n: the records in the batch.
        weights: the model's own tensors, which are there anyway.
    """

    def __init__(self, n: int, weights: Iterable[Tensor]) -> None:
        self._n = n
        self._weights = {_address(weight) for weight in weights if _is_dense(weight)}
        self._saved: dict[int, Tensor] = {}
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._samples = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Autograd saves this."""
        if _is_dense(tensor) and _address(tensor) not in self._weights:
            self._saved[_address(tensor)] = tensor.detach()
        return tensor

    def call(self, inputs: Sequence[Tensor], outs: Sequence[Tensor], trained: Mapping[str, nn.Parameter]) -> None:
        """A call of a module: its inputs and gradients as large as its outputs would be kept, or smaller per-sample gradients."""
        inputs = [tensor for tensor in inputs if _is_dense(tensor)]
        samples = self._n * sum(p.numel() * wide(p.new_empty(0)).itemsize for p in trained.values())
        if samples < sum(map(_bytes, (*inputs, *outs))):
            self._samples += samples
        else:
            self._inputs.update({_address(tensor): tensor for tensor in inputs})
            self._outputs.update({_address(tensor): tensor.detach() for tensor in outs})

    @property
    def of_a_record(self) -> Weight:
        """What was counted, by record."""
        held = sum(map(_bytes, self._saved.values()))
        kept = self._samples + sum(map(_bytes, (*self._inputs.values(), *self._outputs.values())))
        return Weight(held / self._n, kept / self._n)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
