"""Exact curves of many steps: the privacy loss' moment generating function inverted along a vertical line.

With ``K(s) = sum_i n_i log E_P[exp(s L_i)]``, for every ``c > 0``,

    delta(epsilon) = 1 / (2 pi i) * integral over Re s = c of exp(K(s) - s epsilon) / (s (s + 1)) ds,

because ``1 / (s (s + 1))`` is the transform of ``(1 - exp(-x))_+``. Through the saddle point the integrand falls like a
Gaussian, and the trapezoid rule is exact but for aliases, which Chernoff bounds limit. It declines (returns ``None``)
where the integrand does not fall: few steps, or rates so small that most steps see nothing.

Directions: removing a record, ``E_P[exp(s L)] = E[(1 + q u)^(1 + s)]``; adding one, ``E[(1 + q u)^(-s)]``; the
expectations as in `_moments`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri_exp

from ghostgrad.accounting._curves import ORDERS, total_curve

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

_SLACK = 32.0  # natural log of the relative size of what is left out
_MOST_NODES = 4096
_DIGITS = 14.0  # natural log of the cancellation allowed: 6 digits of 16
_FEW = 32
"""Longer grids of frequencies are evenly spaced."""
_S_GRID = np.geomspace(1e-3, 1e4, 160)


@dataclass(frozen=True)
class Steps:
    """Poisson-sampled Gaussians (arrays of equal length) and the summed precision of unsampled ones.

    Outputs more than ``width`` sigma below 0, or above 1 where ``cut`` is set, are left out; `lost` bounds their mass.
    """

    rates: Array
    sigmas: Array
    counts: Array
    precision: float = 0.0
    width: float = 9.0
    cut: bool = False

    def sized_for(self, delta: float, cut: bool) -> Steps:
        """The same steps with a width that loses at most ``1e-10 delta`` in all."""
        width = -float(ndtri_exp(math.log(delta) - math.log(max(self.counts.sum(), 1.0)) - 23.7))
        return replace(self, width=max(9.0, width), cut=cut)

    @property
    def lost(self) -> float:
        """A bound on the mass left out."""
        return 2.0 * float(self.counts.sum()) * float(ndtr(-self.width))


def _grid(power: float, sigma: float, frequency: float, width: float, cut: bool) -> Array:
    """Quadrature nodes for ``E[(1 + qu)^(power + i frequency)]``; the step resolves the Gaussian and the logarithm."""
    step = min(
        2.0 * math.pi * sigma / (9.4 + frequency / sigma),
        2.0 * math.pi**2 * sigma**2 / (40.0 + math.pi * frequency),
    )
    start, stop = -width * sigma, (1.0 if cut else max(power, 2.0)) + width * sigma
    return np.arange(start, stop + step, step) if (stop - start) / step < 2e6 else np.empty(0)


def _weights(x: Array, power: float, rate: float, sigma: float) -> tuple[Array, Array, Array, Array]:
    """``v = q u``, ``log1p(v)``, the log of the node's probability, and ``power * log1p(v)`` added to it."""
    exponent = (2.0 * x - 1.0) / (2.0 * sigma * sigma)
    with np.errstate(over="ignore"):
        value = np.minimum(rate * np.expm1(exponent), 1e300)
    log = np.where(exponent < 30.0, np.log1p(value), np.logaddexp(math.log1p(-rate), math.log(rate) + exponent))
    density = -x * x / (2.0 * sigma * sigma) + math.log((x[1] - x[0]) / (sigma * math.sqrt(2.0 * math.pi)))
    return value, log, density, power * log + density


def _turned(y: Array, log: Array, weight: Array) -> Complex:
    """``sum(weight (exp(i y log) - 1))`` for every ``y``; many are multiples of the second, ``0, y_1, 2 y_1, ...``.

    With ``k = a b + c`` these are products: ``exp(i (a b + c) t) - 1 = u v + u + v`` for ``u = exp(i a b t) - 1`` and
    ``v = exp(i c t) - 1``, so that sines are taken of a square root as many angles and the rest is one matrix product.
    """

    def chord(angles: Array) -> Complex:
        half = np.sin(0.5 * angles)
        return np.asarray(-2.0 * half * half + 1j * np.sin(angles), dtype=np.complex128)  # no digits cancel near 0

    if len(y) <= _FEW:
        return np.asarray(chord(np.multiply.outer(y, log)) @ weight, dtype=np.complex128)
    block = math.isqrt(len(y)) + 1
    fine, coarse = chord(np.multiply.outer(y[:block], log)), chord(np.multiply.outer(y[::block], log))
    total = (coarse * weight) @ fine.T + (coarse @ weight)[:, None] + (fine @ weight)[None, :]
    return np.asarray(total.reshape(-1)[: len(y)], dtype=np.complex128)


def _log_characteristic(power: float, y: Array, sign: float, rate: float, sigma: float, steps: Steps) -> Complex | None:
    """``log E[(1 + q u)^(power + i sign y)]`` for every ``y``; ``None`` where it overflows or needs too many nodes."""
    x = _grid(power, sigma, float(np.abs(y).max()), steps.width, steps.cut)
    if len(x) < 2:
        return None
    value, log, density, tilted = _weights(x, power, rate, sigma)
    if tilted.max() > 600.0 or (steps.cut and tilted[-1] > -_SLACK - math.log(steps.counts.sum())):
        return None
    near = density > -700.0
    real = float(np.exp(tilted).sum() - np.exp(density[near]).sum() - power * (value[near] @ np.exp(density[near])))
    keep = tilted > tilted.max() - 48.0
    if keep.sum() * len(y) > 2_000_000:
        return None
    turned = _turned(sign * y, log[keep], np.exp(tilted[keep]))
    re, im = real + turned.real, turned.imag
    with np.errstate(over="ignore", divide="ignore"):
        square = np.maximum(re * (2.0 + re) + im * im, -1.0 + 1e-16)  # |1 + re + i im|^2 - 1, kept off log 0
        size = np.where(square < 1e300, 0.5 * np.log1p(square), np.log(np.hypot(1.0 + re, im)))
    return np.asarray(size + 1j * np.arctan2(im, 1.0 + re))


@lru_cache(maxsize=2048)
def _real_curve(rate: float, sigma: float, remove: bool, width: float, cut: bool) -> Array:
    """``log E[(1 + q u)^(1 + s)]``, or to the power of ``-s``, on `_S_GRID`."""
    x = _grid(0.0, sigma, 0.0, width, cut)
    _, log, density, _ = _weights(x, 0.0, rate, sigma)
    matrix = np.multiply.outer(1.0 + _S_GRID if remove else -_S_GRID, log) + density
    peak = matrix.max(axis=1)
    total: Array = peak + np.log(np.exp(matrix - peak[:, None]).sum(axis=1))
    total.setflags(write=False)
    return total


def real_table(steps: Steps, remove: bool) -> tuple[Array, Array]:
    """``s`` and ``K(s)`` on a grid."""
    exact = remove and not steps.cut
    grid = ORDERS - 1.0 if exact else _S_GRID
    curve = steps.precision * grid * (grid + 1.0) / 2.0
    pairs = list(zip(steps.rates.tolist(), steps.sigmas.tolist(), steps.counts.tolist(), strict=True))
    if exact:
        curve = curve + total_curve({(q, sigma): n for q, sigma, n in pairs}, {}, ORDERS)
    else:
        for rate, sigma, count in pairs:
            curve = curve + count * _real_curve(rate, sigma, remove, steps.width, steps.cut)
    return grid, curve


def _entropy(s: Array) -> Array:
    return np.asarray(s * np.log(s) - (s + 1.0) * np.log1p(s))


def saddle_at_delta(grid: Array, curve: Array, log_delta: float) -> tuple[int, float]:
    """The best Chernoff exponent for ``log_delta`` (its index) and the epsilon it proves."""
    epsilons = (curve - log_delta + _entropy(grid)) / grid
    best = int(np.argmin(epsilons))
    return best, float(epsilons[best])


def saddle_at_epsilon(grid: Array, curve: Array, epsilon: float) -> tuple[int, float]:
    """The best Chernoff exponent for ``epsilon`` (its index) and the log delta it proves."""
    logs = curve - grid * epsilon + _entropy(grid)
    best = int(np.argmin(logs))
    return best, float(logs[best])


@dataclass(frozen=True)
class ContourCurve:
    """One direction's curve: values of the integrand on the line ``Re s = tilt``."""

    tilt: float
    y: Array
    values: Complex
    log_scale: float
    step: float

    def log_delta(self, epsilon: float) -> tuple[float, float]:
        """``log delta`` and its derivative at ``epsilon``; ``-inf`` where rounding has eaten the value."""
        wave = self.values * np.exp(-1j * self.y * epsilon)
        total = float(wave.real.sum() - wave[0].real / 2.0) * self.step / math.pi
        slope = wave * (self.tilt + 1j * self.y)
        change = -float(slope.real.sum() - slope[0].real / 2.0) * self.step / math.pi
        if total <= 0.0:
            return -math.inf, -1.0
        return math.log(total) + self.log_scale - self.tilt * epsilon, change / total

    def epsilon(self, log_delta: float, start: float) -> float:
        """Newton's method on ``log delta``, which is nearly straight; ``nan`` where it does not settle."""
        epsilon = start
        for _ in range(60):
            value, slope = self.log_delta(epsilon)
            if not math.isfinite(value) or slope >= 0.0:
                return math.nan
            move = (value - log_delta) / -slope
            epsilon += max(min(move, 20.0 / self.tilt), -20.0 / self.tilt)
            if epsilon < 0.0:
                return 0.0 if self.log_delta(0.0)[0] <= log_delta else math.nan
            if abs(move) <= 1e-13 * max(epsilon, 1e-6):
                return epsilon
        return math.nan


def _period(grid: Array, curve: Array, at: int, epsilon: float, log_delta: float) -> float:
    """The distance of aliases at which Chernoff bounds make them negligible; infinite where none is known."""
    s = float(grid[at])
    cost = curve - grid * epsilon + _SLACK - log_delta
    with np.errstate(divide="ignore", invalid="ignore"):
        above = np.where(grid > s, cost / (grid - s), np.inf)
        below = np.where(grid < s, cost / (s - grid), np.inf)
    left = min(float(below.min()), (_SLACK - log_delta) / s)
    return 1.1 * max(left, float(above.min()), 20.0 / s)


def _line(grid: Array, curve: Array, at: int, epsilon: float, log_delta: float) -> tuple[float, float]:
    """Where to put the line and the period it needs: at the saddle, or left of it where rare large losses lie right.

    Left of the saddle the integrand oscillates; at most `_DIGITS` are given away.
    """
    best = (float(grid[at]), _period(grid, curve, at, epsilon, log_delta))
    for share in (0.85, 0.7, 0.5, 0.35, 0.25):
        other = int(np.searchsorted(grid, share * grid[at]))
        lost = curve[other] - grid[other] * epsilon - log_delta
        period = _period(grid, curve, other, epsilon, log_delta)
        if lost < _DIGITS and period < 0.8 * best[1]:
            best = (float(grid[other]), period)
    return best


def contour_curve(
    steps: Steps, remove: bool, tilt: float, period: float, most_nodes: int = _MOST_NODES
) -> ContourCurve | None:
    """Evaluate the integrand on as many nodes as it is visible at; ``None`` if those are too many."""
    spacing = 2.0 * math.pi / period
    count = _visible_nodes(steps, remove, tilt, spacing, most_nodes)
    if count is None:
        return None
    y = spacing * np.arange(count + 1.0)
    logs = _log_values(steps, remove, tilt, y)
    if logs is None:
        return None
    scale = float(logs[0].real)
    s = tilt + 1j * y
    values: Complex = np.asarray(np.exp(logs - scale) / (s * (s + 1.0)), dtype=np.complex128)
    return ContourCurve(tilt, y, values, scale, spacing)


def _visible_nodes(steps: Steps, remove: bool, tilt: float, spacing: float, most: int) -> int | None:
    """The number of nodes after which the integrand stays below visibility, by probing; ``None`` above ``most``."""
    limit = 64
    while limit <= most:
        counts = np.concatenate([[0.0], 2.0 ** np.arange(3, math.log2(limit) + 1.5)])
        logs = _log_values(steps, remove, tilt, spacing * counts)
        if logs is None:
            return None
        fall = (logs - logs[0]).real - np.log(np.abs((tilt + 1j * spacing * counts) / tilt))
        last = int(np.flatnonzero(fall > -_SLACK)[-1]) + 1
        if last < len(counts) - 1:  # two probes below: it stays there
            return int(counts[last])
        limit *= 8
    return None


def _log_values(steps: Steps, remove: bool, tilt: float, y: Array) -> Complex | None:
    s = tilt + 1j * y
    total: Complex = np.asarray(steps.precision * s * (s + 1.0) / 2.0, dtype=np.complex128)
    for rate, sigma, count in zip(steps.rates, steps.sigmas, steps.counts, strict=True):
        power, sign = (1.0 + tilt, 1.0) if remove else (-tilt, -1.0)
        part = _log_characteristic(power, y, sign, float(rate), float(sigma), steps)
        if part is None:
            return None
        total = total + count * part
    return total


def _epsilon_one_way(steps: Steps, remove: bool, delta: float, floor: float) -> tuple[float, float] | None:
    grid, curve = real_table(steps, remove)
    log_delta = math.log(delta)
    at, start = saddle_at_delta(grid, curve, log_delta)
    if start <= floor:  # Chernoff already proves no more than the other direction needs
        return 0.0, floor
    for _ in range(3):
        line = contour_curve(steps, remove, *_line(grid, curve, at, start, log_delta))
        if line is None:
            return None
        upper = line.epsilon(math.log(delta - steps.lost) - 4e-6, start)
        lower = line.epsilon(log_delta + 1e-6, start)
        if math.isnan(upper) or math.isnan(lower):
            return None
        if line.log_scale - line.tilt * upper - log_delta < _DIGITS + 2.0:
            return lower * (1.0 - 1e-8), upper * (1.0 + 1e-8)
        # The Chernoff start was far above, and more digits cancelled than meant: go again from here.
        at, start = saddle_at_epsilon(grid, curve, upper)[0], upper
    return None


def _delta_one_way(steps: Steps, remove: bool, epsilon: float, floor: float) -> tuple[float, float] | None:
    grid, curve = real_table(steps, remove)
    at, bound = saddle_at_epsilon(grid, curve, epsilon)
    if math.exp(min(bound, 0.0)) <= floor:
        return 0.0, floor
    guess = min(bound, 0.0) - 3.0
    for _ in range(4):
        steps = steps.sized_for(math.exp(max(guess, -600.0)), steps.cut)
        grid, curve = real_table(steps, remove)
        at, _ = saddle_at_epsilon(grid, curve, epsilon)
        line = contour_curve(steps, remove, *_line(grid, curve, at, epsilon, guess), 8 * _MOST_NODES)
        if line is None:
            return None
        found = line.log_delta(epsilon)[0]
        if found >= guess:  # what was left out was sized for a delta no larger than this
            value = math.exp(min(found, 0.0))
            return value * (1.0 - 1e-6), min(1.0, value * (1.0 + 1e-7) + steps.lost)
        guess = max(found, guess - 60.0) - 0.2
    return None


@dataclass(frozen=True)
class Contour:
    """Both directions of a composition; relative error of delta about 1e-8, bounds widened to 4e-6."""

    steps: Steps
    name: str = "contour inversion"

    def epsilon(self, delta: float) -> tuple[float, float] | None:
        """Lower and upper bounds of epsilon, or ``None`` where the method declines."""
        lower = upper = 0.0
        for remove in (True, False):
            one = None
            for cut in (False, True):
                one = one or _epsilon_one_way(self.steps.sized_for(delta, cut), remove, delta, upper)
            if one is None:
                return None
            lower, upper = max(lower, one[0]), max(upper, one[1])
        return lower, upper

    def delta(self, epsilon: float) -> tuple[float, float] | None:
        """Lower and upper bounds of delta, or ``None`` where the method declines."""
        lower = upper = 0.0
        for remove in (True, False):
            one = None
            for cut in (False, True):
                one = one or _delta_one_way(self.steps.sized_for(1e-12, cut), remove, epsilon, upper)
            if one is None:
                return None
            lower, upper = max(lower, one[0]), max(upper, one[1])
        return lower, upper
