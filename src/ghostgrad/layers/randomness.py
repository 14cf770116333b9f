"""The random state that a call started from, so that a rule can draw the same numbers again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Randomness:
    """States of the default generators: the CPU's, and that of the device where the module is, if it is a CUDA device.

    >>> start = Randomness.now(torch.device("cpu"))
    >>> first = torch.rand(3)
    >>> with start.again():
    ...     bool((torch.rand(3) == first).all())
    True
    """

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Randomness:
        """As the generators are now."""
        return cls(device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the generators continue from this state; afterwards, from where they were."""
        before = Randomness.now(self.device)
        try:
            self._set()
            yield
        finally:
            before._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
