"""Renyi curves: ``K(a) = log E_Q[(P / Q)^a] = (a - 1) * RDP(a)`` of every event on a grid of orders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from ghostgrad.accounting._checks import precision
from ghostgrad.accounting._moments import (
    log_binomial_excess,
    log_expm1,
    log_moment,
    log_replace_moment,
    through_the_middle,
)
from ghostgrad.accounting.events import (
    BestOf,
    Event,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    Opaque,
    PoissonSampled,
)
from ghostgrad.accounting.ledger import Ledger
from ghostgrad.errors import ConfigurationError

Array = NDArray[np.float64]

MAX_EXACT_PAIRS = 64  # distinct (rate, sigma) up to which every one is computed
_SIGMA_NODES = 128
_KAPPA = 5.0
_SIGMAS = (1e-70, 1e70)  # beyond, squares leave the range of floats


def _grid() -> Array:
    near_one, low = 1.0 + np.geomspace(1e-5, 0.3, 130)[:-1], 1.0 + np.geomspace(0.3, 63.0, 580)[:-1]
    high = np.unique(np.round(np.geomspace(64.0, 4096.0, 58)))
    grid: Array = np.concatenate([near_one, low, high])
    grid.setflags(write=False)
    return grid


ORDERS = _grid()
"""The orders of the first look: geometric in ``a - 1`` (8 %, from 1.3 on 0.9 %), whole from 64 to 4096 (7 %)."""

MORE_ORDERS = np.round(4096.0 * 2.0 ** np.arange(0.5, 6.1, 0.5))
"""Orders looked at only when the best of `ORDERS` is its last."""
MORE_ORDERS.setflags(write=False)


@lru_cache(maxsize=2048)
def _cached_moment(rate: float, sigma: float, more: bool, replace: bool) -> Array:
    curve = (log_replace_moment if replace else log_moment)(MORE_ORDERS if more else ORDERS, rate, sigma)
    curve.setflags(write=False)
    return curve


def sampled_gaussian_curve(rate: float, sigma: float, orders: Array, replace: bool = False) -> Array:
    """``K`` of one Poisson-sampled Gaussian, cached on the two standard grids of orders."""
    if sigma < _SIGMAS[0]:
        return np.full(len(orders), np.inf)
    sigma = min(sigma, _SIGMAS[1])  # less noise costs more
    if orders is ORDERS or orders is MORE_ORDERS:
        return _cached_moment(rate, sigma, orders is MORE_ORDERS, replace)
    return (log_replace_moment if replace else log_moment)(orders, rate, sigma)


def _laplace_curve(scale: float, orders: Array) -> Array:
    """Mironov (2017), table II: ``log((a exp((a - 1) b) + (a - 1) exp(-a b)) / (2 a - 1))``, b = 1 / scale.

    Small b without cancellation: the linear terms of the two exponentials add up to nothing.
    """
    a, b = orders, 1.0 / scale
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.log1p((a * _beyond_linear((a - 1) * b) + (a - 1) * _beyond_linear(-a * b)) / (2 * a - 1))
        far = np.logaddexp(np.log(a / (2 * a - 1)) + (a - 1) * b, np.log((a - 1) / (2 * a - 1)) - a * b)
    return np.asarray(np.maximum(np.where(a * b < 30.0, near, far), 1e-300))


def _beyond_linear(y: Array) -> Array:
    """``exp(y) - 1 - y``, to full relative precision."""
    series = y * y / 2.0 * (1.0 + y / 3.0 * (1.0 + y / 4.0 * (1.0 + y / 5.0 * (1.0 + y / 6.0 * (1.0 + y / 7.0)))))
    return np.asarray(np.where(np.abs(y) < 0.02, series, np.expm1(y) - y))


def _opaque_curve(epsilon: float, orders: Array) -> Array:
    """Randomised response dominates every epsilon-DP release (Kairouz, Oh and Viswanath 2015).

    ``K(a) = log(cosh((a - 1/2) epsilon) / cosh(epsilon / 2))``, by the product form of a difference of cosines.
    """
    if epsilon > 1e250:
        return np.full(len(orders), np.inf)
    half = epsilon / 2.0
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.log1p(2.0 * np.sinh(orders * half) * np.sinh((orders - 1.0) * half) / np.cosh(half))
        far = np.logaddexp(orders * epsilon, (1.0 - orders) * epsilon) - np.logaddexp(0.0, epsilon)
    return np.asarray(np.maximum(np.where(orders * epsilon < 30.0, near, far), 1e-300))


def _sampled_laplace_curve(rate: float, scale: float, orders: Array) -> Array:
    """Whole orders by the binomial sum; between them chords, since ``K`` is convex in the order."""
    top = int(np.ceil(orders.max()))
    moments = np.zeros(top + 1)
    moments[2:] = _laplace_curve(scale, np.arange(2.0, top + 1))
    whole = np.unique(np.concatenate([[2.0], np.ceil(orders), np.maximum(np.floor(orders), 2.0)]))
    curve = np.logaddexp(0.0, log_binomial_excess(whole, rate, moments))
    return np.asarray(np.interp(orders, np.concatenate([[1.0], whole]), np.concatenate([[0.0], curve])))


def _fixed_size_curve(rate: float, sigma: float, orders: Array) -> Array:
    """Replace-one, sampling without replacement.

    Zhu, Dong and Wang (2022), proposition 30: ``((1-q)Q + qP, Q)`` dominates above ratio 1 and its mirror image below,
    with (P, Q) at the doubled sensitivity. Each half of the Renyi moment is at most that of the larger direction, so
    ``A - 1`` at most doubles.
    """
    half = sigma / 2.0
    if rate == 1.0:
        return orders * (orders - 1.0) * (precision(half) / 2.0)
    excess = log_expm1(np.maximum(sampled_gaussian_curve(rate, half, orders), 1e-300))
    return np.asarray(np.logaddexp(0.0, math.log(2.0) + excess))


def _best_of_curve(event: BestOf, orders: Array) -> Array:
    """Papernot and Steinke (2022): theorem 2 (truncated negative binomial) and theorem 6 (Poisson)."""
    inner, (others, paired) = _trial_curve(event, orders), _partners(event)
    if math.isinf(event.shape):
        # Theorem 6 wants (epsilon', delta')-DP of the base with exp(epsilon') <= 1 + 1 / (a - 1), at every order a.
        limit = np.log1p(1.0 / (orders - 1.0))
        log_deltas = np.array([np.min(log_delta_curve(others, paired, limit_a)) for limit_a in limit])
        with np.errstate(under="ignore"):
            misses = event.stop * np.exp(np.minimum(log_deltas, 0.0))
        return np.asarray(inner + (orders - 1.0) * misses + max(math.log(event.stop), 0.0))
    eta, gamma = event.shape, event.stop
    extra = (1.0 + eta) * np.min((1.0 - 1.0 / others) * paired / (others - 1.0) - np.log(gamma) / others)
    return np.asarray(inner + (orders - 1.0) * extra + log_expected_trials(eta, gamma))


def _trial_curve(event: BestOf, orders: Array) -> Array:
    trial = Ledger()
    trial.append(event.event)
    return total_curve(trial.sampled_gaussians(), trial.others(), orders)


@lru_cache(maxsize=64)
def _partners(event: BestOf) -> tuple[Array, Array]:
    """Orders and ``K`` of one trial, with which the theorems pair any order: always these, so that all grids agree."""
    curve = _trial_curve(event, ORDERS)
    if curve[-1] > 12.0 * (ORDERS[-1] - 1.0):
        # Further orders prove no epsilon below 12, and theorem 6 asks for at most log(1 + 1e5) of them.
        return ORDERS, curve
    return np.concatenate([ORDERS, MORE_ORDERS]), np.concatenate([curve, _trial_curve(event, MORE_ORDERS)])


def log_expected_trials(shape: float, stop: float) -> float:
    """Log of the mean number of trials of `BestOf` (Papernot and Steinke 2022, definition 1).

    >>> round(math.exp(log_expected_trials(1.0, 0.1)), 12)
    10.0
    """
    log_stop = math.log(stop)
    if math.isinf(shape):
        return log_stop
    start = math.log1p(-stop) - log_stop
    if abs(shape) < 1e-12:  # the limit, the logarithmic distribution
        return start - math.log(-log_stop)
    power = shape * log_stop  # 1 - stop^shape has the sign of the shape
    return start + math.log(abs(shape)) - (math.log(-math.expm1(power)) if power < 0.0 else _log_expm1(power))


def _log_expm1(y: float) -> float:
    return float(log_expm1(np.float64(y)))


def event_curve(event: Event, orders: Array) -> Array:
    """``K(a)`` of one atomic event; infinite where there is no noise. Mass at infinity of `Opaque` is not in it."""
    if isinstance(event, Gaussian):
        return orders * (orders - 1.0) * (precision(event.sigma) / 2.0)
    if isinstance(event, Laplace):
        return _laplace_curve(event.scale, orders)
    if isinstance(event, Opaque):
        return _opaque_curve(event.epsilon, orders)
    if isinstance(event, BestOf):
        return _best_of_curve(event, orders)
    if isinstance(event, PoissonSampled) and isinstance(event.event, Laplace):
        return _sampled_laplace_curve(event.rate, event.event.scale, orders)
    if isinstance(event, (PoissonSampled, FixedSizeSampled)) and isinstance(event.event, Gaussian):
        if event.event.sigma == 0.0:
            return np.full(len(orders), np.inf)
        if isinstance(event, FixedSizeSampled):
            return _fixed_size_curve(event.rate, event.event.sigma, orders)
        return sampled_gaussian_curve(event.rate, event.event.sigma, orders)
    raise ConfigurationError(
        f"{event!r} has no Renyi curve; record Opaque(epsilon, delta) with the guarantee you know."
    )


def total_curve(
    sampled: Mapping[tuple[float, float], int], others: Mapping[Event, int], orders: Array, replace: bool = False
) -> Array:
    """``K`` of a whole ledger: curves add under composition.

    With ``replace`` for replacing a record; `readable_others` has restated what has a tighter form of its own then.
    """
    total = np.zeros(len(orders))
    for event in sorted(others, key=repr):  # so that the order of releases cannot change the rounding
        restate = replace and isinstance(event, (PoissonSampled, BestOf))
        one = through_the_middle(partial(event_curve, event), orders) if restate else event_curve(event, orders)
        with np.errstate(over="ignore"):
            total = total + others[event] * one
    if not sampled:
        return total
    table = np.array([(rate, sigma, count) for (rate, sigma), count in sampled.items()], dtype=np.float64)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]  # so that the order of steps cannot change the rounding
    if (table[:, 1] < _SIGMAS[0]).any():
        return np.full(len(orders), np.inf)
    if len(table) <= MAX_EXACT_PAIRS:
        for rate, sigma, count in table:
            total = total + count * sampled_gaussian_curve(float(rate), float(sigma), orders, replace)
        return total
    if replace:  # few nodes bound many curves for removing a record; from there
        return total + through_the_middle(partial(total_curve, sampled, {}), orders)
    return total + _many_curves(table[:, 0], np.clip(table[:, 1], *_SIGMAS) ** -2.0, table[:, 2], orders)


def _nodes_and_weights(values: Array, most: int) -> tuple[Array, NDArray[np.intp], Array]:
    """Interpolation nodes over ``values``, the cell of every value and its linear weight towards the upper node."""
    distinct = np.unique(values)
    if len(distinct) <= most:
        return distinct, np.searchsorted(distinct, values), np.zeros(len(values))
    dense = np.geomspace(distinct[0], distinct[-1], 4096)
    measure = np.log(dense) + _KAPPA * dense  # even steps in log s where s is small, in s where it is large
    nodes = np.interp(np.linspace(measure[0], measure[-1], most), measure, dense)
    nodes[0], nodes[-1] = distinct[0], distinct[-1]
    cell = np.clip(np.searchsorted(nodes, values, side="right") - 1, 0, most - 2)
    return nodes, cell, (values - nodes[cell]) / (nodes[cell + 1] - nodes[cell])


def _many_curves(rates: Array, precisions: Array, counts: Array, orders: Array) -> Array:
    """Upper bound of ``sum_i n_i K(rate_i, s_i)`` from a few nodes; ``s = 1 / sigma^2``.

    ``A = E[(1 - q + q exp(sqrt(s) Z - s / 2))^a]`` is convex in q (a power of a linear form) and in s (the generator of
    geometric Brownian motion maps this power to ``m^2 (1 - q + q m)^(a - 2)``, again convex), so bilinear chords lie
    above it; and the mean of ``log`` of a chord over a cell is at most the log at the mean weights (Jensen).
    """
    few = len(np.unique(rates)) <= 8
    q_nodes, q_cell, q_weight = _nodes_and_weights(rates, 8 if few else 14)
    s_nodes, s_cell, s_weight = _nodes_and_weights(precisions, max(18, _SIGMA_NODES // len(q_nodes)))
    cells, member = np.unique(q_cell * len(s_nodes) + s_cell, return_inverse=True)
    size = np.bincount(member, counts)
    mixed = np.full((len(cells), len(orders)), -np.inf)
    for up_q, up_s in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = counts * np.abs(1 - up_q - q_weight) * np.abs(1 - up_s - s_weight)
        mean = np.bincount(member, weight) / size
        for row in np.flatnonzero(mean > 0.0):
            i, j = divmod(int(cells[row]), len(s_nodes))
            curve = sampled_gaussian_curve(float(q_nodes[i + up_q]), float(s_nodes[j + up_s] ** -0.5), orders)
            mixed[row] = np.logaddexp(mixed[row], np.log(mean[row]) + curve)
    return np.asarray(size @ np.maximum(mixed, 0.0), dtype=np.float64)


def epsilon_curve(orders: Array, curve: Array, delta: float) -> Array:
    """Epsilon at ``delta`` by every order: Canonne, Kamath and Steinke (2020), proposition 12."""
    excess = orders - 1.0
    return np.asarray((curve + excess * np.log(excess / orders) - np.log(delta) - np.log(orders)) / excess)


def log_delta_curve(orders: Array, curve: Array, epsilon: float) -> Array:
    """The same proposition solved for ``log delta``."""
    excess = orders - 1.0
    return curve - excess * epsilon + excess * np.log(excess / orders) - np.log(orders)


def log_total_variation(orders: Array, curve: Array) -> float:
    """Log of a bound on the total variation distance: Pinsker's, or Bretagnolle and Huber's (1979)."""
    divergence = float(np.min(curve / (orders - 1.0)))
    if divergence <= 0.0:
        return -math.inf
    return 0.5 * math.log(min(divergence / 2.0, -math.expm1(-divergence)))
