"""Composition on a mesh by the fast Fourier transform, tilted so that round-off is small where delta is read.

Each step's masses are multiplied by ``exp(s * loss) / M(s)`` before the transform, with ``s`` the Chernoff-optimal
exponent: the total then has its bulk at epsilon, and the transform's round-off, relative to that bulk, stays relative to
delta itself, down to 1e-30. Powers are taken as ``n log1p(fft(p) - 1)`` about the mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from ghostgrad.accounting._contour import saddle_at_delta, saddle_at_epsilon
from ghostgrad.accounting._pairs import Loss, Pair

Array = NDArray[np.float64]

LARGEST = 1 << 21  # mesh points: about 200 MB at the peak
_PILOT = 800
_TAIL = 1e-6
_WINDOW = 30.0  # natural log of the tilted mass outside the window
_GRID = np.geomspace(1e-3, 1e6, 180)
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Composition:
    """Pairs of one direction, with how often each is released."""

    pairs: tuple[tuple[Pair, int], ...]

    @property
    def steps(self) -> int:
        """The number of releases."""
        return sum(count for _, count in self.pairs)

    def table(self, tail: float) -> Array:
        """``K(s)`` on the grid of tilts, from coarse graded meshes of the truncated losses."""
        total = np.zeros(len(_GRID))
        for pair, count in self.pairs:
            low, high = pair.span(tail)
            edges = _graded(low, high)
            whole_p, whole_r = pair.bins(edges)
            p, r = whole_p[1:-1], whole_r[1:-1]
            seen = (p > 0.0) & (r > 0.0)
            middle = np.clip(np.log(p[seen]) - np.log(r[seen]), edges[:-1][seen], edges[1:][seen])
            # What lies at or below the lowest edge (the lower atom of Laplace noise) counts there: rounded up.
            p = np.concatenate([whole_p[:1], p[seen]])
            middle = np.concatenate([edges[:1], middle])
            seen = p > 0.0
            p, middle = p[seen], middle[seen]
            with np.errstate(over="ignore"):
                logs = np.multiply.outer(_GRID, middle) + np.log(p)
            peak = logs.max(axis=1)
            total += count * (peak + np.log(np.exp(logs - peak[:, None]).sum(axis=1)))
        return total


def _graded(low: float, high: float) -> Array:
    """Edges from low to high, fine around 0 where most of a sampled loss lies."""
    size = max(-low, high)
    half = np.concatenate([[0.0], np.geomspace(1e-9 * size, size, _PILOT // 2)])
    edges = np.unique(np.concatenate([-half, half, [low, high], np.linspace(low, high, _PILOT // 2)]))
    return edges[(edges >= low) & (edges <= high)]


@dataclass(frozen=True)
class Mesh:
    """What a composition needs: tilt, mesh width, window, tail per step, and the predicted excess of epsilon."""

    tilt: float
    h: float
    low: float
    high: float
    tail: float
    excess: float


@dataclass(frozen=True)
class Pilot:
    """A Chernoff look at one direction: the curve ``K``, the best tilt (its index), and what it proves."""

    composition: Composition
    curve: Array
    at: int
    epsilon: float
    log_delta: float
    tail: float


def pilot_at_delta(composition: Composition, delta: float) -> Pilot:
    """Look for epsilon at ``delta``."""
    tail = _TAIL * delta / composition.steps
    curve = composition.table(tail)
    at, epsilon = saddle_at_delta(_GRID, curve, math.log(delta))
    return Pilot(composition, curve, at, epsilon, math.log(delta), tail)


def pilot_at_epsilon(composition: Composition, epsilon: float, expected: float | None = None) -> Pilot:
    """Look for delta at ``epsilon``; ``expected`` is a delta seen already, below which the tail can stay."""
    if expected is None:
        _, bound = saddle_at_epsilon(_GRID, composition.table(1e-15 / composition.steps), epsilon)
        expected = math.exp(max(min(bound - 4.0, 0.0), -600.0))
    tail = 0.5 * _TAIL * expected / composition.steps
    curve = composition.table(tail)
    at, bound = saddle_at_epsilon(_GRID, curve, epsilon)
    return Pilot(composition, curve, at, epsilon, bound, tail)


def mesh_for(pilot: Pilot, centre: float, excess: float) -> Mesh:
    """Tilt, window and mesh to read the curve near ``centre``.

    The mesh width h is such that the excess of epsilon, ``steps (s + 1) h^2 / 12``, is as asked, if memory allows; it is
    a power of two, so that finer meshes contain coarser ones and can only give less.
    """
    composition, curve, tail = pilot.composition, pilot.curve, pilot.tail
    spans = [(pair.span(tail), count) for pair, count in composition.pairs]
    at = pilot.at if centre == pilot.epsilon else saddle_at_epsilon(_GRID, curve, centre)[0]
    at = _narrowest(curve, at, centre)
    low, high = _window(curve, at)
    low, high = min(low, -1e-3 * centre), max(high, centre * 1.01)
    least, most = (sum(count * span[side] for span, count in spans) for side in (0, 1))
    tilt, steps = float(_GRID[at]), composition.steps
    h = math.sqrt(12.0 * excess / (steps * (tilt + 1.0)))
    if centre > 0.0:
        h = min(h, centre / 50.0)
    widest = max(min(high, most) - max(low, least), *(span[1] - span[0] for span, _ in spans))
    h = 2.0 ** max(math.floor(math.log2(h)), math.ceil(math.log2(widest / LARGEST)))
    # A step's mass can lie up to two points outside its span; what lies outside the window would be read on its other side.
    low, high = max(low, least - 2.0 * steps * h) - 2.0 * h, min(high, most + 2.0 * steps * h) + 2.0 * h
    return Mesh(tilt, h, low, high, tail, steps * (tilt + 1.0) * h * h / 8.0)


def _narrowest(curve: Array, at: int, centre: float) -> int:
    """The tilt at or left of the saddle that needs the fewest mesh points; at most 4 digits are given away.

    Where rare large losses lie right of the saddle, the window there is wide.
    """
    logs = curve - _GRID * centre
    allowed = [index for index in range(max(0, at - 56), at + 1, 2) if logs[index] < logs[at] + 9.0] + [at]

    def points(index: int) -> float:
        low, high = _window(curve, index)
        return (high - low) * math.sqrt(_GRID[index] + 1.0)

    return min(allowed, key=points)


def _window(curve: Array, at: int) -> tuple[float, float]:
    """Chernoff bounds on where the tilted total lies."""
    s, k = _GRID[at], curve[at]
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = (curve - k + _WINDOW) / (_GRID - s)
    high = float(bounds[at + 1 :].min()) if at + 1 < len(_GRID) else math.inf
    # Below: the exponents from the tilt down to 0, where K is 0.
    low = max(float(bounds[:at].max()) if at else -math.inf, float((k - _WINDOW) / s))
    return low, high


@dataclass(frozen=True)
class Total:
    """The composed, tilted masses and what is needed to read delta from them."""

    losses: Array
    suffix_p: Array  # sum over losses >= l of mass * exp(-tilt (l - reference)), under P
    suffix_q: Array  # the same with exp(-(tilt + 1) (l - reference)), under Q
    log_scale: float  # log M - tilt * reference
    reference: float
    infinite: float

    def delta(self, epsilon: float) -> float:
        """Delta at ``epsilon``: exact for the mesh."""
        at = int(np.searchsorted(self.losses, epsilon, side="right"))
        if at >= len(self.losses):
            return self.infinite
        finite = self.suffix_p[at] - math.exp(min(epsilon - self.reference, 600.0)) * self.suffix_q[at]
        return self.infinite + math.exp(self.log_scale) * max(float(finite), 0.0)

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta``; infinite where the mass at infinity is more."""
        aim = delta - self.infinite
        if aim <= 0.0:
            return math.inf
        at_mesh = self.suffix_p - np.exp(np.minimum(self.losses - self.reference, 600.0)) * self.suffix_q
        inside = int(np.searchsorted(-at_mesh, -aim * math.exp(-self.log_scale)))  # first mesh point at or below aim
        if inside >= len(self.losses):
            return float(self.losses[-1])
        p, q = float(self.suffix_p[inside]), float(self.suffix_q[inside])
        room = p - aim * math.exp(-self.log_scale)
        if q <= 0.0 or room <= 0.0:
            return max(0.0, float(self.losses[inside]))
        return max(0.0, min(self.reference + math.log(room / q), float(self.losses[inside])))


def compose(composition: Composition, mesh: Mesh, reference: float) -> Total:
    """Convolve all steps; ``reference`` is a loss near which delta will be read."""
    count = fft.next_fast_len(int((mesh.high - mesh.low) / mesh.h) + 2, real=True)
    logs, log_scale, offset, log_finite = np.zeros(count // 2 + 1, dtype=np.complex128), 0.0, 0, 0.0
    for pair, times in composition.pairs:
        loss = pair.discretise(mesh.h, mesh.tail)
        log_finite += times * math.log1p(-min(loss.infinite, 1.0 - 1e-16))
        log_moment, mode = _add_power(logs, loss, times, mesh, count)
        log_scale += times * log_moment
        offset += times * (loss.start + mode)
    with np.errstate(under="ignore"):
        np.exp(logs, out=logs)
    mass = fft.irfft(logs, count, overwrite_x=True)
    first = math.ceil(mesh.low / mesh.h)
    mass = np.maximum(np.roll(mass, offset - first), 0.0)
    losses = np.arange(first, first + count) * mesh.h
    # The cap on the second exponent binds far below the reference only, where it makes delta larger.
    away = reference - losses
    weights = (mass * np.exp(np.minimum(exponent * away, 690.0)) for exponent in (mesh.tilt, mesh.tilt + 1.0))
    suffix = [np.cumsum(weight[::-1])[::-1] for weight in weights]
    scale = log_scale - mesh.tilt * reference
    return Total(losses, suffix[0], suffix[1], scale, reference, -math.expm1(log_finite))


def _add_power(logs: NDArray[np.complex128], loss: Loss, times: int, mesh: Mesh, count: int) -> tuple[float, int]:
    """Add ``times * log(transform)`` of one tilted step to ``logs``; return its ``log M`` and mode index."""
    index = np.flatnonzero(loss.mass > 0.0)
    exponents = np.log(loss.mass[index]) + mesh.tilt * mesh.h * (loss.start + index)
    peak = float(exponents.max())
    tilted = np.exp(exponents - peak)
    total = float(tilted.sum())
    tilted /= total
    mode = int(index[np.argmax(tilted)])
    rest = np.bincount((index - mode) % count, tilted, minlength=count)
    rest[0] = 0.0
    rest[0] = -float(rest.sum())  # p - 1 at the mode without the rounding of 1
    part = fft.rfft(rest, overwrite_x=True)
    square = np.maximum(part.real * (2.0 + part.real) + part.imag**2, -1.0 + 1e-16)
    logs.real += (0.5 * times) * np.log1p(square)
    logs.imag += times * np.arctan2(part.imag, 1.0 + part.real)
    return peak + math.log(total), mode


@dataclass(frozen=True)
class Convolution:
    """All directions of a ledger; epsilon from above by connect-the-dots, from below by Hoeffding's inequality."""

    directions: tuple[Composition, ...]
    tolerance: float = 1e-4
    name: str = "convolution"

    def epsilon(self, delta: float, with_lower: bool = False) -> tuple[float, float, float]:
        """Lower and upper bounds of epsilon, and the predicted excess of the upper one."""
        pilots = sorted((pilot_at_delta(c, delta) for c in self.directions), key=lambda p: -p.epsilon)
        lower = upper = excess = 0.0
        for pilot in pilots:
            if pilot.epsilon <= max(0.0, 0.95 * upper):  # Chernoff already proves less than the other direction needs
                continue
            found = self._one_way(pilot, delta, upper, with_lower)
            lower, upper, excess = max(lower, found[0]), max(upper, found[1]), max(excess, found[2])
        return lower, upper, excess

    def _one_way(self, pilot: Pilot, delta: float, floor: float, with_lower: bool) -> tuple[float, float, float]:
        tolerance = self.tolerance * (0.02 if with_lower else 1.0)
        mesh = mesh_for(pilot, pilot.epsilon, tolerance * max(pilot.epsilon, floor))
        total = compose(pilot.composition, mesh, pilot.epsilon)
        upper = total.epsilon(delta * (1.0 - 1e-6))
        scale = max(upper, floor)
        if upper > 0.0 and mesh.excess > 3.0 * tolerance * scale:  # the Chernoff pilot was far above
            finer = mesh_for(pilot, upper, tolerance * scale)
            if finer.excess < mesh.excess:
                mesh, total = finer, compose(pilot.composition, finer, upper)
                upper = min(upper, total.epsilon(delta * (1.0 - 1e-6)))
        lower = self._lower(pilot.composition, mesh, total, delta) if with_lower else 0.0
        return min(lower, upper), upper, mesh.excess

    @staticmethod
    def _lower(composition: Composition, mesh: Mesh, total: Total, delta: float) -> float:
        """Each step was moved up by independent noise in an interval of width h and mean at most h^2 / 8."""
        miss = 1e-3 * delta
        moved = composition.steps * mesh.h**2 / 8.0 + mesh.h * math.sqrt(composition.steps * -math.log(miss) / 2.0)
        return max(0.0, total.epsilon(delta + miss + total.infinite) - moved)

    def delta(self, epsilon: float) -> tuple[float, float]:
        """Lower (0) and upper bounds of delta."""
        pilots = sorted((pilot_at_epsilon(c, epsilon) for c in self.directions), key=lambda p: -p.log_delta)
        highest = 0.0
        for pilot in pilots:
            if highest > 0.0 and pilot.log_delta < math.log(highest) - 0.05:
                continue
            total = self._read(pilot, epsilon)
            value = total.delta(epsilon)
            if value > 0.0 and total.infinite > 0.5 * _TAIL * value:  # the Chernoff look was far above
                finite = max(value - total.infinite, 1e-3 * value)
                value = min(
                    value, self._read(pilot_at_epsilon(pilot.composition, epsilon, finite), epsilon).delta(epsilon)
                )
            highest = max(highest, value * (1.0 + _ROUNDING))
        return 0.0, min(1.0, highest)

    def _read(self, pilot: Pilot, epsilon: float) -> Total:
        excess = 0.01 * self.tolerance / float(_GRID[pilot.at])  # delta then exceeds by a share of 0.01 tolerance
        if epsilon > 0.0:
            excess = min(excess, self.tolerance * epsilon / 8.0)
        return compose(pilot.composition, mesh_for(pilot, epsilon, excess), epsilon)
