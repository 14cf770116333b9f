"""Poisson draws: their law, their addresses, and what they cost."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ghostgrad.errors import ConfigurationError
from ghostgrad.keys import RunKey
from ghostgrad.sampling import PoissonBatchSampler

KEY = RunKey.from_seed(5)
RECORDS, RATE, STEPS = 40, 0.3, 4000


def membership(rate: float = RATE, *, seed: int = 5, parts: int = 1) -> np.ndarray:
    """Whether record j came in part i: ``[steps * parts, records]``."""
    sampler = PoissonBatchSampler(
        RECORDS, sample_rate=rate, steps=STEPS, key=RunKey.from_seed(seed), accumulation_steps=parts
    )
    came = np.zeros((STEPS * parts, RECORDS), dtype=bool)
    for row, indices in zip(came, sampler, strict=True):
        assert len(set(indices)) == len(indices)
        row[indices] = True
    return came


def p_value_of_rates(came: np.ndarray, rate: float) -> float:
    """Chi-square test that every record comes with ``rate``."""
    z = (came.sum(0) - len(came) * rate) / (len(came) * rate * (1 - rate)) ** 0.5
    return float(stats.chi2.sf((z**2).sum(), came.shape[1]))


def p_value_of_counts(came: np.ndarray, rate: float) -> float:
    """Chi-square test that the batch sizes are Binomial; cells below 10 expected draws are joined."""
    observed = np.bincount(came.sum(1), minlength=RECORDS + 1)
    expected = stats.binom.pmf(np.arange(RECORDS + 1), RECORDS, rate) * len(came)
    inner = expected >= 10
    observed = np.append(observed[inner], observed[~inner].sum())
    expected = np.append(expected[inner], expected[~inner].sum())
    return float(stats.chisquare(observed, expected).pvalue)


def test_every_record_comes_with_the_rate_and_sizes_are_binomial() -> None:
    came = membership()
    assert p_value_of_rates(came, RATE) > 1e-3
    assert p_value_of_counts(came, RATE) > 1e-3


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_a_rate_that_is_off_by_five_percent_is_noticed(factor: float) -> None:
    came = membership(RATE * factor)
    assert p_value_of_rates(came, RATE) < 1e-6
    assert p_value_of_counts(came, RATE) < 1e-6


def test_batches_of_a_fixed_size_are_noticed() -> None:
    came = np.zeros((STEPS, RECORDS), dtype=bool)
    for row in came:
        row[np.random.default_rng(0).choice(RECORDS, int(RECORDS * RATE), replace=False)] = True
    assert p_value_of_counts(came, RATE) < 1e-6


@pytest.mark.parametrize("rate", [RATE])
def test_records_are_independent_of_each_other_and_of_other_steps(rate: float) -> None:
    centred = (membership(rate) - rate) / (rate * (1 - rate)) ** 0.5
    for other in (centred, np.roll(centred, 1, axis=0)):
        correlations = centred.T @ other / STEPS
        if other is centred:
            correlations = correlations[~np.eye(RECORDS, dtype=bool)]
        assert np.abs(correlations).max() < 5 / STEPS**0.5
        assert abs(float((correlations**2).mean()) * STEPS - 1) < 0.15


def test_parts_of_a_step_are_poisson_samples_at_a_share_of_the_rate() -> None:
    came = membership(RATE, parts=3)
    assert p_value_of_rates(came, RATE / 3) > 1e-3
    assert p_value_of_counts(came, RATE / 3) > 1e-3
    assert came.reshape(STEPS, 3, RECORDS).sum(1).max() == 1


@settings(deadline=None, max_examples=50)
@given(records=st.integers(1, 300), rate=st.floats(0.001, 1.0), parts=st.integers(1, 5), epoch=st.integers(0, 9))
def test_parts_are_disjoint_and_make_up_the_undivided_draw(records: int, rate: float, parts: int, epoch: int) -> None:
    whole = PoissonBatchSampler(records, sample_rate=rate, steps=2, key=KEY)
    dealt = PoissonBatchSampler(records, sample_rate=rate, steps=2, key=KEY, accumulation_steps=parts)
    assert len(dealt) == 2 * parts
    pieces = dealt.draw(epoch=epoch, step=1)
    assert len(pieces) == parts
    together = [index for piece in pieces for index in piece]
    assert len(set(together)) == len(together)
    assert sorted(together) == sorted(*whole.draw(epoch=epoch, step=1))
    assert all(0 <= index < records for index in together)


def test_a_draw_is_a_function_of_key_epoch_and_step() -> None:
    def draws(key: RunKey) -> dict[tuple[int, int], list[int]]:
        sampler = PoissonBatchSampler(1000, sample_rate=0.1, steps=5, key=key)
        return {(epoch, step): batch for epoch in range(3) for step, batch in enumerate(sampler)}

    first = draws(KEY)
    assert first == draws(RunKey.from_seed(5))
    assert len({tuple(batch) for batch in first.values()}) == 15
    assert first != draws(RunKey.from_seed(6))
    alone = PoissonBatchSampler(1000, sample_rate=0.1, steps=5, key=KEY)
    assert alone.draw(epoch=2, step=3) == [first[2, 3]]


def test_resuming_within_a_pass_draws_what_was_left_of_it() -> None:
    whole, resumed = (PoissonBatchSampler(100, sample_rate=0.1, steps=5, key=KEY) for _ in range(2))
    passes = [list(whole) for _ in range(3)]
    resumed.epoch, resumed.first_step = 1, 3
    assert [list(resumed) for _ in range(2)] == [passes[1][3:], passes[2]]


def test_resuming_at_an_epoch_draws_that_epoch() -> None:
    sampler = PoissonBatchSampler(100, sample_rate=0.1, steps=3, key=KEY)
    passes = [list(sampler) for _ in range(3)]
    resumed = PoissonBatchSampler(100, sample_rate=0.1, steps=3, key=KEY)
    resumed.epoch = 2
    assert list(resumed) == passes[2]
    assert resumed.epoch == 3


def test_a_pass_left_early_is_not_drawn_again() -> None:
    sampler = PoissonBatchSampler(100, sample_rate=0.1, steps=3, key=KEY)
    first = next(iter(sampler))
    assert next(iter(sampler)) != first


def test_rate_one_takes_every_record_and_tiny_rates_mostly_none() -> None:
    everything = PoissonBatchSampler(17, sample_rate=1.0, steps=1, key=KEY)
    assert sorted(next(iter(everything))) == list(range(17))
    rare = PoissonBatchSampler(10, sample_rate=1e-6, steps=50, key=KEY)
    assert sum(map(len, rare)) == 0


def test_rates_below_float32_granularity_are_kept() -> None:
    # 2^-26 is below the granularity of a float32 coin, which would be 0 or 2^-24.
    sampler = PoissonBatchSampler(2**31, sample_rate=2.0**-26, steps=2000, key=KEY)
    total = sum(map(len, sampler))
    assert abs(total - 2000 * 32) < 5 * (2000 * 32) ** 0.5


def test_cost_follows_the_batch_and_not_the_data() -> None:
    def peak(records: int) -> int:
        sampler = PoissonBatchSampler(records, sample_rate=500 / records, steps=3, key=KEY)
        tracemalloc.start()
        sizes = [len(batch) for batch in sampler]
        bytes_used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert all(350 < size < 650 for size in sizes)
        return bytes_used

    peak(50_000)  # what numpy allocates once
    small, large = peak(50_000), peak(10_000_000)
    assert large < 2 * small
    assert large < 200_000


def test_only_given_indices_are_drawn_and_later_changes_do_not_matter() -> None:
    indices = np.arange(500, 600)
    sampler = PoissonBatchSampler(indices, sample_rate=0.5, steps=20, key=KEY)  # type: ignore[arg-type]
    before = sampler.draw(epoch=0, step=0)
    indices[:] = 0
    assert sampler.draw(epoch=0, step=0) == before
    drawn = {index for batch in sampler for index in batch}
    assert drawn == set(range(500, 600))
    assert all(type(index) is int for index in drawn)


def test_records_come_in_no_particular_order() -> None:
    batches = list(PoissonBatchSampler(100_000, sample_rate=0.001, steps=200, key=KEY))
    rising = [later > earlier for batch in batches for earlier, later in pairwise(batch)]
    assert abs(np.mean(rising) - 0.5) < 0.02


@pytest.mark.parametrize("rate", [0, -0.1, 1.0001, float("nan"), float("inf"), True])
def test_rates_that_are_no_probability_are_refused(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="sample_rate"):
        PoissonBatchSampler(10, sample_rate=rate, steps=1, key=KEY)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
@pytest.mark.parametrize("name", ["steps", "accumulation_steps"])
def test_counts_below_one_are_refused(name: str, value: object) -> None:
    arguments: dict[str, object] = {"steps": 1, "accumulation_steps": 1, name: value}
    with pytest.raises(ConfigurationError, match=name):
        PoissonBatchSampler(10, sample_rate=0.5, key=KEY, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("records", [0, [], [1, 1], [0.5, 1.5]], ids=str)
def test_impossible_records_are_refused(records: object) -> None:
    with pytest.raises(ConfigurationError):
        PoissonBatchSampler(records, sample_rate=0.5, steps=1, key=KEY)  # type: ignore[arg-type]
