"""Worker processes: the same pieces with the same marks, also after a pass was left early."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad.errors import ConfigurationError
from ghostgrad.keys import RunKey
from ghostgrad.sampling import DPDataLoader


def private(workers: int, *, persistent: bool = False, pin_memory: bool = False) -> DPDataLoader:
    user = DataLoader(
        TensorDataset(torch.arange(40), torch.arange(40.0)),
        batch_size=2,
        num_workers=workers,
        persistent_workers=persistent,
        prefetch_factor=3 if workers else None,
        pin_memory=pin_memory,
    )
    return DPDataLoader.from_data_loader(user, key=RunKey.from_seed(2), accumulation_steps=2)


def trace(loader: DPDataLoader, leave_after: int | None = None) -> list[tuple[object, ...]]:
    seen: list[tuple[object, ...]] = []
    for x, y in loader:
        feed = loader.feed
        assert feed.records == len(x) == len(y)
        seen.append((x.tolist(), feed.logical_batch, feed.last, feed.epoch, feed.delivered))
        if len(seen) == leave_after:
            break
    return seen


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_neither_pieces_nor_marks(persistent: bool) -> None:
    alone, helped = private(0), private(2, persistent=persistent)
    for leave_after in (None, 5, None):
        assert trace(helped, leave_after) == trace(alone, leave_after)
    assert trace(helped.physical(1), 7) == trace(alone.physical(1), 7)
    pieces = trace(helped.physical(1))
    assert pieces == trace(alone.physical(1))
    assert any(not piece[0] for piece in pieces)


def test_persistent_workers_cannot_serve_two_passes_at_once() -> None:
    loader = private(1, persistent=True)
    first = iter(loader)
    next(first)
    next(iter(loader))
    with pytest.raises(ConfigurationError, match="second pass"):
        list(first)


def test_pin_memory_serves_empty_batches_too() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no accelerator is found")
        assert trace(private(0, pin_memory=True)) == trace(private(0))
