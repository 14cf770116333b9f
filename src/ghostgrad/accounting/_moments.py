"""Moments of the sampled Gaussian: ``log E[(1 + q u)^z]``, ``u = exp((2x - 1) / (2 sigma^2)) - 1``, x ~ N(0, sigma^2).

``z = a`` is the Renyi moment of order ``a`` (Mironov, Talwar and Zhang 2019, theorem 4, which also shows that this
direction is the larger one). Since ``E[u] = 0``, the excess over 1 is the mean of ``(1 + qu)^a - 1 - a q u``, which is
never negative: nothing cancels. The integrand is analytic, so the trapezoid rule converges faster than any power.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

Array = NDArray[np.float64]

_WINDOW = 9.0  # standard deviations; the mass outside is below 1e-18
_SMALLEST_SIGMA = 0.02  # below, quadrature nodes are too many and closed bounds are used
_NODES = 4096
_REPLACE_LIMIT = 64.0
_LEAST = 1e-300
"""No moment is taken for less: a record that may take part at all leaves a trace."""


def _nodes(order: float, sigma: float) -> Array:
    step = min(sigma / 1.5, sigma * sigma / 2.0)
    return np.arange(-_WINDOW * sigma, max(order, 2.0) + _WINDOW * sigma + step, step)


def _log_ratio(x: Array, rate: float, sigma: float) -> tuple[Array, Array]:
    """``v = q u`` (capped at 1e300) and ``log1p(v)`` (never capped)."""
    exponent = (2.0 * x - 1.0) / (2.0 * sigma * sigma)
    with np.errstate(over="ignore"):
        value = np.minimum(rate * np.expm1(exponent), 1e300)
    log = np.where(exponent < 30.0, np.log1p(value), np.logaddexp(np.log1p(-rate), np.log(rate) + exponent))
    return value, log


def _log_block(orders: Array, rate: float, sigma: float) -> Array:
    """``log(A - 1)`` for orders within a factor of two of each other, by the trapezoid rule."""
    x = _nodes(float(orders.max()), sigma)
    return _log_excess(orders, *_log_ratio(x, rate, sigma), _log_normal(x, 0.0, sigma))


def _log_normal(x: Array, mean: float, sigma: float) -> Array:
    """Log of the probability that a node stands for."""
    z = (x - mean) / sigma
    return np.asarray(-z * z / 2.0 + np.log((x[1] - x[0]) / (sigma * np.sqrt(2.0 * np.pi))))


def _log_excess(orders: Array, value: Array, log: Array, log_density: Array) -> Array:
    """``log E[(1 + v)^a - 1 - a v]`` from ``v``, ``log1p(v)`` and the log density at nodes; every term is >= 0."""
    top, a = float(orders.max()), orders[:, None]
    small = np.abs(value) < 1e-2 / top
    direct = ~small & (log * top < 500.0)
    far = ~small & ~direct
    with np.errstate(divide="ignore", under="ignore"):
        v, weight = value[small], np.exp(log_density[small])
        series = 1.0 + (a - 2) / 3 * v * (1.0 + (a - 3) / 4 * v * (1.0 + (a - 4) / 5 * v * (1.0 + (a - 5) / 6 * v)))
        total = (a[:, 0] * (a[:, 0] - 1.0) / 2.0) * (series @ (v * v * weight))
        v, weight = value[direct], np.exp(log_density[direct])
        total = total + np.maximum(np.expm1(a * log[direct]) - a * v, 0.0) @ weight
        near: Array = np.log(total)
        if not far.any():
            return near
        # e^{al} - (1 + a v) = e^{al} (1 - e^{-gap}), written so that nothing overflows or cancels.
        ell = log[far]
        gap = (a - 1.0) * ell - np.log1p((a - 1.0) * -np.expm1(-ell))
        tail = logsumexp(a * ell + np.log(-np.expm1(-gap)) + log_density[far], axis=1)
    return np.asarray(np.logaddexp(near, tail), dtype=np.float64)


@lru_cache(maxsize=256)
def _log_binomials(order: int) -> Array:
    """``log C(order, k)`` for k = 2 .. order."""
    k = np.arange(2.0, order + 1.0)
    table: Array = gammaln(order + 1.0) - gammaln(k + 1.0) - gammaln(order - k + 1.0)
    table.setflags(write=False)
    return table


def log_expm1(y: Array) -> Array:
    """``log(exp(y) - 1)`` for y > 0 without overflow."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(y < 30.0, np.log(np.expm1(np.minimum(y, 30.0))), y)


def log_binomial_excess(orders: Array, rate: float, log_moments: Array) -> Array:
    """``log(A - 1)`` of whole orders >= 2 from ``log_moments[k] = log E_Q[(P / Q)^k]``: sums of positive terms."""
    k = np.arange(len(log_moments), dtype=np.float64)
    per_k = k * (np.log(rate) - np.log1p(-rate)) + log_expm1(log_moments)
    result = np.empty(len(orders))
    for index, order in enumerate(orders.astype(int)):
        terms = _log_binomials(int(order)) + per_k[2 : order + 1]
        peak = terms.max()
        if peak == np.inf:
            result[index] = np.inf
            continue
        result[index] = peak + np.log(np.exp(terms - peak).sum()) + order * np.log1p(-rate)
    return result


def _log_integer(orders: Array, rate: float, sigma: float) -> Array:
    k = np.arange(int(orders.max()) + 1, dtype=np.float64)
    return log_binomial_excess(orders, rate, k * (k - 1.0) / (2.0 * sigma * sigma))


def _log_closed_bound(orders: Array, rate: float, sigma: float) -> Array:
    """Minkowski: ``A^(1/a) <= 1 - q + q exp((a - 1) / (2 sigma^2))``; an upper bound, tight for tiny sigma."""
    inner = np.logaddexp(np.log1p(-rate), np.log(rate) + (orders - 1.0) / (2.0 * sigma * sigma))
    return log_expm1(np.maximum(orders * inner, 1e-300))


def log_moment(orders: Array, rate: float, sigma: float) -> Array:
    """``log E[(1 + q u)^a]`` for every order ``a > 1``; 0 < rate < 1, sigma > 0. Relative accuracy about 1e-10.

    >>> bool(log_moment(np.array([2.0]), 0.01, 1.0)[0] - np.log1p(0.01**2 * np.expm1(1.0)) < 1e-14)
    True
    """
    result = np.empty(len(orders))
    step = min(sigma / 1.5, sigma * sigma / 2.0)
    limit = max(3.0, min(64.0, _NODES * step))
    whole = orders == np.floor(orders)
    by_sum = (orders > limit) & whole
    if by_sum.any():
        result[by_sum] = _log_integer(orders[by_sum], rate, sigma)
    rest = ~by_sum
    if sigma < _SMALLEST_SIGMA:
        result[rest] = _log_closed_bound(orders[rest], rate, sigma)
    else:
        rest &= orders <= limit
        lower = 1.0
        while rest.any() and lower < orders[rest].max():
            block = rest & (orders > lower) & (orders <= 2.0 * lower)
            if block.any():
                result[block] = _log_block(orders[block], rate, sigma)
            lower *= 2.0
        between = (orders > limit) & ~whole
        if between.any():
            result[between] = _log_closed_bound(orders[between], rate, sigma)
    return np.maximum(np.logaddexp(0.0, result), _LEAST)


def log_replace_moment(orders: Array, rate: float, sigma: float) -> Array:
    """``log E_Q[(P / Q)^a]`` where a record is replaced: means +1 and -1, each with probability ``rate``, else 0.

    That this pair dominates is shown at `ghostgrad.accounting._pairs.ReplaceOne`. Small orders by the trapezoid rule as
    above, now with ``v = P / Q - 1``; large ones by `through_the_middle` of the moments for removing a record.

    >>> half = log_replace_moment(np.array([2.0]), 0.999999, 1.0)  # nearly the Gaussian at distance 2
    >>> 3.99 < float(half[0]) < 4.0
    True
    """
    limit = min(_REPLACE_LIMIT, _NODES * min(sigma / 1.5, sigma * sigma / 2.0))
    result = through_the_middle(lambda more: log_moment(more, rate, sigma), orders)
    lower = 1.0
    while sigma >= _SMALLEST_SIGMA and lower < limit:
        block = (orders > lower) & (orders <= min(2.0 * lower, limit))
        lower *= 2.0
        if block.any():
            result[block] = np.logaddexp(0.0, _log_replace_block(orders[block], rate, sigma))
    return np.maximum(result, _LEAST)


def _log_replace_block(orders: Array, rate: float, sigma: float) -> Array:
    top = 2.0 * float(orders.max()) - 1.0  # where P^a Q^(1 - a) of the unsampled pair has its peak
    step = min(sigma / 1.5, sigma * sigma / 2.0)
    x = np.arange(-1.0 - _WINDOW * sigma, max(top, 2.0) + _WINDOW * sigma + step, step)
    log_stay, log_rate = np.log1p(-rate), np.log(rate)
    here, up, down = (_log_normal(x, mean, sigma) for mean in (0.0, 1.0, -1.0))
    p, q = (np.logaddexp(log_stay + here, log_rate + other) for other in (up, down))
    # P / Q - 1 = rate (up - down) / Q, without the difference of P and Q.
    with np.errstate(over="ignore"):
        sign = np.sign(x)
        size = np.abs(2.0 * x) / (sigma * sigma)  # log of the ratio of the two
        log_size = log_rate + np.maximum(up, down) + np.log(-np.expm1(-np.maximum(size, 1e-300))) - q
        value = sign * np.minimum(np.exp(np.minimum(log_size, 700.0)), 1e300)
        log = np.where(np.abs(value) < 0.5, np.log1p(np.maximum(value, -0.5)), p - q)
    return _log_excess(orders, value, log, q)


def through_the_middle(curve: Callable[[Array], Array], orders: Array) -> Array:
    """A bound for replacing a record from ``curve``, the moments ``K`` for adding or removing one.

    Replacing is removing, then adding, with R in the middle. ``P^a Q^(1-a) = (P^a R^(1/2-a)) (R^(a-1/2) Q^(1-a))``, so that
    by Cauchy and Schwarz ``K_replace(a) <= (K(2 a) + K(2 a - 1)) / 2``. Large orders are rounded up to whole ones.
    """
    twice = np.where(orders > 16.0, np.ceil(2.0 * orders), 2.0 * orders)
    return np.asarray((curve(twice) + curve(twice - 1.0)) / 2.0)
