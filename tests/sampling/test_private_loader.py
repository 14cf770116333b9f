"""DPDataLoader: what it keeps of the user's loader, its rate and lengths, and its feed."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from ghostgrad.keys import RunKey
from ghostgrad.sampling import DPDataLoader, Feed

KEY = RunKey.from_seed(11)


def dataset(n: int = 100) -> TensorDataset:
    return TensorDataset(torch.arange(n), torch.arange(n, dtype=torch.float32).reshape(n, 1))


def served(loader: DPDataLoader) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 500), batch=st.integers(1, 500), k=st.integers(1, 4), drop_last=st.booleans())
def test_rate_and_lengths_are_exact(n: int, batch: int, k: int, drop_last: bool) -> None:
    if k * batch > n:
        return
    user = DataLoader(dataset(n), batch_size=batch, shuffle=True, drop_last=drop_last)
    loader = DPDataLoader.from_data_loader(user, key=KEY, accumulation_steps=k)
    assert loader.sample_rate == k * batch / n
    assert loader.expected_batch_size == k * batch
    assert loader.steps_per_epoch == math.ceil(len(user) / k)
    assert len(loader) == k * loader.steps_per_epoch
    assert (loader.num_records, loader.accumulation_steps, loader.poisson_sampling) == (n, k, True)
    assert sum(1 for _ in loader) == len(loader)


@pytest.mark.parametrize("steps", [3, 49, 98, 103, 107, 161, 187, 197, 469])
def test_no_batch_of_an_epoch_is_lost_to_rounding(steps: int) -> None:
    # 1 / (1 / 49) is 49.00000000000001 or 48.99999999999999, depending on who computes it.
    for drop_last in (False, True):
        loader = DPDataLoader(dataset(1000), sample_rate=1 / steps, drop_last=drop_last, key=KEY)
        assert len(loader) == steps


def test_steps_of_a_rate_between_whole_numbers() -> None:
    assert len(DPDataLoader(dataset(), sample_rate=0.3, key=KEY)) == 4
    assert len(DPDataLoader(dataset(), sample_rate=0.3, drop_last=True, key=KEY)) == 3
    assert len(DPDataLoader(dataset(), sample_rate=1.0, drop_last=True, key=KEY)) == 1


def test_batch_size_64_means_rate_64_over_n() -> None:
    loader = DPDataLoader.from_data_loader(DataLoader(dataset(1000), batch_size=64), key=KEY)
    assert loader.sample_rate == 0.064
    assert loader.sample_rate != 1 / len(loader)
    assert loader.expected_batch_size == 64.0


def test_a_given_sample_rate_overrides_the_batch_size() -> None:
    user = DataLoader(dataset(), batch_size=64)
    loader = DPDataLoader.from_data_loader(user, key=KEY, sample_rate=0.05, accumulation_steps=2)
    assert loader.sample_rate == 0.05
    assert loader.expected_batch_size == 5.0
    assert (loader.steps_per_epoch, len(loader)) == (20, 40)


@pytest.mark.parametrize(
    "indices", [list(range(30)), torch.arange(30), range(0, 60, 2)], ids=["list", "tensor", "range"]
)
@pytest.mark.parametrize("poisson", [True, False])
def test_subset_random_sampler_is_honoured(indices: object, poisson: bool) -> None:
    user = DataLoader(dataset(), batch_size=10, sampler=SubsetRandomSampler(indices))  # type: ignore[arg-type]
    loader = DPDataLoader.from_data_loader(user, key=KEY, poisson_sampling=poisson)
    assert (loader.num_records, loader.sample_rate, len(loader)) == (30, 10 / 30, 3)
    seen = {index for _ in range(15) for batch in served(loader) for index in batch}
    assert seen == {int(index) for index in indices}  # type: ignore[attr-defined]


def test_subsets_are_datasets_of_their_own() -> None:
    part = Subset(Subset(dataset(), range(50, 90)), range(0, 40, 2))
    loader = DPDataLoader.from_data_loader(DataLoader(part, batch_size=10), key=KEY)
    assert loader.sample_rate == 0.5
    assert {index for _ in range(9) for batch in served(loader) for index in batch} == set(range(50, 90, 2))


@pytest.mark.parametrize("sampler", [SequentialSampler, RandomSampler])
def test_plain_batch_samplers_are_understood(sampler: type) -> None:
    data = dataset()
    user = DataLoader(data, batch_sampler=BatchSampler(sampler(data), batch_size=8, drop_last=True))
    loader = DPDataLoader.from_data_loader(user, key=KEY)
    assert (loader.sample_rate, len(loader)) == (0.08, 12)


def start(_: int) -> None:
    """A worker_init_fn."""


def test_everything_about_fetching_is_kept() -> None:
    def collate(records: list) -> list:
        return default_collate(records)

    generator = torch.Generator()
    user = DataLoader(
        dataset(),
        batch_size=10,
        num_workers=1,
        collate_fn=collate,
        pin_memory=True,
        timeout=7,
        worker_init_fn=start,
        multiprocessing_context="spawn",
        generator=generator,
        prefetch_factor=5,
        persistent_workers=True,
    )
    for poisson in (True, False):
        private = DPDataLoader.from_data_loader(user, key=KEY, poisson_sampling=poisson)
        for loader in (private, private.physical(3)):
            assert isinstance(loader, DataLoader)
            assert loader.multiprocessing_context.get_start_method() == "spawn"
            assert loader.generator is generator
            for name in [
                "dataset",
                "collate_fn",
                "num_workers",
                "pin_memory",
                "timeout",
                "worker_init_fn",
                "prefetch_factor",
                "persistent_workers",
            ]:
                assert getattr(loader, name) == getattr(user, name), name


def test_keys_decide_the_draws() -> None:
    user = DataLoader(dataset(), batch_size=10)

    def first_pass(**source: object) -> list[list[int]]:
        return served(DPDataLoader.from_data_loader(user, **source))  # type: ignore[arg-type]

    seeded = first_pass(key=KEY)
    assert seeded == first_pass(key=RunKey.from_seed(11))
    assert first_pass() != first_pass()
    assert first_pass(generator=torch.Generator().manual_seed(3)) == first_pass(
        generator=torch.Generator().manual_seed(3)
    )
    assert first_pass(generator=torch.Generator().manual_seed(3)) != first_pass(
        generator=torch.Generator().manual_seed(4)
    )


def test_a_constant_seed_in_the_users_loader_does_not_seed_the_draws() -> None:
    def first_pass() -> list[list[int]]:
        user = DataLoader(dataset(), batch_size=10, generator=torch.Generator().manual_seed(0))
        return served(DPDataLoader.from_data_loader(user))

    assert first_pass() != first_pass()


def test_passes_differ_and_batch_sampler_is_the_poisson_sampler() -> None:
    loader = DPDataLoader.from_data_loader(DataLoader(dataset(), batch_size=10), key=KEY)
    passes = [served(loader), served(loader)]
    assert passes[0] != passes[1]
    loader.batch_sampler.epoch = 0  # type: ignore[union-attr]
    assert served(loader) == passes[0]


def test_constructor_takes_what_opacus_takes() -> None:
    loader = DPDataLoader(
        dataset(), sample_rate=0.1, collate_fn=None, drop_last=False, generator=torch.Generator().manual_seed(1)
    )
    assert (loader.sample_rate, loader.expected_batch_size, len(loader)) == (0.1, 10.0, 10)
    some = DPDataLoader(dataset(), sample_rate=1.0, indices=[3, 5, 7], key=KEY)
    assert [sorted(batch) for batch in served(some)] == [[3, 5, 7]]
    assert some.num_records == 3


def test_feed_describes_what_the_consumer_holds() -> None:
    loader = DPDataLoader.from_data_loader(DataLoader(dataset(), batch_size=2), key=KEY)
    assert astuple(loader.feed)[:6] == (-1, 0, True, -1, -1, 0)
    seen = 0
    for epoch in range(2):
        for step, batch in enumerate(loader):
            seen += 1
            assert loader.feed.logical_batch == epoch * 50 + step
            assert loader.feed.records == len(batch[0])
            assert loader.feed.last
            assert (loader.feed.epoch, loader.feed.step, loader.feed.delivered) == (epoch, step, seen)


def test_feed_keeps_secrets_out_of_its_repr() -> None:
    assert "records" not in repr(Feed(records=17))


def test_accumulated_batches_share_a_logical_batch() -> None:
    loader = DPDataLoader.from_data_loader(DataLoader(dataset(), batch_size=4), key=KEY, accumulation_steps=3)
    marks = [(loader.feed.logical_batch, loader.feed.step, loader.feed.last) for _ in loader]
    assert marks == [(i // 3, i // 3, i % 3 == 2) for i in range(27)]


def test_leaving_early_takes_new_numbers_and_new_draws() -> None:
    loader = DPDataLoader.from_data_loader(DataLoader(dataset(), batch_size=10), key=KEY)
    first = next(iter(loader))
    assert (loader.feed.logical_batch, loader.feed.epoch) == (0, 0)
    again = next(iter(loader))
    assert (loader.feed.logical_batch, loader.feed.epoch) == (1, 1)
    assert first[0].tolist() != again[0].tolist()


def test_a_look_at_the_data_in_between_does_not_disturb_a_pass() -> None:
    plain = served(DPDataLoader.from_data_loader(DataLoader(dataset(), batch_size=10), key=KEY))
    loader = DPDataLoader.from_data_loader(DataLoader(dataset(), batch_size=10), key=KEY)
    batches, numbers = [], []
    for batch in loader:
        batches.append(batch[0].tolist())
        numbers.append(loader.feed.logical_batch)
        assert loader.feed.records == len(batch[0])
        if len(batches) == 4:
            next(iter(loader))
            numbers.append(loader.feed.logical_batch)
    assert batches == plain
    assert numbers == list(range(11))


def test_an_error_in_the_data_ends_the_pass_and_the_next_one_is_whole() -> None:
    class Fragile(TensorDataset):
        broken = True

        def __getitem__(self, index: int):
            if self.broken and index == 13:
                raise OSError("unreadable")
            return super().__getitem__(index)

    data = Fragile(torch.arange(20))
    loader = DPDataLoader.from_data_loader(DataLoader(data, batch_size=10), key=KEY, accumulation_steps=2)
    passing = iter(loader)
    with pytest.raises(OSError, match="unreadable"):
        list(passing)
    assert list(passing) == []
    data.broken = False
    epoch_of_next = loader.batch_sampler.epoch  # type: ignore[union-attr]
    expected = loader.batch_sampler.draw(epoch=epoch_of_next, step=0)  # type: ignore[union-attr]
    assert served(loader) == expected


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("seeded", [False, True])
def test_own_batches_are_those_of_the_users_loader(seeded: bool, drop_last: bool) -> None:
    def user() -> DataLoader:
        generator = torch.Generator().manual_seed(8) if seeded else None
        return DataLoader(dataset(), batch_size=8, shuffle=True, drop_last=drop_last, generator=generator)

    torch.manual_seed(0)
    plain = user()
    expected = [[batch[0].tolist() for batch in plain] for _ in range(2)]
    torch.manual_seed(0)
    original = user()
    loader = DPDataLoader.from_data_loader(original, poisson_sampling=False)
    assert [served(loader), served(loader)] == expected
    assert loader.batch_sampler is original.batch_sampler
    assert (loader.poisson_sampling, len(loader), loader.sample_rate) == (False, len(original), 0.08)
    assert (loader.expected_batch_size, loader.feed.epoch) == (8.0, 1)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_own_batches_are_grouped_and_the_last_group_is_completed(k: int) -> None:
    loader = DPDataLoader.from_data_loader(
        DataLoader(dataset(), batch_size=8), poisson_sampling=False, accumulation_steps=k
    )
    assert loader.expected_batch_size == 8 * k
    assert (len(loader), loader.steps_per_epoch) == (13, math.ceil(13 / k))
    for epoch in range(2):
        marks = [(loader.feed.logical_batch, loader.feed.last) for _ in loader]
        first = epoch * math.ceil(13 / k)
        assert marks == [(first + i // k, i % k == k - 1 or i == 12) for i in range(13)]


def test_own_batches_serve_each_record_once_a_pass() -> None:
    loader = DPDataLoader.from_data_loader(DataLoader(dataset(), batch_size=7, shuffle=True), poisson_sampling=False)
    assert sorted(index for batch in served(loader) for index in batch) == list(range(100))
