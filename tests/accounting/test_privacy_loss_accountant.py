"""The privacy loss accountant against exact values, the reference settings and dp_accounting as an oracle."""

from __future__ import annotations

import csv
import json
import math
import statistics
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghostgrad.accounting import (
    AccountingWarning,
    BestOf,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    Opaque,
    PLDAccountant,
    PoissonSampled,
    PRVAccountant,
    RDPAccountant,
    _solvers,
)
from ghostgrad.accounting._closed_forms import gaussian_delta, gaussian_epsilon, sampled_delta, sampled_form
from ghostgrad.accounting._contour import Contour, Steps
from ghostgrad.accounting._convolution import Composition, Convolution, compose
from ghostgrad.accounting._pairs import FixedSize, GaussianBase, Sampled
from ghostgrad.accounting._pilots import mesh_for, pilot_with_tail
from ghostgrad.errors import ConfigurationError

ROWS = list(csv.DictReader((Path(__file__).parent / "reference_epsilons.csv").read_text().splitlines()))
# Three rows hold the mean of the privacy loss where epsilon should be; the test after the grid proves it.
MISTAKEN = "[[0.1, 0.4, 1000000]]"


def _accountant(phases: str, **options: Any) -> PLDAccountant:
    accountant = PLDAccountant(**options)
    for rate, sigma, steps in json.loads(phases):
        accountant.step(noise_multiplier=sigma, sample_rate=rate, steps=steps)
    return accountant


def _floor(row: dict[str, str]) -> float:
    return max(float(row["eps_exact"] or 0.0), float(row["eps_lower"] or 0.0))


def test_reference_grid_is_never_below_truth_within_one_per_cent_and_fast() -> None:
    times = []
    for row in ROWS:
        start = time.process_time()
        epsilon = _accountant(row["phases"]).get_epsilon(float(row["delta"]))
        times.append(time.process_time() - start)
        assert epsilon >= _floor(row), row
        best = float(row["eps_exact"] or row["eps_upper_best_known"])
        if best > 0.01 and row["phases"] != MISTAKEN:
            assert epsilon <= 1.01 * best, row
    assert statistics.median(times) < 0.1
    assert max(times) < 5.0


def test_bounds_bracket_the_truth_on_every_fourth_reference_setting() -> None:
    for row in ROWS[::4]:
        bounds = _accountant(row["phases"]).get_bounds(float(row["delta"]))
        assert bounds.lower <= bounds.upper, row
        if row["eps_exact"]:
            exact = float(row["eps_exact"])
            assert bounds.lower <= exact * (1 + 1e-8) + 1e-12, row
            assert bounds.upper >= exact, row


def test_reference_rows_that_hold_the_mean_loss_are_below_the_truth() -> None:
    """At epsilon = mean loss, delta is about a half, not 1e-6: simulate the mean of a step's loss."""
    rng = np.random.default_rng(0)
    rate, sigma, steps = 0.1, 0.4, 1_000_000
    x = sigma * rng.standard_normal(2_000_000) + (rng.random(2_000_000) < rate)
    loss = np.logaddexp(np.log1p(-rate), np.log(rate) + (2 * x - 1) / (2 * sigma**2))
    row = next(row for row in ROWS if row["phases"] == MISTAKEN)
    assert steps * loss.mean() == pytest.approx(float(row["eps_upper_best_known"]), rel=0.02)
    z = (_accountant(MISTAKEN).get_epsilon(1e-6) - steps * loss.mean()) / (math.sqrt(steps) * loss.std())
    assert z == pytest.approx(4.75, abs=2.5)  # the normal quantile of 1e-6, where the reference has 0


@pytest.mark.parametrize("row", [r for r in ROWS if r["eps_pld_replace_one"]][::3], ids=lambda r: r["phases"][:40])
def test_replace_one_agrees_with_dp_accounting(row: dict[str, str]) -> None:
    accountant = _accountant(row["phases"], neighbouring="replace-one")
    assert accountant.get_bounds(1e-5).neighbouring == "replace-one"
    assert accountant.get_epsilon(float(row["delta"])) == pytest.approx(float(row["eps_pld_replace_one"]), rel=1e-3)


@pytest.mark.parametrize("delta", [1e-3, 1e-8, 1e-12, 1e-30])
@pytest.mark.parametrize(("sigma", "steps"), [(0.4, 1), (1.0, 7), (10.0, 300)])
def test_convolution_is_above_the_exact_gaussian_and_close(sigma: float, steps: int, delta: float) -> None:
    composition = Composition(((Sampled(GaussianBase(sigma), 1.0), steps),))
    lower, upper, _ = Convolution((composition,)).epsilon(delta, with_lower=True)
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    assert lower <= exact <= upper <= exact * (1 + 1e-3)


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize(("rate", "sigma"), [(0.01, 0.5), (0.3, 1.0), (0.9, 3.0)])
def test_convolution_of_one_sampled_step_is_above_its_closed_form(rate: float, sigma: float, remove: bool) -> None:
    composition = Composition(((Sampled(GaussianBase(sigma), rate, remove), 1),))
    for epsilon in (0.0, 0.01, 0.3, 2.0):
        exact = sampled_delta(epsilon, rate, sigma, remove)
        upper = Convolution((composition,)).delta(epsilon)[1]
        assert exact <= upper
        if exact > 1e-3 * sampled_delta(0.0, rate, sigma, remove):  # not at the very end of the losses
            assert upper <= exact * 1.01


def test_fixed_size_sample_has_the_closed_form_of_its_dominating_pair() -> None:
    rate, sigma = 0.05, 3.0
    composition = Composition(((FixedSize(GaussianBase(sigma / 2), rate), 1),))
    for epsilon in (0.0, 0.02, 0.1):
        exact = rate * gaussian_delta(math.log1p(math.expm1(epsilon) / rate), 2.0 / sigma)
        assert exact <= Convolution((composition,)).delta(epsilon)[1] <= exact * 1.01


@pytest.mark.parametrize("sigma", [0.15, 0.26128, 1.0])
@pytest.mark.parametrize("standard", [5.0, 7.55, 9.0])
def test_delta_of_one_release_far_out_is_above_the_truth(sigma: float, standard: float) -> None:
    """The largest losses count there: the window ended where the pilot's last cells have their middles."""
    composition = Composition(((Sampled(GaussianBase(sigma), 1.0), 1),))
    epsilon = (0.5 / sigma + standard) / sigma
    exact = gaussian_delta(epsilon, 1.0 / sigma)
    assert exact <= Convolution((composition,)).delta(epsilon)[1] <= exact * (1.0 + 1e-3)


def test_contour_and_convolution_agree() -> None:
    releases = _solvers.sort_releases({(0.02, 1.5): 700, (0.1, 3.0): 40}, {Gaussian(6.0): 2}, False)
    line, mesh = _solvers.contour(releases), _solvers.convolution(releases, 1e-4)
    assert line is not None
    assert mesh is not None
    for delta in (1e-3, 1e-7, 1e-12):
        exact = line.epsilon(delta)
        assert exact is not None
        assert exact[0] <= mesh.epsilon(delta)[1] <= exact[1] * (1 + 5e-4)


@pytest.mark.parametrize(("rate", "sigma"), [(0.05, 0.07), (0.5, 0.06)])
@pytest.mark.parametrize("delta", [1e-5, 1e-100, 1e-150])
def test_contour_of_one_step_is_its_closed_form_at_any_size_of_its_moments(
    rate: float, sigma: float, delta: float
) -> None:
    """Few steps with little noise have moments beyond 1e154 at the saddle, whose square is no float."""
    steps = Steps(np.array([rate]), np.array([sigma]), np.array([1.0]))
    found, exact = Contour(steps).epsilon(delta), sampled_form(rate, sigma).epsilon(delta)
    assert found is not None
    assert found[0] <= exact[1]
    assert exact[0] <= found[1]
    assert found == pytest.approx(exact, rel=1e-6)


def test_small_deltas_of_many_steps_stay_above_the_truth() -> None:
    """Round-off puts a plain transform below the truth here; the Gaussian limit of rate 1 gives the truth."""
    accountant = PLDAccountant()
    accountant.step(noise_multiplier=300.0, sample_rate=1.0, steps=100_000)
    for delta in (1e-6, 1e-12, 1e-30):
        assert accountant.get_epsilon(delta) >= gaussian_epsilon(math.sqrt(100_000) / 300.0, delta)


def test_memory_stays_below_half_a_gigabyte() -> None:
    accountant = _accountant("[[1e-05, 0.6, 1000000]]")
    tracemalloc.start()
    try:
        bounds = accountant.get_bounds(1e-5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bounds.method == "convolution"
    assert peak < 500e6


@pytest.fixture(scope="module")
def oracle() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")


MIXED: list[tuple[str, list[tuple[Any, int]], Callable[[Any], list[tuple[Any, int]]]]] = [
    ("laplace", [(Laplace(2.0), 10)], lambda o: [(o.from_laplace_mechanism(2.0), 10)]),
    (
        "sampled laplace",
        [(PoissonSampled(0.1, Laplace(1.0)), 50)],
        lambda o: [(o.from_laplace_mechanism(1.0, sampling_prob=0.1), 50)],
    ),
    (
        "training, two metrics and a histogram",
        [(PoissonSampled(0.01, Gaussian(1.0)), 1000), (Opaque(0.5, 1e-8), 2), (Laplace(4.0), 3), (Gaussian(5.0), 2)],
        lambda o: [
            (o.from_gaussian_mechanism(1.0, sampling_prob=0.01), 1000),
            (o.from_privacy_parameters(o.common.DifferentialPrivacyParameters(0.5, 1e-8)), 2),
            (o.from_laplace_mechanism(4.0), 3),
            (o.from_gaussian_mechanism(5.0), 2),
        ],
    ),
]


@pytest.mark.parametrize(("name", "events", "build"), MIXED, ids=[case[0] for case in MIXED])
def test_mixed_ledgers_agree_with_dp_accounting(
    name: str, events: list[tuple[Any, int]], build: Callable[[Any], list[tuple[Any, int]]], oracle: Any
) -> None:
    accountant, renyi = PLDAccountant(), RDPAccountant()
    for event, count in events:
        accountant.record(event, count)
    renyi.ledger = accountant.ledger
    whole = None
    for part, count in build(oracle):
        composed = part.self_compose(count)
        whole = composed if whole is None else whole.compose(composed)
    expected = whole.get_epsilon_for_delta(1e-6)
    bounds = accountant.get_bounds(1e-6)
    assert bounds.upper == pytest.approx(expected, rel=2e-4)
    assert bounds.lower <= bounds.upper <= renyi.get_epsilon(1e-6)


def test_many_distinct_sigmas_are_bucketed_towards_more_loss() -> None:
    accountant = PLDAccountant()
    for sigma in np.linspace(0.8, 1.2, 2000):
        accountant.step(noise_multiplier=float(sigma), sample_rate=0.01)
    bounds = accountant.get_bounds(1e-6)
    assert bounds.method == "contour inversion"
    assert 0.99 * bounds.upper <= bounds.lower < bounds.upper


def test_tiny_sigma_and_tuning_fall_back_to_the_renyi_bound() -> None:
    for event in (PoissonSampled(0.01, Gaussian(0.03)), BestOf(PoissonSampled(0.01, Gaussian(2.0)), 1.0, 0.1)):
        accountant, renyi = PLDAccountant(), RDPAccountant()
        accountant.record(event, 5)
        renyi.record(event, 5)
        assert accountant.get_bounds(1e-5).method == "rdp"
        assert accountant.get_epsilon(1e-5) == renyi.get_epsilon(1e-5)


def test_replace_one_is_answered_by_renyi_where_there_is_no_pair() -> None:
    for event in (
        PoissonSampled(0.1, Laplace(1.0)),
        PoissonSampled(0.1, Gaussian(0.02)),
        BestOf(Gaussian(2.0), 1.0, 0.1),
    ):
        bounds = []
        for accountant in (PLDAccountant(neighbouring="replace-one"), PLDAccountant()):
            accountant.record(event)
            bounds.append(accountant.get_bounds(1e-5))
        assert (bounds[0].neighbouring, bounds[0].method) == ("replace-one", "rdp")
        assert bounds[0].upper > bounds[1].upper
    for kind in (PLDAccountant, RDPAccountant):
        with pytest.raises(ConfigurationError, match="did you mean 'replace-one'"):
            kind(neighbouring="replace_one")


def test_mesh_at_the_limit_of_memory_warns_and_holds() -> None:
    fine = _accountant("[[1e-05, 0.6, 1000000]]").get_epsilon(1e-5)
    with pytest.warns(AccountingWarning, match="limit of memory"):
        assert _accountant("[[1e-05, 0.6, 1000000]]", mesh_points=1 << 15).get_epsilon(1e-5) >= fine


@pytest.mark.filterwarnings("ignore::ghostgrad.accounting.AccountingWarning")
@pytest.mark.parametrize(
    ("rate", "scale", "count", "points"),
    [(0.81, 2.8, 11_450, 1 << 14), (0.81, 0.5, 10**8, 1 << 21), (1.0, 1.0, 10**6, 1 << 15)],
)
def test_a_coarse_mesh_of_many_steps_is_not_below_their_mean_loss(
    rate: float, scale: float, count: int, points: int
) -> None:
    """A mesh moves losses up, here by more in all than the window was wide: the mass came in again from below."""
    x = np.linspace(-40.0 * scale, 1.0 + 40.0 * scale, 1_000_001)
    without = np.exp(-np.abs(x) / scale)
    mixed = (1.0 - rate) * without + rate * np.exp(-np.abs(x - 1.0) / scale)
    mean = count * float(np.log(mixed / without) @ mixed / mixed.sum())
    accountant = PLDAccountant(mesh_points=points)
    accountant.record(PoissonSampled(rate, Laplace(scale)), count)
    assert accountant.get_delta(0.0) > 0.99
    assert accountant.get_epsilon(1e-10) > accountant.get_epsilon(1e-3) > mean


@pytest.mark.filterwarnings("ignore::ghostgrad.accounting.AccountingWarning")
@pytest.mark.parametrize(("rate", "scale", "count", "delta"), [(1e-8, 1.0, 100, 1e-30), (1e-9, 2.0, 10, 1e-40)])
def test_lower_bounds_leave_room_for_the_round_off_of_the_transform(
    rate: float, scale: float, count: int, delta: float
) -> None:
    """Losses this small are read from masses that are round-off only; none is larger than the sum of the largest."""
    accountant = PLDAccountant()
    accountant.record(PoissonSampled(rate, Laplace(scale)), count)
    assert accountant.get_bounds(delta).lower <= count * math.log1p(rate * math.expm1(1.0 / scale))


def test_round_off_is_within_what_is_allowed_for_it() -> None:
    """Masses tilted for one epsilon, and read there and far out, where round-off has hidden some of them."""
    composition = Composition(((Sampled(GaussianBase(20.0), 1.0), 100),))
    pilot = pilot_with_tail(composition, 0.5, 1e-60)
    total = compose(composition, mesh_for(pilot, 0.5, 1e-6), 0.5)
    for epsilon in (0.5, 2.0, 4.3):
        exact, found = gaussian_delta(epsilon, 0.5), total.delta(epsilon)
        assert exact <= found + total.rounding(epsilon, hidden=True)
        assert found - total.rounding(epsilon, hidden=False) <= exact * (1.0 + 1e-2)
    assert total.rounding(0.5, hidden=False) < 1e-12 * gaussian_delta(0.5, 0.5)


def test_nothing_is_confirmed_where_the_renyi_bound_proves_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contour is read to 1e-8 of the moments: of an epsilon of 0 it says 1e-9, and delta was read again and again."""
    accountant = PLDAccountant()
    accountant.step(noise_multiplier=5.0523881915124775, sample_rate=21 / 29227825358, steps=885_073_268)
    monkeypatch.setattr(accountant, "_solve_delta", lambda *_: pytest.fail("delta was read"))
    assert accountant.get_epsilon(8.68e-4) == 0.0


def test_method_of_a_plain_answer_is_named_and_prv_is_the_same() -> None:
    accountant, other = PLDAccountant(), PRVAccountant()
    for held in (accountant, other):
        held.step(noise_multiplier=2.0, sample_rate=1.0, steps=4)
    assert accountant.get_bounds(1e-5).method == "closed form"
    assert accountant.get_epsilon(1e-5) == other.get_epsilon(1e-5)


def test_one_step_with_a_huge_epsilon_and_a_tiny_rate_does_not_overflow_to_private() -> None:
    """(e^epsilon - 1) / rate passes the largest float before epsilon itself is large: delta must not become 0."""
    sigma, rate, delta = 0.02991948149456228, 1.835774133814028e-06, 2.718e-12
    accountant = PLDAccountant()
    accountant.step(noise_multiplier=sigma, sample_rate=rate)
    epsilon = accountant.get_epsilon(delta)
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        shifted = mpmath.log1p(mpmath.expm1(epsilon) / rate)
        mu = 1 / mpmath.mpf(sigma)
        unsampled = mpmath.ncdf(mu / 2 - shifted / mu) - mpmath.exp(shifted) * mpmath.ncdf(-mu / 2 - shifted / mu)
        assert rate * unsampled <= delta
    assert accountant.get_delta(699.0) > 0


@pytest.mark.parametrize(
    ("epsilon", "count", "delta"),
    [
        (1.0, 20, 1e-2),
        (0.1, 1000, 1e-6),
        (0.0016659, 249, 0.0067),
        (0.1, 2, 1e-25),
        (34.0, 1, 1e-2),
        (40.0, 1, 1e-2),
    ],
)
def test_randomised_responses_are_never_below_their_exact_binomial(epsilon: float, count: int, delta: float) -> None:
    """k-fold randomised response (Kairouz, Oh and Viswanath 2015, theorem 3.3): delta by a binomial sum."""
    accountant = PLDAccountant()
    accountant.record(Opaque(epsilon), count)
    found = accountant.get_epsilon(delta)
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(80):
        p = mpmath.exp(epsilon) / (1 + mpmath.exp(epsilon))
        exact = mpmath.mpf(0)
        for times in range(count + 1):
            loss = (2 * times - count) * mpmath.mpf(epsilon)
            mass = mpmath.binomial(count, times) * p**times * (1 - p) ** (count - times)
            exact += max(0, mass * (1 - mpmath.exp(found - loss)))
        assert exact <= delta
    assert found <= epsilon * count * (1 + 1e-2)


@pytest.mark.parametrize("name", [PLDAccountant, RDPAccountant])
def test_what_is_stated_for_adding_a_record_is_not_read_as_replace_one(name: type) -> None:
    accountant = name()
    accountant.record(FixedSizeSampled(1e-9, Gaussian(1000.0)))
    accountant.record(BestOf(Gaussian(1.0), shape=1.0, stop=0.5))
    with pytest.raises(ConfigurationError, match="cannot be restated"):
        accountant.get_epsilon(1e-5)
