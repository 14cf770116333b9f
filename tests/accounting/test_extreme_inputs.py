"""Whatever the input: an answer that is not too low, or an error that says what is wrong."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ghostgrad.accounting import (
    AccountingWarning,
    BestOf,
    Composed,
    Event,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    Ledger,
    Opaque,
    PLDAccountant,
    PoissonSampled,
    RDPAccountant,
    Repeated,
    create_accountant,
    event_from_json,
    get_noise_multiplier,
    make_plan,
    tuning_event,
)
from ghostgrad.errors import ConfigurationError

EXTREME: list[list[tuple[Event, int]]] = [
    [(PoissonSampled(2e-5, Gaussian(1.33)), 65_934_948)],
    [(PoissonSampled(0.03, Laplace(0.37)), 220_418_654_319), (Repeated(Gaussian(5e82), 5709), 37_536)],
    [(PoissonSampled(0.024, Laplace(20.7)), 98_664), (Repeated(Opaque(1e-17), 938), 55_834_770_541)],
    [(PoissonSampled(0.0028, Gaussian(0.59)), 15_122_336_355)],
    [(FixedSizeSampled(0.2, Gaussian(0.9999999999999999)), 8_580_995)],
    [(FixedSizeSampled(1e-300, Gaussian(0.8)), 4_495_875), (Composed((Laplace(0.78), Laplace(1.0))), 22_357_826)],
    [(BestOf(PoissonSampled(0.014, Gaussian(1.34)), 1e-300, 5e-324), 2)],
    [(BestOf(Gaussian(2.0), -1e-17, 0.1), 1)],
    [(FixedSizeSampled(2e-5, Gaussian(1e160)), 85_477_813_027)],
    [(Gaussian(2e188), 631_714_152_481), (PoissonSampled(0.016, Gaussian(1e-160)), 174)],
    [(PoissonSampled(0.5, Gaussian(1e160)), 1), (PoissonSampled(5e-324, Gaussian(1.0)), 7)],
    [(Gaussian(5e-324), 1)],
    [(Laplace(5e-324), 1), (Opaque(1.7e308), 3)],
    [(PoissonSampled(2.7e-4, Laplace(5e-324)), 1)],
    [(PoissonSampled(5e-324, Opaque(705.0)), 2)],
    [(Opaque(1e300), 490)],
    [(FixedSizeSampled(0.2, Gaussian(1e160)), 3)],
    [(FixedSizeSampled(1.2e-18, Gaussian(1.1)), 3794)],
    [(FixedSizeSampled(2.8e-26, Gaussian(0.5)), 4)],
    [(BestOf(Opaque(0.957), math.inf, 18.4), 439)],
]


@pytest.mark.parametrize("delta", [5e-324, 1e-100, 1e-6, 1.0 - 1e-16])
@pytest.mark.parametrize(
    "kind",
    [
        RDPAccountant,
        lambda: PLDAccountant(mesh_points=1 << 14),
        lambda: PLDAccountant("replace-one", mesh_points=1 << 14),
    ],
)
@pytest.mark.parametrize("entries", EXTREME, ids=lambda entries: repr(entries)[:50])
def test_extreme_ledgers_are_answered(entries: list[tuple[Event, int]], kind: Callable[[], Any], delta: float) -> None:
    accountant = kind()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccountingWarning)
        for event, count in entries:
            accountant.record(event, count)
        bounds = accountant.get_bounds(delta)
        assert 0.0 <= bounds.lower <= bounds.upper
        if math.isfinite(bounds.upper):
            assert accountant.get_delta(bounds.upper) <= delta
        for epsilon in (0.0, 1e-300, 1.0, 1.7e308):
            assert 0.0 <= accountant.get_delta(epsilon) <= 1.0


@pytest.mark.filterwarnings("ignore::ghostgrad.accounting.AccountingWarning")
def test_the_renyi_bound_answers_where_contours_are_at_their_end() -> None:
    accountants = [RDPAccountant(), PLDAccountant(mesh_points=1 << 14)]
    for accountant in accountants:
        accountant.step(noise_multiplier=0.05226, sample_rate=0.0849, steps=20_116_065)
        accountant.step(noise_multiplier=3.79e7, sample_rate=0.9999999999999881, steps=5571)
    assert accountants[1].get_epsilon(2.4e-11) <= accountants[0].get_epsilon(2.4e-11) < math.inf


@pytest.mark.parametrize("kind", [RDPAccountant, PLDAccountant])
def test_a_delta_within_rounding_of_the_failure_mass_costs_the_pure_epsilon(kind: Callable[[], Any]) -> None:
    accountant = kind()
    accountant.record(Opaque(0.005, 0.6559229491176292), 31)
    delta = accountant.get_delta(1e4)
    for _ in range(4):
        assert accountant.get_epsilon(delta) == pytest.approx(31 * 0.005, rel=1e-9)
        delta = math.nextafter(delta, 1.0)


@pytest.mark.parametrize(("event", "least"), [(Gaussian(1.0), 38.0), (PoissonSampled(0.5, Gaussian(7.1656)), 4.6)])
def test_the_smallest_float_as_delta_is_read_by_logarithms(event: Event, least: float) -> None:
    accountants = [RDPAccountant(), PLDAccountant()]
    for accountant in accountants:
        accountant.record(event)
    renyi, tight = (accountant.get_epsilon(5e-324) for accountant in accountants)
    assert least < tight <= renyi
    assert accountants[1].get_delta(tight) <= 5e-324


@pytest.mark.parametrize("sigma", [1e11, 1e40, 1e140])
def test_epsilon_of_much_noise_scales_with_it(sigma: float) -> None:
    accountant = PLDAccountant()
    accountant.record(Gaussian(sigma))
    bounds = accountant.get_bounds(1e-5 / sigma)
    lower, upper = (
        math.exp(-c * c / 2.0) / math.sqrt(2.0 * math.pi)
        - c * math.erfc(c / math.sqrt(2.0)) / 2.0  # delta sigma, mu to 0
        for c in (sigma * bounds.lower, sigma * bounds.upper)
    )
    assert upper <= 1e-5 <= lower == pytest.approx(1e-5, rel=1e-6)


def test_noise_beyond_the_range_of_squares_leaves_a_trace() -> None:
    for sigma in (1e100, 1e155, 1e161, 1e300):
        for name in ("rdp", "pld"):
            accountant = create_accountant(name)
            accountant.step(noise_multiplier=sigma, sample_rate=1.0)
            assert accountant.get_delta(0.0) >= 0.39 / sigma  # total variation is mu / sqrt(2 pi)


@pytest.mark.parametrize("scale", [1e3, 1e9, 1e15])
def test_weak_laplace_noise_and_responses_are_not_rounded_to_nothing(scale: float) -> None:
    for event in (Laplace(scale), Opaque(1.0 / scale)):
        accountant = RDPAccountant()
        accountant.record(event, 10)
        assert accountant.get_delta(0.0) >= 0.25 / scale
        order = np.array([1.5, 2.0, 30.0])
        slope = accountant.get_rdp(order) / (10 * order / 2.0 / scale**2)  # the Renyi divergence of small losses
        assert slope == pytest.approx(np.ones(3), rel=0.05)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Ledger().append(Gaussian(1.0), 10**400), "2\\*\\*53"),
        (lambda: Ledger().append(Repeated(Repeated(Gaussian(1.0), 2**50), 2**50), 2**50), "2\\*\\*53"),
        (lambda: Ledger().append(_nested(5000)), "nested too deeply"),
        (lambda: event_from_json(_nested_json(5000)), "nested too deeply"),
        (lambda: Ledger.from_json("[" * 100_000), "not JSON"),
        (lambda: Ledger.from_json(None), "not JSON"),  # type: ignore[arg-type]
        (lambda: event_from_json({"type": "Composed", "events": 5}), "not a sequence"),
        (lambda: event_from_json({"type": "Repeated", "event": 5, "count": 2}), "no 'type'"),
        (lambda: BestOf(Gaussian(1.0), "1", 0.5), "shape='1'"),  # type: ignore[arg-type]
        (lambda: Gaussian(10**400), "not finite"),
        (lambda: RDPAccountant().load_state_dict({"history": 5, "mechanism": "rdp"}), "history=5"),
        (lambda: tuning_event(Gaussian(1.0), mean_trials=1e308, trials=0.5), "cannot be had"),
        (lambda: tuning_event(Gaussian(1.0), mean_trials=5, trials=-2.0), "not above -1"),
        (
            lambda: get_noise_multiplier(target_epsilon=1.0, target_delta=1e-5, sample_rate=0.1, epochs=1e300),
            "more than can be counted",
        ),
        (
            lambda: make_plan(dataset_size=10**9, batch_size=32, epochs=1e300, epsilon=0.1, delta=1e-10),
            "more than can be counted",
        ),
        (lambda: PLDAccountant(tolerance=0.0), "tolerance=0.0"),
    ],
)
def test_impossible_input_is_explained(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        call()


def _nested(depth: int) -> Event:
    event: Event = Gaussian(1.0)
    for _ in range(depth):
        event = Repeated(event, 1)
    return event


def _nested_json(depth: int) -> dict[str, Any]:
    plain: dict[str, Any] = {"type": "Gaussian", "sigma": 1.0}
    for _ in range(depth):
        plain = {"type": "Repeated", "event": plain, "count": 1}
    return plain


@pytest.mark.parametrize("shape", [1e-300, -1e-17, 1e-13, 1e-9])
def test_a_shape_next_to_nothing_is_the_logarithmic_one(shape: float) -> None:
    costs = []
    for eta in (0.0, shape):
        accountant = RDPAccountant()
        accountant.record(BestOf(Gaussian(2.0), eta, 0.1))
        costs.append(accountant.get_epsilon(1e-5))
    assert costs[1] == pytest.approx(costs[0], rel=1e-6)


@pytest.mark.parametrize("name", ["rdp", "pld"])
def test_calibrating_on_a_spent_ledger_of_many_entries_takes_seconds(name: str) -> None:
    spent = create_accountant(name)
    for sigma in np.linspace(0.8, 1.5, 100_000):
        spent.step(noise_multiplier=float(sigma), sample_rate=0.001)
    start = time.process_time()
    sigma = get_noise_multiplier(target_epsilon=3.0, target_delta=1e-5, sample_rate=0.001, steps=1000, accountant=spent)
    assert time.process_time() - start < 10.0
    assert len(spent) == 100_000
    spent.step(noise_multiplier=sigma, sample_rate=0.001, steps=1000)
    assert 3.0 * (1 - 1e-3) <= spent.get_epsilon(1e-5) <= 3.0


def test_the_renyi_fallback_of_the_privacy_loss_accountant_warns_when_loose() -> None:
    event = BestOf(PoissonSampled(1e-7, Gaussian(500.0)), shape=1.0, stop=0.1)
    for kind in (RDPAccountant, PLDAccountant):
        accountant = kind()
        accountant.record(event)
        with pytest.warns(AccountingWarning, match="an end of the orders"):
            accountant.get_epsilon(1e-12)
