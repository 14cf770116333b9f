"""The buffers that a call started from, so that a rule can run a module that moves them on (power iterations) once more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Buffers:
    """Copies of a module's buffers as they were, while its forward runs.

    >>> module = torch.nn.BatchNorm1d(2)
    >>> start = Buffers.now(module)
    >>> _ = module(torch.randn(3, 2))
    >>> sorted(start.changed(module))
    ['num_batches_tracked', 'running_mean', 'running_var']
    """

    found: Mapping[str, tuple[Tensor, int, Tensor]]
    """By name: the buffer, how often it had been changed, and a copy."""

    @classmethod
    def now(cls, module: nn.Module) -> Buffers:
        """As they are now."""
        return cls({name: (buffer, buffer._version, buffer.clone()) for name, buffer in module.named_buffers()})

    def changed(self, module: nn.Module) -> dict[str, Tensor]:
        """What those were that have been changed or replaced since.

        Values are compared too: kernels that write in place (batch norm's) do not all count it.
        """
        after = dict(module.named_buffers())
        return {
            name: copy
            for name, (buffer, version, copy) in self.found.items()
            if after.get(name) is not buffer or buffer._version != version or not torch.equal(buffer, copy)
        }
