"""Runs a function on several ranks: forked processes in one gloo group, which meet in a file."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = 120.0
"""Seconds after which ranks that wait for each other count as hanging."""


def on_ranks(size: int, function: Callable[[int], Any], *, timeout: float = _PATIENCE / 2) -> list[Any]:
    """``function(rank)`` on each rank; what each returned, in order; None of one that ended without a word.

    ``timeout`` of the process group is in seconds.

    Raises:
        AssertionError: with the tracebacks, if a rank failed or did not end.
    """
    context = multiprocessing.get_context("fork")  # a tenth of the time of spawned processes
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking beside threads
            ranks = [context.Process(target=_run, args=(folder, size, rank, function, timeout)) for rank in range(size)]
            for process in ranks:
                process.start()
        for process in ranks:
            process.join(_PATIENCE)
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
            process.join()
        failures = [path.read_text() for path in sorted(Path(folder).glob("failure*"))]
        assert not failures, "\n".join(failures)
        assert not hung, f"ranks {hung} did not end"
        paths = [Path(folder) / f"result{rank}" for rank in range(size)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def _run(folder: str, size: int, rank: int, function: Callable[[int], Any], timeout: float) -> None:
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(f"{folder}/store", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        torch.save(function(rank), f"{folder}/result{rank}")
    except BaseException:
        Path(f"{folder}/failure{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
