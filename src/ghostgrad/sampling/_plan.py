"""Which batches a private loader will hand out, decided once from the user's arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from ghostgrad.errors import ConfigurationError
from ghostgrad.keys import RunKey
from ghostgrad.sampling._deliveries import BatchSource, OwnBatches, Share
from ghostgrad.sampling._indices import digest_of
from ghostgrad.sampling._inspect import Servable
from ghostgrad.sampling._length import pieces_of_own_batches, pieces_of_poisson_batches
from ghostgrad.sampling.poisson import PoissonBatchSampler, check_rate


@dataclass(frozen=True)
class Fetching:
    """How torch fetches records: the part of a loader that privacy leaves alone."""

    num_workers: int = 0
    collate_fn: Callable[[list[Any]], Any] | None = None
    pin_memory: bool = False
    timeout: float = 0
    worker_init_fn: Callable[[int], None] | None = None
    multiprocessing_context: Any = None
    generator: torch.Generator | None = None
    prefetch_factor: int | None = None
    persistent_workers: bool = False
    pin_memory_device: str = ""

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> Fetching:
        return cls(
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            pin_memory_device=loader.pin_memory_device,
        )


@dataclass(frozen=True)
class Plan:
    """Which batches come, and the public facts about them."""

    source: BatchSource
    batch_sampler: Sampler[list[int]]
    parts: int  # batches a pass
    sample_rate: float
    expected_batch_size: float
    accumulation_steps: int
    poisson_sampling: bool
    num_records: int
    records: str  # a digest of which may be drawn
    servable: Servable | None = None  # of the user's own batches
    share: Share = field(default_factory=Share)

    def pieces(self, limit: int) -> int:
        """Expected number of pieces of at most ``limit`` records in a pass; exact for the user's own batches."""
        if self.servable is not None:
            return pieces_of_own_batches(self.servable, limit)
        rate = self.sample_rate / self.accumulation_steps / self.share.size
        return pieces_of_poisson_batches(self.parts, self.num_records, rate, limit)

    def shared(self, rank: int, size: int) -> Plan:
        """The same batches, of which this rank hands out its share."""
        return replace(self, share=Share(rank, size))


def key_from(generator: torch.Generator | None) -> RunKey:
    if generator is None:
        return RunKey.from_os()
    drawn = torch.randint(0, 256, (32,), generator=generator, device=generator.device)
    return RunKey(bytes(drawn.tolist()), seeded=True)


def steps_at(sample_rate: float, *, drop_last: bool) -> int:
    # 1 / (1 / 49) is not 49 in floating point; no batch may be lost or won by that.
    exact = 1 / sample_rate
    whole = round(exact)
    if math.isclose(exact, whole, rel_tol=1e-9):
        return whole
    return max(1, math.floor(exact) if drop_last else math.ceil(exact))


def poisson_plan(
    records: int | Sequence[int],
    sample_rate: float,
    steps: int,
    key: RunKey,
    accumulation_steps: int,
    expected_batch_size: float | None = None,
) -> Plan:
    sampler = PoissonBatchSampler(
        records, sample_rate=sample_rate, steps=steps, key=key, accumulation_steps=accumulation_steps
    )
    n = sampler.num_records
    return Plan(
        source=sampler,
        batch_sampler=sampler,
        parts=len(sampler),
        sample_rate=float(sample_rate),
        expected_batch_size=sample_rate * n if expected_batch_size is None else expected_batch_size,
        accumulation_steps=accumulation_steps,
        poisson_sampling=True,
        num_records=n,
        records=digest_of(records),
    )


def plan_like(
    loader: DataLoader[Any], servable: Servable, key: RunKey, sample_rate: float | None, accumulation_steps: int
) -> Plan:
    if sample_rate is not None:
        check_rate(sample_rate)
        steps = steps_at(sample_rate, drop_last=servable.drop_last)
        return poisson_plan(servable.records, sample_rate, steps, key, accumulation_steps)
    size = _logical_size(servable, accumulation_steps)
    steps = -(-len(loader) // accumulation_steps)
    rate = size / servable.num_records
    return poisson_plan(servable.records, rate, steps, key, accumulation_steps, float(size))


def own_plan(loader: DataLoader[Any], servable: Servable, sample_rate: float | None, accumulation_steps: int) -> Plan:
    if sample_rate is not None:
        raise ConfigurationError(
            f"sample_rate={sample_rate!r} with poisson_sampling=False: the batches are the loader's own and no rate is "
            "drawn; leave sample_rate out."
        )
    size = _logical_size(servable, accumulation_steps)
    sampler: BatchSampler = servable.batch_sampler
    return Plan(
        source=OwnBatches(sampler, servable.first_record),
        batch_sampler=sampler,
        parts=len(loader),
        sample_rate=size / servable.num_records,
        expected_batch_size=float(size),
        accumulation_steps=accumulation_steps,
        poisson_sampling=False,
        num_records=servable.num_records,
        records=digest_of(servable.records),
        servable=servable,
    )


def _logical_size(servable: Servable, accumulation_steps: int) -> int:
    size = accumulation_steps * servable.batch_size
    if size > servable.num_records:
        raise ConfigurationError(
            f"accumulation_steps={accumulation_steps} times batch_size={servable.batch_size} is more than the "
            f"{servable.num_records} records that the loader draws from; lower one of them."
        )
    return size
