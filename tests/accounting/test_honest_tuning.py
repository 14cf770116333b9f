"""The cost of picking the best of several runs, against dp_accounting's and the papers' forms."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

from ghostgrad.accounting import Gaussian, RDPAccountant, draw_trials, tuned_epsilon, tuning_event
from ghostgrad.accounting._curves import log_expected_trials
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


def test_impossible_tuning_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="mean_trials"):
        tuning_event(Gaussian(1.0), mean_trials=0.5, trials="geometric")
    with pytest.raises(ConfigurationError, match="did you mean 'poisson'"):
        tuning_event(Gaussian(1.0), mean_trials=5, trials="poison")  # type: ignore[arg-type]
