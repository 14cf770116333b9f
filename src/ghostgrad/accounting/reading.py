"""What an epsilon means: privacy profile, trade-off curve, attack bounds, and what is left of a budget.

Every answer names the neighbouring relation it holds for and the accountant that gave it. With `PLDAccountant` the
bounds are tight; with `RDPAccountant` they are valid and looser; with `GaussianAccountant` they are approximations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ghostgrad.accounting._attacks import (
    curve_points,
    gaussian_above,
    lower_points,
    missed,
    reached,
    true_positive_bound,
)
from ghostgrad.accounting._checks import (
    check_count,
    check_delta,
    check_epsilon,
    check_noise,
    check_positive,
    check_rate,
)
from ghostgrad.accounting.base import Accountant, fresh
from ghostgrad.accounting.calibration import most_steps
from ghostgrad.accounting.ledger import Ledger
from ghostgrad.errors import ConfigurationError, choose

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """One number, what it is, and for which neighbours and by which accountant it holds.

    >>> float(Reading(0.25, "membership advantage", "add-or-remove-one", "pld"))
    0.25
    """

    value: float
    quantity: str
    neighbouring: str
    accountant: str

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.quantity}: {self.value:.6g} ({self.neighbouring}, by {self.accountant})"


@dataclass(frozen=True)
class Curve:
    """Points ``(x[i], y[i])`` of a curve, with the same labels as `Reading`."""

    x: Array
    y: Array
    quantity: str
    neighbouring: str
    accountant: str


def _reading(accountant: Accountant, value: float, quantity: str) -> Reading:
    return Reading(value, quantity, accountant.neighbouring, accountant.mechanism)


def epsilon_over_releases(accountant: Accountant, delta: float, points: int = 40) -> Curve:
    """Return epsilon at ``delta`` over the releases of the ledger, at about ``points`` of them.

    >>> from ghostgrad.accounting import RDPAccountant
    >>> accountant = RDPAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=100)
    >>> epsilon_over_releases(accountant, 1e-5, points=2).x.tolist()
    [0.0, 50.0, 100.0]
    """
    delta, held, total = check_delta(delta), fresh(accountant), len(accountant)
    held.ledger = Ledger()
    marks = np.unique(np.round(np.linspace(0, total, points + 1)).astype(int)).tolist()
    steps, epsilons, done = [0], [0.0], 0
    for event, count in accountant.ledger:
        stops = [mark for mark in marks if done < mark <= done + count]
        for stop in [*stops, done + count]:
            held.record(event, stop - len(held))
            if stop in marks and stop > steps[-1]:
                steps.append(stop)
                epsilons.append(held.get_epsilon(delta))
        done += count
    x, y = np.array(steps, dtype=np.float64), np.array(epsilons, dtype=np.float64)
    return Curve(x, y, f"epsilon at delta {delta:g}", held.neighbouring, held.mechanism)


def privacy_profile(accountant: Accountant, epsilons: Sequence[float] | Array | None = None) -> Curve:
    """Return delta at every epsilon (default: points that span the curve).

    >>> from ghostgrad.accounting import PLDAccountant
    >>> accountant = PLDAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=1.0)
    >>> [round(float(delta), 4) for delta in privacy_profile(accountant, [0.0, 1.0]).y]
    [0.3829, 0.1269]
    """
    if epsilons is None:
        x, y = curve_points(accountant)
    else:
        x = np.array([check_epsilon(epsilon) for epsilon in np.asarray(epsilons, dtype=np.float64).tolist()])
        y = np.array([accountant.get_delta(float(epsilon)) for epsilon in x])
    return Curve(x, y, "delta over epsilon", accountant.neighbouring, accountant.mechanism)


def trade_off(
    accountant: Accountant,
    false_positives: Sequence[float] | Array | None = None,
    *,
    bound: Literal["lower", "upper"] = "lower",
) -> Curve:
    """Return bounds of the least miss rate of an attacker over false positive rates: the f of f-DP.

    Dong, Roth and Su (2022), proposition 6, from points of the privacy curve. The lower bound is what is guaranteed; the upper
    bound says how much of it can be slack of the accounting, and is ``1 - x`` for an accountant without lower bounds. With
    `PLDAccountant` they are about a hundredth apart.

    Args:
        accountant: what was released.
        false_positives: rates in [0, 1]; default 101 of them.
        bound: ``"lower"`` or ``"upper"``. Default ``"lower"``.

    Raises:
        ConfigurationError: a rate outside [0, 1], or another bound.

    >>> from ghostgrad.accounting import PLDAccountant
    >>> accountant = PLDAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=1.0)
    >>> 0.73 < float(trade_off(accountant, [0.05]).y[0]) < 0.7405
    True
    >>> 0.7405 < float(trade_off(accountant, [0.05], bound="upper").y[0]) < 0.75
    True
    """
    choose("bound", bound, ("lower", "upper"))
    grid = np.linspace(0.0, 1.0, 101) if false_positives is None else np.asarray(false_positives, dtype=np.float64)
    for value in grid.tolist():
        check_rate(value, "false_positives")
    y = missed(*curve_points(accountant), grid) if bound == "lower" else reached(*lower_points(accountant), grid)
    quantity = f"{bound} bound of the miss rate over false positive rate"
    return Curve(grid, y, quantity, accountant.neighbouring, accountant.mechanism)


def membership_advantage(accountant: Accountant) -> Reading:
    """Return the largest true minus false positive rate of any membership attack: delta at epsilon 0.

    >>> from ghostgrad.accounting import PLDAccountant
    >>> accountant = PLDAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=1.0)
    >>> round(membership_advantage(accountant).value, 4)
    0.3829
    """
    return _reading(accountant, accountant.get_delta(0.0), "membership advantage")


def tpr_at_fpr(accountant: Accountant, fpr: float) -> Reading:
    """Return the largest true positive rate of any membership attack at false positive rate ``fpr``.

    >>> from ghostgrad.accounting import PLDAccountant
    >>> accountant = PLDAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=1.0)
    >>> 0.2595 <= tpr_at_fpr(accountant, 0.05).value < 0.2600
    True
    """
    fpr = check_delta(fpr, "fpr")
    return _reading(accountant, true_positive_bound(accountant, fpr), f"true positive rate at {fpr:g} false positives")


def posterior_bound(accountant: Accountant, prior: float, failure: float = 1e-5) -> Reading:
    """Return the belief in membership that an attacker with ``prior`` exceeds with probability ``failure`` at most.

    The probability is over the training's noise, with the record in. The loss exceeds e with probability at most
    ``delta(epsilon) / (1 - exp(epsilon - e))``, and the posterior odds are the prior odds times ``exp(loss)``.

    >>> from ghostgrad.accounting import PLDAccountant
    >>> accountant = PLDAccountant()
    >>> accountant.step(noise_multiplier=4.0, sample_rate=1.0)
    >>> 0.5 < posterior_bound(accountant, 0.5).value < 0.8
    True
    """
    prior, failure = check_delta(prior, "prior"), check_delta(failure, "failure")
    shares = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
    loss = min(accountant.get_epsilon(failure * share) - math.log1p(-share) for share in shares)
    odds = math.log(prior) - math.log1p(-prior) + loss
    return _reading(accountant, 1.0 / (1.0 + math.exp(-odds)), f"posterior from prior {prior:g}, except {failure:g}")


def closest_gaussian(accountant: Accountant) -> Reading:
    """Return mu (sensitivity / sigma) of a Gaussian mechanism that is nowhere more private, down to delta 1e-15.

    Guarantee: ``delta(epsilon) <= delta_mu(epsilon)`` for *every* epsilon from 0 to that of delta 1e-15 (``get_epsilon``); beyond
    it nothing is claimed, since a sampled mechanism's far tail is that of its unsampled noise. Delta is convex in
    ``exp(epsilon)``, so that chords between points of the curve are above it, and the Gaussian is held above the chords. Points
    are added where a chord decides, until mu is within 1e-3 of what the points alone ask for (40 times at most).

    >>> from ghostgrad.accounting import PLDAccountant
    >>> accountant = PLDAccountant()
    >>> accountant.step(noise_multiplier=2.0, sample_rate=1.0)
    >>> 0.5 <= closest_gaussian(accountant).value < 0.503
    True
    """
    epsilons, deltas = (part.tolist() for part in curve_points(accountant))
    points = list(zip(epsilons, deltas, strict=True))
    mu = math.inf
    if all(delta < 1.0 for _, delta in points):
        at_points = max(gaussian_above((point,)) for point in points)
        for _ in range(40):
            spans = list(pairwise(points))
            mu, worst = max(((gaussian_above(span, at_points), span) for span in spans), default=(at_points, None))
            if worst is None or mu <= at_points * (1.0 + 1e-3):
                break
            middle = 0.5 * (worst[0][0] + worst[1][0])
            point = (middle, min(worst[0][1], accountant.get_delta(middle)))
            at_points = max(at_points, gaussian_above((point,)))
            points = sorted([*points, point])
    return _reading(accountant, mu, "mu of the closest Gaussian mechanism, for deltas from 1e-15")


def remaining_steps(
    accountant: Accountant, *, target_epsilon: float, delta: float, noise_multiplier: float, sample_rate: float
) -> int:
    """Return how many more such steps the ledger can take before epsilon exceeds ``target_epsilon``; 0 if none.

    Raises:
        ConfigurationError: The steps cost nothing, so there is no limit.

    >>> from ghostgrad.accounting import RDPAccountant
    >>> accountant = RDPAccountant()
    >>> remaining_steps(accountant, target_epsilon=1.0, delta=1e-5, noise_multiplier=1.0, sample_rate=0.001) > 1000
    True
    """
    target, delta = check_positive(target_epsilon, "target_epsilon"), check_delta(delta)
    sigma, rate = check_noise(noise_multiplier), check_rate(sample_rate)
    if rate == 0.0:
        raise ConfigurationError("sample_rate=0.0 costs nothing, so any number of steps remains.")

    def epsilon(count: int) -> float:
        copy = fresh(accountant)
        copy.step(noise_multiplier=sigma, sample_rate=rate, steps=check_count(count))
        return copy.get_epsilon(delta)

    return most_steps(epsilon, target) if epsilon(1) <= target else 0
