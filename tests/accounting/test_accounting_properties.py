"""What must hold for every ledger, by hypothesis."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghostgrad.accounting import (
    Accountant,
    AccountingWarning,
    BestOf,
    Event,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    Opaque,
    PLDAccountant,
    PoissonSampled,
    RDPAccountant,
)

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


scales = st.floats(0.5, 20.0)
small = st.floats(-3.0, -1.0).map(lambda power: 10.0**power)
opaque = st.builds(Opaque, st.floats(1e-3, 2.0), st.sampled_from([0.0, 1e-14, 1e-9]))
anywhere = st.one_of(st.builds(Gaussian, scales), st.builds(Laplace, scales), opaque)
poisson = st.one_of(
    st.builds(PoissonSampled, small, st.builds(Gaussian, scales)),
    st.builds(PoissonSampled, small, st.builds(Laplace, scales)),
    st.builds(BestOf, st.builds(Gaussian, scales), st.sampled_from([0.0, 0.5, 1.0, float("inf")]), st.just(0.2)),
)
fixed = st.builds(FixedSizeSampled, small, st.builds(Gaussian, scales))
counts = st.integers(1, 200)
ledgers = st.one_of(
    st.lists(st.tuples(st.one_of(anywhere, poisson), counts), min_size=1, max_size=3),
    st.lists(st.tuples(st.one_of(anywhere, fixed), counts), min_size=1, max_size=3),
)
every = pytest.mark.parametrize(
    "kind",
    [
        RDPAccountant,
        lambda: RDPAccountant("replace-one"),
        lambda: PLDAccountant(mesh_points=1 << 18),
        lambda: PLDAccountant("replace-one", mesh_points=1 << 18),
    ],
    ids=["rdp", "rdp replace", "pld", "pld replace"],
)
few = settings(common, max_examples=12)


def _mixed(kind: Callable[[], Accountant], entries: Iterable[tuple[Event, int]]) -> Accountant:
    accountant = kind()
    for event, count in entries:
        accountant.record(event, count)
    return accountant


@every
@few
@given(entries=ledgers, delta=deltas)
@pytest.mark.filterwarnings("ignore::ghostgrad.accounting.AccountingWarning")
def test_mixed_ledgers_keep_delta_of_epsilon_order_and_monotony(
    kind: Callable[[], Accountant], entries: list[tuple[Event, int]], delta: float
) -> None:
    accountant = _mixed(kind, entries)
    epsilon = accountant.get_epsilon(delta)
    assert epsilon >= 0.0
    if epsilon < float("inf"):
        bounds = accountant.get_delta_bounds(epsilon)
        assert 0.0 <= bounds.lower <= bounds.upper <= delta
    assert _mixed(kind, entries[::-1]).get_epsilon(delta) == pytest.approx(epsilon, rel=1e-9, abs=1e-12)
    slack = 1.0 + 1e-2  # two meshes within their tolerance, or a mesh and the Renyi bound that caps it
    assert accountant.get_epsilon(min(0.5, 3.0 * delta)) <= epsilon * slack
    assert _mixed(kind, [(event, 2 * count) for event, count in entries]).get_epsilon(delta) * slack >= epsilon


@pytest.mark.parametrize("neighbouring", ["add-or-remove-one", "replace-one"])
@few
@given(entries=ledgers, delta=deltas)
@pytest.mark.filterwarnings("ignore::ghostgrad.accounting.AccountingWarning")
def test_mixed_bounds_are_ordered_and_renyi_is_above_the_lower(
    neighbouring: Any, entries: list[tuple[Event, int]], delta: float
) -> None:
    bounds = _mixed(lambda: PLDAccountant(neighbouring, mesh_points=1 << 18), entries).get_bounds(delta)
    assert 0.0 <= bounds.lower <= bounds.upper
    assert _mixed(lambda: RDPAccountant(neighbouring), entries).get_epsilon(delta) >= bounds.lower


@both
@few
@given(phase=st.tuples(rates, sigmas, steps), delta=deltas)
@pytest.mark.filterwarnings("ignore::ghostgrad.accounting.AccountingWarning")
def test_replacing_costs_at_least_as_much_as_removing(kind: Any, phase: Phase, delta: float) -> None:
    rate, sigma, count = phase
    costs = []
    for neighbouring in ("add-or-remove-one", "replace-one"):
        accountant = kind(neighbouring)
        accountant.step(noise_multiplier=sigma, sample_rate=rate, steps=count)
        costs.append(accountant.get_epsilon(delta))
    assert costs[0] <= costs[1] * (1.0 + SLACK[kind])
