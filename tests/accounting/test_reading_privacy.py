"""Readings against the Gaussian mechanism, for which all of them have closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from ghostgrad.accounting import (
    PLDAccountant,
    RDPAccountant,
    closest_gaussian,
    membership_advantage,
    posterior_bound,
    privacy_profile,
    remaining_steps,
    tpr_at_fpr,
    trade_off,
)
from ghostgrad.accounting._attacks import gaussian_above
from ghostgrad.accounting._closed_forms import gaussian_delta
from ghostgrad.errors import ConfigurationError


@pytest.fixture
def gaussian() -> PLDAccountant:
    accountant = PLDAccountant()
    accountant.step(noise_multiplier=2.0, sample_rate=1.0, steps=4)  # mu = 1
    return accountant


@pytest.fixture
def trained() -> PLDAccountant:
    accountant = PLDAccountant()
    accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    return accountant


def test_trade_off_is_below_the_exact_curve_and_close(gaussian: PLDAccountant) -> None:
    curve = trade_off(gaussian)
    exact = ndtr(ndtri(1.0 - curve.x) - 1.0)
    assert (curve.y <= exact + 1e-12).all()
    assert (curve.y >= exact - 0.005).all()
    assert curve.neighbouring == "add-or-remove-one"


def test_upper_trade_off_is_above_the_exact_curve_and_close(gaussian: PLDAccountant) -> None:
    curve = trade_off(gaussian, bound="upper")
    exact = ndtr(ndtri(1.0 - curve.x) - 1.0)
    assert (curve.y >= exact - 1e-12).all()
    assert (curve.y <= exact + 0.01).all()


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 0.01, 1000), (0.6, 0.3, 50), (4.0, 0.5, 1)])
def test_bounds_of_the_trade_off_enclose_little(sigma: float, rate: float, steps: int) -> None:
    accountant = PLDAccountant()
    accountant.step(noise_multiplier=sigma, sample_rate=rate, steps=steps)
    lower, upper = trade_off(accountant), trade_off(accountant, bound="upper")
    assert (lower.y <= upper.y + 1e-12).all()
    assert (upper.y - lower.y).max() < 0.015
    assert (upper.y <= 1.0 - upper.x + 1e-12).all()


def test_without_lower_bounds_of_delta_the_upper_trade_off_is_that_of_guessing() -> None:
    accountant = RDPAccountant()
    accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    curve = trade_off(accountant, bound="upper")
    assert curve.y == pytest.approx(1.0 - curve.x)


def test_an_unknown_bound_of_the_trade_off_is_refused(gaussian: PLDAccountant) -> None:
    with pytest.raises(ConfigurationError, match="lower"):
        trade_off(gaussian, bound="exact")


def test_attack_bounds_are_those_of_the_gaussian(gaussian: PLDAccountant) -> None:
    assert membership_advantage(gaussian).value == pytest.approx(2 * ndtr(0.5) - 1, rel=1e-6)
    for fpr in (0.001, 0.05, 0.4):
        exact = ndtr(ndtri(fpr) + 1.0)
        assert exact <= tpr_at_fpr(gaussian, fpr).value <= exact * 1.002
    assert 1.0 <= closest_gaussian(gaussian).value <= 1.005  # held above chords, so a little more
    # The loss is N(1/2, 1), so its quantile is known.
    loss = 0.5 + ndtri(1 - 1e-4)
    exact = 1 / (1 + math.exp(-loss))
    assert exact <= posterior_bound(gaussian, 0.5, 1e-4).value <= 1.01 * exact


def test_closest_gaussian_is_above_the_whole_curve_and_not_far(trained: PLDAccountant) -> None:
    mu = closest_gaussian(trained).value
    epsilons = np.linspace(0.0, trained.get_epsilon(1e-15), 97)
    ratios = [trained.get_delta(float(epsilon)) / gaussian_delta(float(epsilon), mu) for epsilon in epsilons]
    assert 0.9 < max(ratios) <= 1.0


@pytest.mark.parametrize("points", [((0.0, 0.3), (2.0, 0.01)), ((0.5, 0.1), (0.6, 1e-9)), ((0.0, 1e-4), (9.0, 1e-12))])
def test_gaussian_is_held_above_a_chord_and_touches_it(points: tuple[tuple[float, float], tuple[float, float]]) -> None:
    (start, high), (end, low) = points
    mu = gaussian_above(points)
    x = np.linspace(math.exp(start), math.exp(end), 4001)
    chord = high + (low - high) * (x - x[0]) / (x[-1] - x[0])
    room = np.array([gaussian_delta(math.log(value), mu) for value in x]) - chord
    assert room.min() >= -1e-12
    assert (np.array([gaussian_delta(math.log(value), 0.999 * mu) for value in x]) - chord).min() < 0.0


def test_profile_has_both_ends(trained: PLDAccountant) -> None:
    curve = privacy_profile(trained)
    assert curve.x[0] == 0.0
    assert (np.diff(curve.x) > 0).all()
    assert (np.diff(curve.y) < 0).all()
    with pytest.raises(ConfigurationError, match="epsilon=-1"):
        privacy_profile(trained, [-1.0])


def test_a_looser_accountant_reads_looser(trained: PLDAccountant) -> None:
    renyi = RDPAccountant()
    renyi.ledger = trained.ledger
    assert membership_advantage(renyi).value >= membership_advantage(trained).value
    assert (trade_off(renyi).y <= trade_off(trained).y + 1e-9).all()
    assert "by rdp" in str(membership_advantage(renyi))


def test_replace_one_is_named(trained: PLDAccountant) -> None:
    other = PLDAccountant(neighbouring="replace-one")
    other.ledger = trained.ledger
    reading = membership_advantage(other)
    assert reading.neighbouring == "replace-one"
    assert reading.value > membership_advantage(trained).value


def test_remaining_steps_fill_the_budget_and_no_more(trained: PLDAccountant) -> None:
    left = remaining_steps(trained, target_epsilon=2.0, delta=1e-5, noise_multiplier=1.0, sample_rate=0.01)
    assert left > 0
    assert len(trained) == 1000
    trained.step(noise_multiplier=1.0, sample_rate=0.01, steps=left)
    assert trained.get_epsilon(1e-5) <= 2.0
    trained.step(noise_multiplier=1.0, sample_rate=0.01)
    assert trained.get_epsilon(1e-5) > 2.0
    assert remaining_steps(trained, target_epsilon=2.0, delta=1e-5, noise_multiplier=1.0, sample_rate=0.01) == 0
