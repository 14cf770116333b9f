"""The bounds are the theorems' own numbers: exact sums, published values, and mechanisms that come close to the bound."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats

from ghostgrad.accounting import create_accountant
from ghostgrad.audit import errors_epsilon, errors_mu, one_run_epsilon, one_run_p_value, rate_upper
from ghostgrad.audit.evidence import Errors
from ghostgrad.errors import ConfigurationError

COUNTS = [(0, 5, 5), (1, 1, 1), (3, 5, 9), (5, 5, 9), (18, 20, 40), (20, 20, 20), (31, 40, 60)]


def tail(v: int, r: int, success: Fraction) -> Fraction:
    """P(W >= v), in whole numbers."""
    return sum((math.comb(r, k) * success**k * (1 - success) ** (r - k) for k in range(max(v, 0), r + 1)), Fraction(0))


def slow_p_value(v: int, r: int, m: int, success: Fraction, delta: Fraction) -> Fraction:
    """Theorem 5.2 word for word."""
    worst = max((tail(v - i, r, success) - tail(v, r, success)) / i for i in range(1, m + 1))
    return min(Fraction(1), tail(v, r, success) + 2 * m * delta * worst)


@pytest.mark.parametrize(("correct", "guesses", "canaries"), COUNTS)
@pytest.mark.parametrize("odds", [1, 2, 9])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 10**5), Fraction(1, 100)])
def test_the_one_run_p_value_is_the_theorem_in_whole_numbers(correct, guesses, canaries, odds, delta):
    slow = slow_p_value(correct, guesses, canaries, Fraction(odds, odds + 1), delta)
    fast = one_run_p_value(correct, guesses, canaries, epsilon=math.log(odds), delta=float(delta))
    assert fast == pytest.approx(float(slow), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(
    ("arguments", "published"),
    [((75, 100, 1000, 1e-4, 0.95), 0.673), ((1439, 1510, 100_000, 1e-5, 0.95), 2.675)],
)
def test_published_values_are_met(arguments, published):
    # Steinke, Nasr and Jagielski 2023: appendix D and section 7.
    assert one_run_epsilon(*arguments) == pytest.approx(published, abs=1e-3)


def test_no_mechanism_that_is_private_passes_the_bound():
    """Epsilon-randomised response on every coin, and with probability ``delta m / k`` a random k of them in the open."""
    m = r = 12
    delta = Fraction(1, 100)
    closest = Fraction(0)
    for odds in (1, 3):
        success = Fraction(odds, odds + 1)
        for k in range(1, m + 1):
            leak = min(Fraction(1), delta * m / k)
            for v in range(r + 1):
                truth = leak * tail(v - k, r - k, success) + (1 - leak) * tail(v, r, success)
                bound = slow_p_value(v, r, m, success, delta)
                assert truth <= bound
                assert float(truth) <= one_run_p_value(v, r, m, math.log(odds), float(delta)) + 1e-12
                if truth > 3 * tail(v, r, success):  # where the leak decides
                    closest = max(closest, truth / bound)
    assert closest > Fraction(1, 3)  # so that a delta term of a third would fail


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_epsilon_grows_with_correct_guesses_and_falls_with_delta_and_confidence(delta):
    found = [one_run_epsilon(v, 200, 500, delta, 0.95) for v in range(201)]
    assert all(a <= b for a, b in pairwise(found))
    assert found[100] == 0.0
    assert found[200] > found[150] > 0
    assert one_run_epsilon(180, 200, 500, delta, 0.99) < one_run_epsilon(180, 200, 500, delta, 0.95)
    assert one_run_epsilon(180, 200, 500, delta + 1e-4, 0.95) < found[180]
    assert one_run_epsilon(180, 200, 5000, 1e-4, 0.95) < one_run_epsilon(180, 200, 500, 1e-4, 0.95)


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (0, 60), (3, 10), (50, 60), (59, 60), (60, 60)])
@pytest.mark.parametrize("level", [0.05, 0.001])
def test_the_rate_is_the_one_under_which_so_few_hits_have_that_probability(hits, trials, level):
    upper = rate_upper(hits, trials, level)
    if hits == trials:
        assert upper == 1.0
    else:
        assert scipy.stats.binom.cdf(hits, trials, upper) == pytest.approx(level, rel=1e-9)


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_error_rates_of_the_best_attack_give_back_the_mechanism(mu):
    thresholds = np.linspace(-8, 8 + mu, 4001)
    false_alarms, misses = scipy.stats.norm.sf(thresholds), scipy.stats.norm.cdf(thresholds - mu)
    kept = (false_alarms > 1e-12) & (misses > 1e-12)
    rates = list(zip(false_alarms[kept].tolist(), misses[kept].tolist(), strict=True))
    accountant = create_accountant("pld")
    accountant.step(noise_multiplier=1 / mu, sample_rate=1.0)
    for delta in (1e-4, 0.01, 0.1):
        # The supremum over tests is the privacy curve itself: never above it, and close.
        shown = max(errors_epsilon(*pair, delta) for pair in rates)
        claimed = accountant.get_epsilon(delta)
        assert claimed - 2e-3 < shown < claimed + 1e-6
    assert all(errors_mu(*pair) == pytest.approx(mu, abs=1e-6) for pair in rates[:: len(rates) // 20])


def test_the_gaussian_form_shows_at_least_as_much():
    plain, gaussian = (Errors(2, 60, 3, 60, gaussian=flag) for flag in (False, True))
    for delta in (1e-5, 0.01, 0.3):
        assert gaussian.epsilon_lower(delta, 0.05) >= plain.epsilon_lower(delta, 0.05)
    assert gaussian.epsilon_lower(1e-5, 0.05) > 2 * plain.epsilon_lower(1e-5, 0.05)


@pytest.mark.parametrize("trials", [0, 1])
def test_nothing_is_shown_by_nothing(trials):
    nothing = Errors(0, trials, 0, trials, gaussian=True)
    assert nothing.epsilon_lower(1e-5, 0.01) == 0.0
    assert one_run_epsilon(0, 0, 4, 1e-5, 0.95) == 0.0


@pytest.mark.parametrize("counts", [(3, 2, 5), (1, 6, 5), (-1, 2, 5)])
def test_counts_that_cannot_be_are_refused(counts):
    with pytest.raises(ConfigurationError, match="at most the next"):
        one_run_p_value(*counts, epsilon=1.0, delta=0.0)
    with pytest.raises(ConfigurationError, match="from 0 to the number of trials"):
        rate_upper(4, 3, 0.05)
    with pytest.raises(ConfigurationError, match=r"between 0\.5 and 1"):
        one_run_epsilon(1, 2, 3, 0.0, 95)
