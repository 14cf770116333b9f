"""What a private loader refuses, each with what was found and the way out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ghostgrad.errors import ConfigurationError
from ghostgrad.sampling import DPDataLoader

DATA = TensorDataset(torch.arange(20))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class Backwards(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(19, -1, -1))

    def __len__(self) -> int:
        return 20


class TiltedSampler(RandomSampler):
    """A subclass may draw anything."""


class Lengthless(Dataset):
    def __getitem__(self, index: int) -> int:
        return index


class OwnIteration(DataLoader):
    def __iter__(self):
        return iter([])


def loader(**arguments: object) -> DataLoader:
    return DataLoader(DATA, **{"batch_size": 5, **arguments})  # type: ignore[arg-type]


REFUSED = {
    "weighted": (lambda: loader(sampler=WeightedRandomSampler([1.0] * 20, 20)), "WeightedRandomSampler"),
    "replacement": (lambda: loader(sampler=RandomSampler(DATA, replacement=True)), "replacement=True"),
    "fewer samples": (lambda: loader(sampler=RandomSampler(DATA, num_samples=10)), "num_samples=10"),
    "more samples": (lambda: loader(sampler=RandomSampler(DATA, num_samples=30)), "num_samples=30"),
    "distributed": (lambda: loader(sampler=DistributedSampler(DATA, num_replicas=2, rank=0)), "DistributedSampler"),
    "unknown sampler": (lambda: loader(sampler=Backwards()), "Backwards"),
    "subclassed sampler": (lambda: loader(sampler=TiltedSampler(DATA)), "TiltedSampler"),
    "plain list": (lambda: loader(sampler=[0, 0, 0, 1, 2]), "sampler=list"),
    "unknown batch sampler": (lambda: DataLoader(DATA, batch_sampler=[[0, 1], [1, 2]]), "batch_sampler=list"),
    "weighted inside a batch sampler": (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 20, 20), 5, False)),
        "WeightedRandomSampler",
    ),
    "iterable": (lambda: DataLoader(Stream(), batch_size=2), "IterableDataset"),
    "no batching": (lambda: loader(batch_size=None), "batch_size=None"),
    "batch beyond data": (lambda: loader(batch_size=21), "batch_size=21"),
    "batch beyond subset": (lambda: loader(sampler=SubsetRandomSampler(range(4))), "batch_size=5"),
    "already private": (lambda: DPDataLoader.from_data_loader(loader()), "already private"),
    "out of order": (lambda: loader(in_order=False), "in_order=False"),
    "no length": (
        lambda: DataLoader(Lengthless(), batch_sampler=BatchSampler(SequentialSampler(range(9)), 3, False)),
        "__len__",
    ),
    "own iteration": (lambda: OwnIteration(DATA, batch_size=5), "OwnIteration"),
    "no loader": (lambda: [1, 2, 3], "list"),
    "repeated indices": (lambda: loader(sampler=SubsetRandomSampler([0, 1, 2, 3, 3])), "more than once"),
    "indices from the end": (lambda: loader(sampler=SubsetRandomSampler([-1, 0, 1, 2, 19])), "outside"),
    "indices beyond": (lambda: loader(sampler=SubsetRandomSampler(range(16, 21))), "outside"),
    "fractional indices": (lambda: loader(sampler=SubsetRandomSampler([0.5] * 5)), "whole numbers"),
    "sampler of larger data": (lambda: loader(sampler=SequentialSampler(range(30))), "30"),
    "subset with repeats": (lambda: DataLoader(Subset(DATA, [1, 2, 1]), batch_size=1), "more than once"),
    "subset with an alias": (lambda: DataLoader(Subset(DATA, [0, 19, -1]), batch_size=1), "more than once"),
    "subset of a subset": (lambda: DataLoader(Subset(Subset(DATA, [4, 4, 5]), [0, 1]), batch_size=1), "more than once"),
    "data twice": (lambda: DataLoader(ConcatDataset([DATA, DATA]), batch_size=2), "more than once"),
    "overlapping parts": (
        lambda: DataLoader(ConcatDataset([Subset(DATA, range(5)), Subset(DATA, range(4, 9))]), batch_size=2),
        "more than once",
    ),
}


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sampled_privately_is_refused(case: str, poisson: bool) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        DPDataLoader.from_data_loader(make(), poisson_sampling=poisson)  # type: ignore[no-untyped-call]


ACCEPTED = {
    "sampler of part of the data": (lambda: loader(sampler=RandomSampler(range(10))), 10),
    "whole subset": (lambda: DataLoader(Subset(DATA, range(10)), batch_size=5), 10),
    "subset of lengthless": (lambda: DataLoader(Subset(Lengthless(), [5, 7, 9, 1]), batch_size=2), 4),  # type: ignore[arg-type]
    "different parts": (
        lambda: DataLoader(ConcatDataset([Subset(DATA, range(5)), Subset(DATA, range(5, 9))]), batch_size=2),
        9,
    ),
    "half of the pairs": (lambda: DataLoader(Subset(ConcatDataset([DATA, DATA]), range(20)), batch_size=2), 20),
    "whole batch": (lambda: loader(batch_size=20), 20),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_only_looks_like_it_is_accepted(case: str) -> None:
    make, records = ACCEPTED[case]
    private = DPDataLoader.from_data_loader(make())  # type: ignore[no-untyped-call]
    assert private.num_records == records
    list(private)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps=0"),
        ({"accumulation_steps": 1.5}, "accumulation_steps=1.5"),
        ({"accumulation_steps": 5}, "accumulation_steps=5"),
        ({"accumulation_steps": 5, "poisson_sampling": False}, "accumulation_steps=5"),
        ({"sample_rate": 0.0}, "sample_rate=0.0"),
        ({"sample_rate": 1.5}, "sample_rate=1.5"),
        ({"sample_rate": float("nan")}, "sample_rate=nan"),
        ({"sample_rate": 0.5, "poisson_sampling": False}, "sample_rate=0.5"),
        ({"distributed": True}, "distributed=True"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DPDataLoader.from_data_loader(loader(), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0, -1, 2.0, True, None])
def test_impossible_physical_sizes_are_refused(limit: object) -> None:
    with pytest.raises(ConfigurationError, match="max_physical_batch_size"):
        DPDataLoader.from_data_loader(loader()).physical(limit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data", [Stream(), Lengthless(), Subset(DATA, [0, 0])], ids=["stream", "lengthless", "repeats"]
)
def test_the_constructor_refuses_the_same_data(data: Dataset) -> None:
    with pytest.raises(ConfigurationError):
        DPDataLoader(data, sample_rate=0.5)


def test_a_refusal_leaves_the_users_loader_as_it_was() -> None:
    user = loader(sampler=RandomSampler(DATA, replacement=True))
    before = dict(vars(user))
    with pytest.raises(ConfigurationError):
        DPDataLoader.from_data_loader(user)
    assert vars(user) == before
