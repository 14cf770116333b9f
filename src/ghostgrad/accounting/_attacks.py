"""From a privacy curve to what an attacker can reach: pairs (epsilon, delta) and the trade-off curve they bound."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import ndtri_exp

from ghostgrad.accounting._closed_forms import gaussian_delta
from ghostgrad.accounting._moments import log_expm1
from ghostgrad.accounting.base import Accountant, AccountingWarning

Array = NDArray[np.float64]

_DELTAS = np.concatenate([10.0 ** np.arange(-15.0, -2.0, 1.0), np.linspace(0.02, 0.98, 25)])


def curve_points(accountant: Accountant) -> tuple[Array, Array]:
    """Pairs ``(epsilon, delta)`` on the privacy curve, from epsilon 0 up; only finite epsilons."""
    points = {0.0: accountant.get_delta(0.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccountingWarning)
        for delta in _DELTAS[points[0.0] > _DELTAS]:
            epsilon = accountant.get_epsilon(float(delta))
            if 0.0 < epsilon < math.inf:
                points[epsilon] = float(delta)
    epsilons = np.array(sorted(points))
    return epsilons, np.array([points[epsilon] for epsilon in epsilons.tolist()])


def missed(epsilons: Array, deltas: Array, false_positives: Array) -> Array:
    """A lower bound of the miss rate at every false positive rate: Dong, Roth and Su (2022), proposition 6."""
    alpha = np.asarray(false_positives, dtype=np.float64)[:, None]
    with np.errstate(over="ignore"):
        steep = 1.0 - deltas - np.exp(epsilons) * alpha
        flat = np.exp(-epsilons) * (1.0 - deltas - alpha)
    return np.asarray(np.maximum(0.0, np.maximum(steep.max(axis=1), flat.max(axis=1))))


def reached(epsilons: Array, least: Array, false_positives: Array) -> Array:
    """An upper bound of what `missed` bounds from below, given lower bounds of delta at ``epsilons``, which begin with 0.

    Between two epsilons delta is at least what it is at the larger, and each of the two lines is highest at the smaller; beyond
    the last delta is at least 0.
    """
    alpha = np.asarray(false_positives, dtype=np.float64)[:, None]
    following = np.append(least[1:], 0.0)
    with np.errstate(over="ignore"):
        steep = 1.0 - following - np.exp(epsilons) * alpha
        flat = np.exp(-epsilons) * (1.0 - following - alpha)
    most = np.maximum(steep.max(axis=1), flat.max(axis=1))
    return np.asarray(np.clip(most, 0.0, 1.0 - alpha[:, 0]))


def lower_points(accountant: Accountant, count: int = 200) -> tuple[Array, Array]:
    """Pairs ``(epsilon, lower bound of delta)``, evenly from epsilon 0 to where the bound is next to nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccountingWarning)
        top = accountant.get_bounds(1e-6).lower
        epsilons = np.linspace(0.0, top if 0.0 < top < math.inf else 1.0, count)
        return epsilons, np.array([accountant.get_delta_bounds(epsilon).lower for epsilon in epsilons.tolist()])


def true_positive_bound(accountant: Accountant, false_positive: float, precision: float = 1e-4) -> float:
    """The largest true positive rate at one false positive rate, by the two lines of `missed` at the best epsilon.

    Every epsilon bounds; a search finds the least bound, to ``precision`` relative to the range of epsilon.
    """

    def steep(epsilon: float) -> float:
        return accountant.get_delta(epsilon) + math.exp(epsilon) * false_positive

    def flat(epsilon: float) -> float:
        return 1.0 - math.exp(-epsilon) * (1.0 - accountant.get_delta(epsilon) - false_positive)

    def least(bound: Callable[[float], float], high: float) -> tuple[float, float]:
        found = minimize_scalar(bound, bounds=(0.0, high), method="bounded", options={"xatol": precision * high})
        return float(found.fun), float(found.x)

    high = -math.log(false_positive)  # beyond, the steep line alone is above 1
    best, where = least(steep, high)
    best = min(best, steep(0.0), 1.0)
    if where < 0.02 * high:  # the best line is a flat one
        best = min(best, least(flat, min(700.0, -math.log(max(1.0 - best, 1e-300))))[0])
    return max(best, false_positive)


def gaussian_above(points: tuple[tuple[float, float], ...], least: float = 0.0) -> float:
    """The smallest mu >= ``least`` whose Gaussian curve is at or above one point, or the chord between two.

    The chord is straight in ``exp(epsilon)``, in which the Gaussian's delta is convex with slope
    ``-Phi(-epsilon / mu - mu / 2)``: they are nearest where the slopes agree.
    """

    def above(mu: float) -> bool:
        if any(gaussian_delta(epsilon, mu) < delta for epsilon, delta in points):
            return False
        return len(points) == 1 or _above_chord(points[0], points[1], mu)

    low, high = least, max(2.0 * least, 1e-6)
    if least > 0.0 and above(least):
        return least
    while not above(high):
        low, high = high, 2.0 * high
    while high - low > 1e-9 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if above(middle) else (middle, high)
    return high


def _above_chord(left: tuple[float, float], right: tuple[float, float], mu: float) -> bool:
    (start, high), (end, low) = left, right
    width = end - start
    if high <= low or width <= 0.0:
        return True
    log_slope = math.log(high - low) - start - float(log_expm1(np.float64(width)))
    if log_slope >= 0.0:  # steeper than any Gaussian curve: its left end decides
        return True
    nearest = min(max(-mu * (float(ndtri_exp(log_slope)) + mu / 2.0), start), end)
    share = math.exp(nearest - end) * -math.expm1(start - nearest) / -math.expm1(-width)
    return gaussian_delta(nearest, mu) >= high + (low - high) * share
