"""From a privacy curve to what an attacker can reach: pairs (epsilon, delta) and the trade-off curve they bound."""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

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


def true_positive_bound(accountant: Accountant, false_positive: float) -> float:
    """The largest true positive rate at one false positive rate, with epsilon refined about the best point."""
    epsilons, deltas = curve_points(accountant)
    coarse = 1.0 - float(missed(epsilons, deltas, np.array([false_positive]))[0])
    with np.errstate(over="ignore"):
        best = int(np.argmin(deltas + np.exp(epsilons) * false_positive))
    low, high = float(epsilons[max(0, best - 1)]), float(epsilons[min(len(epsilons) - 1, best + 1)])
    if high <= low:
        return coarse

    def bound(epsilon: float) -> float:
        return accountant.get_delta(epsilon) + math.exp(min(epsilon, 700.0)) * false_positive

    found = minimize_scalar(bound, bounds=(low, high), method="bounded", options={"xatol": 1e-4 * (high - low)})
    return min(coarse, float(found.fun), 1.0)
