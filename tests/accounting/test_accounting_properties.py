"""What must hold for every ledger, by hypothesis."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghostgrad.accounting import Accountant, AccountingWarning, PLDAccountant, RDPAccountant

Phase = tuple[float, float, int]

sigmas = st.floats(0.3, 10.0)
rates = st.floats(-4.0, 0.0).map(lambda power: 10.0**power)
steps = st.floats(0.0, 4.0).map(lambda power: int(10.0**power))
deltas = st.floats(-12.0, -2.0).map(lambda power: 10.0**power)
phases = st.lists(st.tuples(rates, sigmas, steps), min_size=1, max_size=3)
both = pytest.mark.parametrize("kind", [RDPAccountant, PLDAccountant])
# Mesh and contour answer within this of each other; the Renyi answers are monotone to rounding.
SLACK = {RDPAccountant: 1e-9, PLDAccountant: 3e-4}
common = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def _held(kind: type[Accountant], entries: Iterable[Phase]) -> Accountant:
    accountant = kind()
    for rate, sigma, count in entries:
        accountant.step(noise_multiplier=sigma, sample_rate=rate, steps=count)
    return accountant


def _epsilon(kind: type[Accountant], entries: Iterable[Phase], delta: float) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccountingWarning)
        return _held(kind, entries).get_epsilon(delta)


@both
@common
@given(entries=phases, delta=deltas)
def test_delta_of_epsilon_is_at_most_delta(kind: type[Accountant], entries: list[Phase], delta: float) -> None:
    epsilon = _epsilon(kind, entries, delta)
    assert epsilon >= 0.0
    assert _held(kind, entries).get_delta(epsilon) <= delta


@both
@common
@given(phase=st.tuples(rates, sigmas, steps), delta=deltas, factor=st.floats(1.01, 4.0))
def test_epsilon_falls_with_sigma_and_delta_and_rises_with_rate_and_steps(
    kind: type[Accountant], phase: Phase, delta: float, factor: float
) -> None:
    rate, sigma, count = phase
    slack = 1.0 + SLACK[kind]
    base = _epsilon(kind, [phase], delta)
    assert _epsilon(kind, [(rate, factor * sigma, count)], delta) <= base * slack
    assert _epsilon(kind, [phase], min(0.5, factor * delta)) <= base * slack
    assert _epsilon(kind, [(min(1.0, factor * rate), sigma, count)], delta) * slack >= base
    assert _epsilon(kind, [(rate, sigma, 2 * count)], delta) * slack >= base


@both
@common
@given(entries=phases, delta=deltas)
def test_order_of_phases_does_not_matter(kind: type[Accountant], entries: list[Phase], delta: float) -> None:
    there, back = _epsilon(kind, entries, delta), _epsilon(kind, entries[::-1], delta)
    assert there == pytest.approx(back, rel=1e-9, abs=1e-12)


@common
@given(entries=phases, delta=deltas)
def test_bounds_are_ordered_and_renyi_is_above_the_lower(entries: list[Phase], delta: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccountingWarning)
        bounds = _held(PLDAccountant, entries).get_bounds(delta)
        renyi = _held(RDPAccountant, entries).get_epsilon(delta)
    assert 0.0 <= bounds.lower <= bounds.upper
    assert renyi >= bounds.lower
