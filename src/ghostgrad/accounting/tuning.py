"""Honest tuning: what it costs to try several settings and release the best.

The number of trials is drawn at random, and only the best trial is released; then the cost grows little with the number
of trials (Papernot and Steinke 2022). Running a fixed number k and picking the best costs up to k-fold composition.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy.optimize import brentq

from ghostgrad.accounting._checks import check_delta, check_positive
from ghostgrad.accounting._curves import log_expected_trials
from ghostgrad.accounting.base import Accountant
from ghostgrad.accounting.events import BestOf, Composed, Event, Gaussian, Repeated
from ghostgrad.accounting.rdp import RDPAccountant
from ghostgrad.errors import ConfigurationError, choose

Trials = Literal["poisson", "geometric", "logarithmic"]
_SHAPES = {"poisson": math.inf, "geometric": 1.0, "logarithmic": 0.0}


def tuning_event(event: Event, *, mean_trials: float, trials: Trials | float = "geometric") -> BestOf:
    """Return the event of running ``event`` a random number of times, ``mean_trials`` on average, releasing the best.

    ``trials`` names the distribution: ``"geometric"``, ``"logarithmic"`` (cheaper, more often one trial only),
    ``"poisson"`` (concentrated, cheap for few trials, may be no trial at all), or a number: the shape eta > -1 of a
    truncated negative binomial.

    Guarantee: holds for any rule that picks the best from the trials' outputs, if each trial's settings are drawn
    independently and without looking at the data, and nothing else of the losing trials is released.

    Raises:
        ConfigurationError: The mean cannot be had (truncated negative binomials have at least one trial).

    >>> from ghostgrad.accounting import Gaussian
    >>> tuning_event(Gaussian(2.0), mean_trials=10, trials="geometric").stop
    0.1
    """
    mean = check_positive(mean_trials, "mean_trials")
    shape = float(trials) if isinstance(trials, (int, float)) else _SHAPES[choose("trials", trials, _SHAPES)]
    if math.isinf(shape):
        return BestOf(event, shape, mean)
    if mean <= 1.0:
        raise ConfigurationError(f"mean_trials={mean} is not above 1, the least number of trials drawn by {trials!r}.")
    if shape == 1.0:
        return BestOf(event, shape, 1.0 / mean)
    return BestOf(event, shape, _stop_for(shape, mean))


def _stop_for(shape: float, mean: float) -> float:
    """Gamma of the truncated negative binomial with this mean."""
    BestOf(Gaussian(1.0), shape, 0.5)  # refuses a shape that is none
    low, high = -700.0, math.log1p(-1e-12)

    def excess(log: float) -> float:
        return log_expected_trials(shape, math.exp(log)) - math.log(mean)

    if not excess(low) > 0.0 > excess(high):
        raise ConfigurationError(
            f"mean_trials={mean} cannot be had with shape={shape}; take a mean nearer to 10, or trials='geometric'."
        )
    return math.exp(float(brentq(excess, low, high, xtol=1e-15)))


def tuned_epsilon(
    accountant: Accountant, delta: float, *, mean_trials: float, trials: Trials | float = "geometric"
) -> float:
    """Return epsilon of tuning over runs like the one in ``accountant``'s ledger, by Renyi differential privacy.

    >>> accountant = RDPAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    >>> once, tuned = accountant.get_epsilon(1e-5), tuned_epsilon(accountant, 1e-5, mean_trials=10)
    >>> once < tuned < 2 * once
    True
    """
    delta = check_delta(delta)
    run = Composed(tuple(Repeated(event, count) for event, count in accountant.ledger))
    if not run.events:
        return 0.0
    held = RDPAccountant()
    held.record(tuning_event(run, mean_trials=mean_trials, trials=trials))
    return held.get_epsilon(delta)


def draw_trials(event: BestOf, seed: int | None = None) -> int:
    """Draw the number of trials of ``event``. The draw itself must stay secret.

    >>> from ghostgrad.accounting import Gaussian
    >>> draw_trials(tuning_event(Gaussian(1.0), mean_trials=5, trials="geometric"), seed=0) >= 1
    True
    """
    generator = np.random.default_rng(seed)
    if math.isinf(event.shape):
        return int(generator.poisson(event.stop))
    if event.shape == 1.0:
        return int(generator.geometric(event.stop))
    if event.shape == 0.0:
        return int(generator.logseries(1.0 - event.stop))
    # Truncated at zero by inverting the distribution function term by term (Papernot and Steinke 2022, definition 1).
    shape, ratio = event.shape, 1.0 - event.stop
    mass = (
        shape * ratio / math.expm1(-shape * math.log(event.stop))
        if abs(shape) > 1e-12
        else ratio / -math.log(event.stop)
    )
    left, count = float(generator.random()), 1
    while left > mass and count < 10**9:
        left -= mass
        mass *= ratio * (count + shape) / (count + 1.0)
        count += 1
    return count
