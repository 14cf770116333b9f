"""The cost of picking the best of several runs, against dp_accounting's and the papers' forms."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

from ghostgrad.accounting import (
    BestOf,
    Gaussian,
    Laplace,
    PoissonSampled,
    RDPAccountant,
    _curves,
    draw_trials,
    tuned_epsilon,
    tuning_event,
)
from ghostgrad.accounting._curves import MORE_ORDERS, log_expected_trials
from ghostgrad.errors import ConfigurationError


def _run() -> RDPAccountant:
    accountant = RDPAccountant()
    accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    return accountant


@pytest.mark.parametrize(("trials", "shape"), [("poisson", math.inf), ("geometric", 1.0), ("logarithmic", 0.0)])
@pytest.mark.parametrize("mean", [2, 10, 100])
def test_cost_agrees_with_dp_accounting(trials: Any, shape: float, mean: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        events = pytest.importorskip("dp_accounting.dp_event")
        renyi = pytest.importorskip("dp_accounting.rdp.rdp_privacy_accountant")
        step = events.PoissonSampledDpEvent(0.01, events.GaussianDpEvent(1.0))
        other = renyi.RdpAccountant()
        other.compose(events.RepeatAndSelectDpEvent(events.SelfComposedDpEvent(step, 1000), mean, shape))
        expected = other.get_epsilon(1e-5)
    assert tuned_epsilon(_run(), 1e-5, mean_trials=mean, trials=trials) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("trials", ["geometric", "logarithmic", 0.5, 2.0])
@pytest.mark.parametrize("mean", [1.5, 10.0, 1000.0])
def test_number_of_trials_has_the_asked_mean(trials: Any, mean: float) -> None:
    event = tuning_event(Gaussian(1.0), mean_trials=mean, trials=trials)
    assert math.exp(log_expected_trials(event.shape, event.stop)) == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("trials", ["poisson", "geometric", "logarithmic", 2.0])
def test_drawn_trials_have_the_asked_mean(trials: Any) -> None:
    event = tuning_event(Gaussian(1.0), mean_trials=4.0, trials=trials)
    drawn = np.array([draw_trials(event, seed) for seed in range(4000)])
    assert drawn.mean() == pytest.approx(4.0, abs=5 * drawn.std() / math.sqrt(len(drawn)))


def test_more_trials_cost_more_and_one_is_not_free() -> None:
    once = _run().get_epsilon(1e-5)
    costs = [tuned_epsilon(_run(), 1e-5, mean_trials=mean) for mean in (2, 10, 50)]
    assert once < costs[0] < costs[1] < costs[2] < 5 * once
    assert tuned_epsilon(RDPAccountant(), 1e-5, mean_trials=5) == 0.0


@pytest.mark.filterwarnings("ignore::ghostgrad.accounting.AccountingWarning")
@pytest.mark.parametrize("neighbouring", ["add-or-remove-one", "replace-one"])
def test_delta_of_epsilon_of_several_tuned_runs_is_at_most_delta(neighbouring: Any) -> None:
    """Their Renyi curves have several valleys: the orders that gave epsilon were not looked at for delta."""
    accountant = RDPAccountant(neighbouring)
    run = PoissonSampled(0.00038969122074661137, Laplace(0.21031726491613129))
    accountant.record(BestOf(run, math.inf, 18.299), 5)
    for delta in (1e-10, 1e-30, 1e-60, 1e-100):
        assert accountant.get_delta(accountant.get_epsilon(delta)) <= delta


def test_impossible_tuning_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="mean_trials"):
        tuning_event(Gaussian(1.0), mean_trials=0.5, trials="geometric")
    with pytest.raises(ConfigurationError, match="did you mean 'poisson'"):
        tuning_event(Gaussian(1.0), mean_trials=5, trials="poison")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("sigma", [2.0, 300.0, 1e5])
def test_an_order_costs_the_same_whichever_others_are_asked_with_it(shape: float, sigma: float) -> None:
    """The theorems pair each order with any other: one that was asked alone had only itself."""
    accountant = RDPAccountant()
    accountant.record(BestOf(Gaussian(sigma), shape, 0.1))
    orders = np.array([1.5, 2.0, 30.0, 1000.0])
    together = accountant.get_rdp(orders)
    alone = np.concatenate([accountant.get_rdp(orders[i : i + 1]) for i in range(4)])
    beyond = accountant.get_rdp(np.concatenate([orders, MORE_ORDERS]))[:4]
    assert np.array_equal(together, alone)
    assert np.array_equal(together, beyond)


def test_partners_of_an_order_are_the_best_of_the_theorem() -> None:
    """Theorem 2 for a Gaussian: (1 - 1 / b) b / (2 sigma^2) + log(1 / gamma) / b is least at b = sigma sqrt(2 log(1 / gamma))."""
    sigma, gamma = 50.0, 1e-4
    accountant = RDPAccountant()
    accountant.record(BestOf(Gaussian(sigma), 1.0, gamma))
    best = sigma * math.sqrt(-2.0 * math.log(gamma))
    extra = (best - 1.0) / (2.0 * sigma**2) - math.log(gamma) / best
    exact = 20.0 / (2.0 * sigma**2) + 2.0 * extra - math.log(gamma) / 19.0
    assert exact <= float(accountant.get_rdp(np.array([20.0]))[0]) <= exact * (1.0 + 1e-3)


def test_tuning_over_a_noise_schedule_takes_as_few_curves_as_the_run_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RDPAccountant()
    for sigma in np.linspace(0.8, 1.2, 1000):
        run.step(noise_multiplier=float(sigma), sample_rate=0.01)
    curves = []
    real = _curves.sampled_gaussian_curve
    monkeypatch.setattr(_curves, "sampled_gaussian_curve", lambda *given: curves.append(given) or real(*given))
    once = run.get_epsilon(1e-5)
    few = len(curves)
    assert once < tuned_epsilon(run, 1e-5, mean_trials=10) < 2 * once
    assert len(curves) - few <= 3 * few < 1500
