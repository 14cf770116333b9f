"""How many records fit into memory, found while training: pieces grow until what they need comes near the budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from ghostgrad.errors import ConfigurationError
from ghostgrad.free_memory import free_memory, kilobytes

_FIRST = 2
"""Records of the first piece: one alone cannot show where the records are."""
_MARGIN = 0.9
"""How much of the budget a piece may be expected to fill."""
_SHARE_OF_FREE = 0.8
_STATUS, _PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter(Protocol):
    """Measures memory, in bytes."""

    def free(self) -> int:
        """What can still be had."""

    def start(self) -> None:
        """Measure from here on."""

    def peak(self) -> int:
        """The most that was held since, over what was held then."""


class GrowingSize:
    """The size of the next piece. It doubles from piece to piece as long as, by the last one, twice as much fits.

    Args:
        budget: bytes that the forward and backward of a piece may need; None for most of what is free.
        meter: measures them.

    >>> class Fixed:  # a megabyte a record
    ...     def free(self): return 10 << 20
    ...     def start(self): pass
    ...     def peak(self): return size() << 20
    >>> size = GrowingSize(None, Fixed())
    >>> for _ in range(4):
    ...     with size.of_piece(size()):
    ...         pass
    >>> size()
    7
    """

    def __init__(self, budget: int | None, meter: Meter) -> None:
        self._given, self._budget, self._meter = budget, budget, meter
        self._size, self._seen = _FIRST, 0

    def __eq__(self, other: object) -> bool:
        """Under one budget what was learned for one pass holds for the next."""
        return isinstance(other, GrowingSize) and other._given == self._given

    def __hash__(self) -> int:
        return hash(self._given)

    def __call__(self) -> int:
        return self._size

    @contextmanager
    def of_piece(self, records: int) -> Iterator[None]:
        """Measure what the consumer does with a piece."""
        if self._budget is None:
            self._budget = int(_SHARE_OF_FREE * self._meter.free())
        self._meter.start()
        yield
        if records < self._size:
            return  # the end of a batch says little about a whole piece
        self._seen += 1
        self._learn(records, self._meter.peak(), self._budget)

    def _learn(self, records: int, used: int, budget: int) -> None:
        """Raises where one record does not fit (the first piece is rehearsed on copies, and needs more than others)."""
        if records == 1 and used > budget and self._seen > 2:
            raise ConfigurationError(
                f"a piece of one record needs {used / 2**20:.1f} MiB, and max_memory is {budget / 2**20:.1f} MiB. Give it more, "
                f"or use grad_sample_mode='ghost', activation checkpointing or a smaller model."
            )
        room = math.inf if used <= 0 else _MARGIN * budget * records / used
        self._size = max(1, int(min(2 * records, room)))


class ProcessMemory:
    """Of this process, by the kernel's high-water mark (Linux)."""

    def __init__(self) -> None:
        try:
            self.start()
        except OSError as error:
            raise ConfigurationError(
                f"max_physical_batch_size='auto' needs to measure this process's memory, which this system does not tell "
                f"({error}). Give a number."
            ) from error

    def free(self) -> int:
        return free_memory(torch.device("cpu")) or 0

    def start(self) -> None:
        _PEAK.write_text("5")  # the high-water mark starts anew
        self._before = kilobytes(_STATUS, "VmRSS")

    def peak(self) -> int:
        return max(0, kilobytes(_STATUS, "VmHWM") - self._before) << 10


class CudaMemory:
    """Of torch's allocator on one device; its peak statistics are reset for each piece."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        return free_memory(self._device) or 0

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated(self._device)) - self._before


def meter_of(device: torch.device) -> Meter:
    """What measures the memory of a device.

    Raises:
        ConfigurationError: nothing does.
    """
    return CudaMemory(device) if device.type == "cuda" else ProcessMemory()
