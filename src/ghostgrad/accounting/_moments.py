"""Moments of the sampled Gaussian: ``log E[(1 + q u)^z]``, ``u = exp((2x - 1) / (2 sigma^2)) - 1``, x ~ N(0, sigma^2).

``z = a`` is the Renyi moment of order ``a`` (Mironov, Talwar and Zhang 2019, theorem 4, which also shows that this
direction is the larger one). Since ``E[u] = 0``, the excess over 1 is the mean of ``(1 + qu)^a - 1 - a q u``, which is
never negative: nothing cancels. The integrand is analytic, so the trapezoid rule converges faster than any power.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

Array = NDArray[np.float64]

_WINDOW = 9.0  # standard deviations; the mass outside is below 1e-18
_SMALLEST_SIGMA = 0.02  # below, quadrature nodes are too many and closed bounds are used
_NODES = 4096


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
    top = float(orders.max())
    x = _nodes(top, sigma)
    step = x[1] - x[0]
    value, log = _log_ratio(x, rate, sigma)
    log_density = -x * x / (2.0 * sigma * sigma) + np.log(step / (sigma * np.sqrt(2.0 * np.pi)))
    a = orders[:, None]
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
    return np.logaddexp(0.0, result)
