"""Pieces of a logical batch: nothing lost, nothing mixed, marked in the order of delivery."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad.keys import RunKey
from ghostgrad.sampling import DPDataLoader
from ghostgrad.sampling._deliveries import Share, deliveries

KEY = RunKey.from_seed(21)


def private(*, n: int = 60, batch: int = 6, k: int = 1, poisson: bool = True) -> DPDataLoader:
    user = DataLoader(TensorDataset(torch.arange(n)), batch_size=batch)
    return DPDataLoader.from_data_loader(user, key=KEY, accumulation_steps=k, poisson_sampling=poisson)


def logical_batches(loader: DPDataLoader) -> dict[int, list[int]]:
    """Records by logical batch; checks the marks on the way."""
    batches: dict[int, list[int]] = {}
    complete = True
    for (piece,) in loader:
        feed = loader.feed
        assert feed.records == len(piece)
        assert (feed.logical_batch not in batches) == complete, "a batch opens exactly when the one before is complete"
        batches.setdefault(feed.logical_batch, []).extend(piece.tolist())
        complete = feed.last
    assert complete
    return batches


@settings(deadline=None, max_examples=60)
@given(
    limit=st.integers(1, 40),
    n=st.integers(12, 80),
    batch=st.integers(1, 6),
    k=st.integers(1, 2),
    poisson=st.booleans(),
)
def test_pieces_make_up_the_same_logical_batches(limit: int, n: int, batch: int, k: int, poisson: bool) -> None:
    whole = private(n=n, batch=batch, k=k, poisson=poisson)
    cut = private(n=n, batch=batch, k=k, poisson=poisson)
    pieces = cut.physical(limit)
    assert pieces.feed is cut.feed
    for _ in range(2):
        expected = logical_batches(whole)
        assert logical_batches(pieces) == expected
        assert len(expected) == whole.steps_per_epoch


def test_no_piece_is_larger_than_allowed_and_only_a_last_one_smaller() -> None:
    loader = private(batch=30).physical(7)
    for (piece,) in loader:
        assert len(piece) == 7 or loader.feed.last
        assert len(piece) <= 7


def test_empty_logical_batches_are_one_empty_piece() -> None:
    loader = private(n=60, batch=1).physical(5)
    batches = logical_batches(loader)
    assert len(batches) == 60
    assert any(not records for records in batches.values())


def test_passes_are_shared_with_the_undivided_loader() -> None:
    reference = private()
    expected = [logical_batches(reference) for _ in range(3)]
    loader = private()
    assert [logical_batches(loader), logical_batches(loader.physical(2)), logical_batches(loader)] == expected
    assert loader.feed.epoch == 2


def test_pieces_are_cut_anew_for_another_size_and_kept_for_the_same() -> None:
    loader = private()
    assert loader.physical(4) is loader.physical(4)
    assert loader.physical(4) is not loader.physical(5)
    assert max(len(piece) for (piece,) in loader.physical(4).physical(2)) <= 2


@pytest.mark.parametrize(("n", "batch", "k", "limit"), [(60, 6, 1, 2), (60, 30, 1, 7), (60, 1, 1, 4), (60, 10, 3, 3)])
def test_length_is_the_expected_number_of_pieces(n: int, batch: int, k: int, limit: int) -> None:
    loader = private(n=n, batch=batch, k=k)
    counts = [sum(1 for _ in loader.physical(limit)) for _ in range(40)]
    assert len(loader.physical(limit)) == pytest.approx(sum(counts) / 40, rel=0.06)


def test_length_for_large_data_is_immediate() -> None:
    loader = DPDataLoader(range(10_000_000), sample_rate=1e-3)  # type: ignore[arg-type]
    assert len(loader.physical(128)) == pytest.approx(1000 * 10_000 / 128, rel=0.01)
    assert len(DPDataLoader(range(50), sample_rate=1.0).physical(7)) == 8  # type: ignore[arg-type]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("limit", [1, 3, 8, 50])
def test_length_is_exact_for_own_batches(limit: int, drop_last: bool) -> None:
    user = DataLoader(TensorDataset(torch.arange(61)), batch_size=8, drop_last=drop_last)
    pieces = DPDataLoader.from_data_loader(user, poisson_sampling=False).physical(limit)
    assert sum(1 for _ in pieces) == len(pieces)


@given(records=st.integers(0, 40), size=st.integers(1, 5), limit=st.one_of(st.none(), st.integers(1, 9)))
def test_all_ranks_get_as_many_pieces_and_together_the_batch(records: int, size: int, limit: int | None) -> None:
    batch = list(range(100, 100 + records))
    shares = [
        [piece.indices for piece in deliveries(iter([batch]), 1, limit, Share(rank, size))] for rank in range(size)
    ]
    assert len({len(pieces) for pieces in shares}) == 1
    assert sorted(record for pieces in shares for piece in pieces for record in piece) == batch
    for pieces in shares:
        assert all(limit is None or len(piece) <= limit for piece in pieces)
        full = [bool(piece) for piece in pieces]
        assert full == sorted(full, reverse=True)  # empty ones come last
