"""The random state that a call started from, so that a rule can draw the same numbers again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Of the default generators: the CPU's, and that of the device where the module is, if it is a CUDA device."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def set(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)

    def key(self) -> bytes:
        """Equal for equal states."""
        return b"".join(part.numpy().tobytes() for part in (self.cpu, self.cuda) if part is not None)


@dataclass(frozen=True)
class Randomness:
    """Where a call's random numbers began and ended: a few kilobytes, and nothing of what was drawn.

    >>> start = Randomness.now(torch.device("cpu"))
    >>> first = torch.rand(3)
    >>> with start.again():
    ...     bool((torch.rand(3) == first).all())
    True
    >>> start.drew, start.until_now().drew
    (False, True)
    """

    device: torch.device
    start: RandomState
    end: RandomState
    autocast: torch.dtype | None
    """The type that the call ran in under autocast, on which it may depend how many numbers are drawn."""

    @classmethod
    def now(cls, device: torch.device) -> Randomness:
        """As the generators are now."""
        state, kind = RandomState.now(device), device.type
        return cls(device, state, state, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)

    def until_now(self) -> Randomness:
        """What was drawn since."""
        return replace(self, end=RandomState.now(self.device))

    @property
    def drew(self) -> bool:
        """Whether the call drew anything from these generators."""
        return self.start.key() != self.end.key()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the generators continue from the start; afterwards, from where they were."""
        before = RandomState.now(self.device)
        try:
            self.start.set(self.device)
            yield
        finally:
            before.set(self.device)

    def ended(self) -> bool:
        """Whether the generators are where they were when the call ended."""
        return self.end.key() == RandomState.now(self.device).key()
