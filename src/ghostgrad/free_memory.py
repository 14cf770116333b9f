"""How much memory a device still has."""

from __future__ import annotations

from pathlib import Path

import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where nothing tells.

    >>> free_memory(torch.device("meta")) is None
    True
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    try:
        return kilobytes(Path("/proc/meminfo"), "MemAvailable") << 10
    except OSError:  # not Linux
        return None


def kilobytes(file: Path, entry: str) -> int:
    """A line of one of the kernel's accounts of memory."""
    (line,) = (line for line in file.read_text().splitlines() if line.startswith(entry + ":"))
    return int(line.split()[1])
