"""What a user's loader would draw, or why that cannot be made private."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from ghostgrad.errors import ConfigurationError
from ghostgrad.sampling._indices import check_indices, check_origins


@dataclass(frozen=True)
class Servable:
    """The records that a loader draws from: a count (indices ``0 .. n-1``) or the indices; and its batches."""

    records: int | Sequence[int]
    batch_size: int
    drop_last: bool
    batch_sampler: BatchSampler

    @property
    def num_records(self) -> int:
        return self.records if isinstance(self.records, int) else len(self.records)

    @property
    def first_record(self) -> int:
        return 0 if isinstance(self.records, int) else int(self.records[0])


def inspect_loader(loader: DataLoader[Any], ranks: int = 1) -> Servable:
    """The records and batches of ``loader``; raises ``ConfigurationError`` for what cannot be sampled privately.

    With a ``DistributedSampler`` over as many ``ranks`` the batch size counts for each of them, as torch's users know it.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(
            f"data_loader is a {type(loader).__name__}, not a torch DataLoader; its batches cannot be redrawn. Give a "
            "torch.utils.data.DataLoader over a map-style dataset."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigurationError(
            f"data_loader is a {type(loader).__name__} with an iteration of its own, which a private loader would not "
            "run. Give a plain torch.utils.data.DataLoader."
        )
    check_dataset(loader.dataset)
    if not getattr(loader, "in_order", True):
        raise ConfigurationError(
            "in_order=False hands batches out in the order in which workers finish, and a logical batch could not be "
            "told from the next; leave in_order at True."
        )
    if loader.batch_sampler is None:
        raise ConfigurationError(
            "batch_size=None turns batching off, and there is no batch to sample; give the expected batch size."
        )
    batch_sampler = loader.batch_sampler
    if type(batch_sampler) is not BatchSampler:
        raise ConfigurationError(
            f"batch_sampler={type(batch_sampler).__name__} chooses batches by rules of its own, and neither the "
            "sensitivity nor the sampling rate is known; give batch_size= with shuffle=True, or a plain BatchSampler."
        )
    shared = isinstance(batch_sampler.sampler, DistributedSampler) and batch_sampler.sampler.num_replicas == ranks > 1
    records = len(loader.dataset) if shared else _records_of(batch_sampler.sampler)  # type: ignore[arg-type]
    check_indices(records, len(loader.dataset))  # type: ignore[arg-type]
    size = int(batch_sampler.batch_size) * (ranks if shared else 1)
    servable = Servable(records, size, bool(batch_sampler.drop_last), batch_sampler)
    if servable.batch_size > servable.num_records:
        raise ConfigurationError(
            f"batch_size={servable.batch_size} is larger than the {servable.num_records} records that the loader draws "
            "from; give at most that many."
        )
    return servable


def check_dataset(dataset: Dataset[Any]) -> None:
    """Raise ``ConfigurationError`` unless records can be fetched by index and none of them twice."""
    if isinstance(dataset, IterableDataset):
        raise ConfigurationError(
            f"dataset is an IterableDataset ({type(dataset).__name__}): its records cannot be drawn at random, so no "
            "sampling amplification holds and a record may come any number of times. Give a map-style dataset "
            "(__getitem__, __len__)."
        )
    if not hasattr(dataset, "__len__"):
        raise ConfigurationError(
            f"dataset ({type(dataset).__name__}) has no __len__, so the sampling rate is not known; add one."
        )
    check_origins(dataset)


def _records_of(sampler: Any) -> int | Sequence[int]:
    kind = type(sampler)
    if kind is SequentialSampler:
        return len(sampler.data_source)
    if kind is SubsetRandomSampler:
        return sampler.indices  # type: ignore[no-any-return]
    if kind is RandomSampler:
        return _records_of_random_sampler(sampler)
    reasons: list[tuple[type, str]] = [
        (
            WeightedRandomSampler,
            "gives records different probabilities, so the amplification of sampling is not that of one rate",
        ),
        (
            DistributedSampler,
            f"gives each of {getattr(sampler, 'num_replicas', 'several')} processes a share of the data, and there are not as "
            f"many ranks here; leave it out, the private loader draws for all",
        ),
    ]
    for refused, reason in reasons:
        if isinstance(sampler, refused):
            raise ConfigurationError(
                f"sampler={kind.__name__} {reason}. Use shuffle=True, or SubsetRandomSampler for a part of the data."
            )
    raise ConfigurationError(
        f"sampler={kind.__name__} is not known, so neither how often a record comes nor the sampling rate can be told. "
        "Use shuffle=True, SequentialSampler, RandomSampler or SubsetRandomSampler(indices)."
    )


def _records_of_random_sampler(sampler: RandomSampler) -> int:
    n = len(sampler.data_source)
    if sampler.replacement:
        raise ConfigurationError(
            "RandomSampler(replacement=True) can serve a record several times, which multiplies its influence on a "
            "step; use replacement=False."
        )
    if sampler.num_samples != n:
        raise ConfigurationError(
            f"RandomSampler(num_samples={sampler.num_samples}) over {n} records serves some records more often than "
            "others in a pass; leave num_samples out and choose the number of epochs instead."
        )
    return n
