"""The memory manager: small pieces, and no partial sum left behind."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad.errors import ConfigurationError
from ghostgrad.keys import RunKey
from ghostgrad.memory import BatchMemoryManager
from ghostgrad.sampling import DPDataLoader


class SummingOptimizer:
    """Sums records until their logical batch is complete, as the private optimizer does with gradients."""

    def __init__(self, loader: DPDataLoader) -> None:
        self.feed = loader.feed
        self.partial: list[int] = []
        self.steps: list[list[int]] = []
        self.discards = 0

    def step(self, piece: torch.Tensor) -> None:
        self.partial += piece.tolist()
        if self.feed.last:
            self.steps.append(self.partial)
            self.partial = []

    def discard_partial(self) -> None:
        self.discards += 1
        self.partial = []


def private(*, k: int = 1, workers: int = 0) -> DPDataLoader:
    user = DataLoader(TensorDataset(torch.arange(60)), batch_size=10, num_workers=workers)
    return DPDataLoader.from_data_loader(user, key=RunKey.from_seed(4), accumulation_steps=k)


def logical_batches(passes: int = 1) -> list[list[int]]:
    loader = private()
    return [batch[0].tolist() for _ in range(passes) for batch in loader]


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_steps_are_those_of_the_logical_batches(limit: int) -> None:
    data_loader = private()
    optimizer = SummingOptimizer(data_loader)
    for _ in range(2):
        with BatchMemoryManager(data_loader=data_loader, max_physical_batch_size=limit, optimizer=optimizer) as loader:
            for (piece,) in loader:
                assert len(piece) <= limit
                optimizer.step(piece)
    assert optimizer.steps == logical_batches(2)
    assert optimizer.discards == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("raising", [False, True])
def test_leaving_early_discards_what_was_not_complete(raising: bool, workers: int) -> None:
    data_loader = private(workers=workers)
    optimizer = SummingOptimizer(data_loader)

    def leave_in_the_middle() -> None:
        with BatchMemoryManager(data_loader=data_loader, max_physical_batch_size=3, optimizer=optimizer) as loader:
            for (piece,) in loader:
                optimizer.step(piece)
                if optimizer.steps and optimizer.partial:
                    if raising:
                        raise RuntimeError("out of memory")
                    break

    if raising:
        with pytest.raises(RuntimeError, match="out of memory"):
            leave_in_the_middle()
    else:
        leave_in_the_middle()
    assert optimizer.partial == []
    optimizer.steps.clear()
    for (batch,) in data_loader:
        optimizer.step(batch)
    assert optimizer.steps == logical_batches(2)[6:]


def test_accumulated_batches_are_one_step() -> None:
    data_loader = private(k=3)
    optimizer = SummingOptimizer(data_loader)
    with BatchMemoryManager(data_loader=data_loader, max_physical_batch_size=4, optimizer=optimizer) as loader:
        for (piece,) in loader:
            optimizer.step(piece)
    assert len(optimizer.steps) == data_loader.steps_per_epoch == 2


def test_leaving_without_any_piece_is_fine() -> None:
    data_loader = private()
    optimizer = SummingOptimizer(data_loader)
    with BatchMemoryManager(data_loader=data_loader, max_physical_batch_size=3, optimizer=optimizer):
        pass
    assert optimizer.discards == 1
    assert data_loader.feed.delivered == 0


@pytest.mark.parametrize("limit", [0, -3, 2.5, True, "8"])
def test_impossible_sizes_are_refused(limit: object) -> None:
    data_loader = private()
    with pytest.raises(ConfigurationError, match="max_physical_batch_size"):
        BatchMemoryManager(
            data_loader=data_loader,
            max_physical_batch_size=limit,  # type: ignore[arg-type]
            optimizer=SummingOptimizer(data_loader),
        )


def test_a_loader_that_is_not_private_is_refused() -> None:
    user = DataLoader(TensorDataset(torch.arange(60)), batch_size=10)
    with pytest.raises(ConfigurationError, match="make_private"):
        BatchMemoryManager(
            data_loader=user,  # type: ignore[arg-type]
            max_physical_batch_size=3,
            optimizer=SummingOptimizer(private()),
        )


def test_an_optimizer_that_is_not_private_is_refused() -> None:
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ConfigurationError, match="discard_partial"):
        BatchMemoryManager(data_loader=private(), max_physical_batch_size=3, optimizer=plain)  # type: ignore[arg-type]
