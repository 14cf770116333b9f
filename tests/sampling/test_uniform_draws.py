"""What sampling is made of: uniform words of a keystream, and exact integers, counts and subsets from them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from ghostgrad.keys import RunKey
from ghostgrad.keystream import AESKeystream, PhiloxKeystream
from ghostgrad.sampling._uniform import Uniform

STREAMS = [AESKeystream, PhiloxKeystream]
FALSE_ALARM = 1e-3  # draws are fixed by the key, so a test either always passes or never does


def draws(stream_type: type = AESKeystream, number: int = 0) -> Uniform:
    return Uniform(stream_type(RunKey.from_seed(11).derive("sampling", 0, number)))


@pytest.mark.parametrize("stream_type", STREAMS)
def test_every_byte_of_the_words_is_as_likely_as_any_other(stream_type: type) -> None:
    words = draws(stream_type).words(200_000)
    for byte in words.view(np.uint8).reshape(-1, 8).T:
        assert stats.chisquare(np.bincount(byte, minlength=256)).pvalue > FALSE_ALARM / 8
    biased = np.where(words.view(np.uint8) == 0, 1, words.view(np.uint8))
    assert stats.chisquare(np.bincount(biased, minlength=256)).pvalue < 1e-12


def test_no_word_is_read_twice() -> None:
    source = draws()
    words = np.concatenate([source.words(n) for n in (1, 3, 512, 513, 1)])
    assert len(np.unique(words)) == len(words)


@pytest.mark.parametrize("stream_type", STREAMS)
@pytest.mark.parametrize("bound", [1, 2, 7, 1000])
def test_numbers_below_a_bound_are_uniform(bound: int, stream_type: type) -> None:
    numbers = draws(stream_type).below(bound, 100_000)
    assert (
        stats.chisquare(np.bincount(numbers, minlength=bound)).pvalue > FALSE_ALARM if bound > 1 else not numbers.any()
    )


def test_words_that_would_favour_small_numbers_are_drawn_again() -> None:
    """Of two thirds of all words the remainder would make the lower half twice as likely."""
    bound = 2**64 // 3 * 2
    numbers = draws().below(bound, 30_000).view(np.uint64)
    assert stats.chisquare(np.bincount((numbers >= bound // 2).astype(int), minlength=2)).pvalue > FALSE_ALARM
    remainder = draws().words(30_000) % np.uint64(bound)
    assert stats.chisquare(np.bincount((remainder >= bound // 2).astype(int), minlength=2)).pvalue < 1e-12


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_subset_is_equally_likely(size: int) -> None:
    every = dict.fromkeys(combinations(range(5), size), 0)
    for number in range(4000):
        every[tuple(sorted(draws(number=number).subset(5, size).tolist()))] += 1
    assert stats.chisquare(list(every.values())).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("n", "size"), [(1, 0), (1, 1), (10, 0), (10, 10), (1000, 501), (10**12, 50)])
def test_a_subset_has_its_size_and_no_repeats(n: int, size: int) -> None:
    chosen = draws().subset(n, size)
    assert len(set(chosen.tolist())) == size
    assert all(0 <= index < n for index in chosen)


@pytest.mark.parametrize(("n", "rate"), [(1, 0.5), (50, 0.1), (10**7, 1e-6)])
def test_counts_are_binomial(n: int, rate: float) -> None:
    source = draws()
    counts = np.array([source.binomial(n, rate) for _ in range(5000)])
    values = np.arange(counts.max() + 1)
    for law, holds in ((stats.binom(n, rate), True), (stats.binom(n, rate * 1.1), False)):
        expected = law.pmf(values) * len(counts)
        inner = expected >= 10
        observed = np.append(np.bincount(counts)[inner], np.bincount(counts)[~inner].sum())
        expected = np.append(expected[inner], len(counts) - expected[inner].sum())
        kept = expected > 1e-6
        assert bool(stats.chisquare(observed[kept], expected[kept]).pvalue > FALSE_ALARM) is holds
    assert draws().binomial(n, 1.0) == n


def test_known_answers() -> None:
    """A change of these means that old runs draw other batches."""
    assert draws().subset(1000, 5).tolist() == [135, 974, 367, 268, 897]
    assert draws().binomial(10**6, 0.01) == 10117
