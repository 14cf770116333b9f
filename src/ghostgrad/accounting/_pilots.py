"""A Chernoff look at a composition before it is convolved: where to read it, with which tilt, on which mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ghostgrad.accounting._contour import saddle_at_delta, saddle_at_epsilon
from ghostgrad.accounting._pairs import Pair

Array = NDArray[np.float64]

LARGEST = 1 << 21  # mesh points: about 200 MB at the peak


class TooWideError(ArithmeticError):
    """No mesh within memory holds the composition; `Convolution` catches it."""


_PILOT = 600
TAIL = 1e-6
_WINDOW = 30.0  # natural log of the tilted mass outside the window
GRID = np.geomspace(1e-3, 1e6, 180)
LEVELS = (1e-5, 1e-10, 1e-16, 1e-24, 1e-40, 1e-80, 1e-200)


@dataclass(frozen=True)
class Composition:
    """Pairs of one direction, with how often each is released."""

    pairs: tuple[tuple[Pair, int], ...]

    @property
    def steps(self) -> int:
        """The number of releases."""
        return sum(count for _, count in self.pairs)

    def table(self, tail: float, h: float | None = None) -> Array:
        """``K(s)`` on the grid of tilts, from coarse graded meshes of the truncated losses: nowhere above the truth.

        With ``h`` nowhere below it, for losses that a mesh of this width has moved; 0 for those that none has.
        """
        return _table(self, tail, h)

    def fresh_table(self, tail: float, h: float | None = None) -> Array:
        """`table` without the memory of earlier ones."""
        total = np.zeros(len(GRID))
        for pair, count in self.pairs:
            low, high = pair.span(tail)
            edges = _graded(low, high)
            whole_p, whole_r = pair.bins(edges)
            p, r = whole_p[1:-1], whole_r[1:-1]
            seen = np.flatnonzero((p > 0.0) & (r > 0.0))
            middle = np.clip(np.log(p[seen]) - np.log(r[seen]), edges[seen], edges[seen + 1])
            # What lies at or below the lowest edge (the lower atom of Laplace noise) counts there: rounded up.
            p = np.concatenate([whole_p[:1], p[seen]])
            cells = np.array([edges[:1].repeat(3), *np.transpose([edges[seen], middle, edges[seen + 1]])])
            p, cells = p[p > 0.0], cells[p > 0.0]
            with np.errstate(over="ignore"):
                logs = _log_tilted(cells, h) + np.log(p)
            peak = logs.max(axis=1)
            total += count * (peak + np.log(np.exp(logs - peak[:, None]).sum(axis=1)))
        return total


def _log_tilted(cells: Array, h: float | None) -> Array:
    """``log E exp(s X)`` for every tilt s and cell of losses X with ``E exp(-X) = exp(-middle)``: the least, or the most.

    In an interval of width w it is at most ``s (s + 1) w^2 / 8`` above ``s middle`` (Hoeffding's lemma at s and at -1), and at
    most that of the upper end. A mesh moves X to the ends of its intervals, which is known exactly for a cell inside one.
    """
    first, middle, last = cells.T
    plain: Array = np.multiply.outer(GRID, middle)
    if h is None:
        return plain
    column = GRID[:, None]
    widened: Array = plain + column * np.minimum((column + 1.0) * (last - first) ** 2 / 8.0, last - middle)
    if h == 0.0:
        return widened
    below = np.floor(first / h) * h
    share = np.clip(np.expm1(below - middle) / math.expm1(-h), 0.0, 1.0)
    rise = np.log1p(np.expm1(np.minimum(column * h, 600.0)) * share) + np.maximum(column * h - 600.0, 0.0)
    moved = np.multiply.outer(GRID, below) + rise
    return np.asarray(np.where(last <= below + h, moved, widened + _most_rise(h)[:, None]))


def _most_rise(h: float) -> Array:
    return np.asarray(GRID * np.minimum((GRID + 1.0) * h * h / 8.0, h))


@lru_cache(maxsize=64)
def _table(composition: Composition, tail: float, h: float | None) -> Array:
    """The tables do not depend on where the curve is read: many readings share them."""
    table = composition.fresh_table(tail, h)
    table.setflags(write=False)
    return table


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

    @property
    def proven(self) -> float:
        """Log of the delta that is proven: by Chernoff, and by what the tails put at infinity."""
        return max(self.log_delta, math.log(self.tail * self.composition.steps))


def pilot_at_delta(composition: Composition, delta: float) -> Pilot:
    """Look for epsilon at ``delta``."""
    tail = TAIL * delta / composition.steps
    curve = composition.table(tail)
    at, _ = saddle_at_delta(GRID, curve, math.log(delta))
    _, epsilon = saddle_at_delta(GRID, composition.table(tail, 0.0), math.log(delta))
    return Pilot(composition, curve, at, epsilon, math.log(delta), tail)


def pilot_at_epsilon(composition: Composition, epsilon: float, expected: float | None = None) -> Pilot:
    """Look for delta at ``epsilon``; ``expected`` is a delta seen already, below which the tail can stay.

    Too long a tail hides delta, and too short a one makes the Chernoff bound useless where the largest losses are rare:
    the tail is shortened as long as that proves less.
    """
    if expected is not None:
        return pilot_with_tail(composition, epsilon, expected)
    best = pilot_with_tail(composition, epsilon, LEVELS[0])
    for level in LEVELS[1:]:
        other = pilot_with_tail(composition, epsilon, level)
        if other.proven >= best.proven - 0.1:
            break
        best = other
    nearer = 10.0 ** math.floor(max(min(best.log_delta, 0.0) - 4.0, -460.0) / math.log(10.0))
    near = pilot_with_tail(composition, epsilon, nearer)
    return near if near.proven <= best.proven + 0.1 else best


def pilot_with_tail(composition: Composition, epsilon: float, expected: float) -> Pilot:
    """Look with the tail that suits a delta of ``expected``."""
    tail = 0.5 * TAIL * expected / composition.steps
    curve = composition.table(tail)
    at, _ = saddle_at_epsilon(GRID, curve, epsilon)
    _, bound = saddle_at_epsilon(GRID, composition.table(tail, 0.0), epsilon)
    return Pilot(composition, curve, at, epsilon, bound, tail)


def mesh_for(pilot: Pilot, centre: float, excess: float, largest: int = LARGEST) -> Mesh:
    """Tilt, window and mesh to read the curve near ``centre``.

    The mesh width h is such that the excess of epsilon, ``steps (s + 1) h^2 / 12``, is as asked, if memory allows; it is
    a power of two, so that finer meshes contain coarser ones and can only give less.
    """
    composition, curve, tail = pilot.composition, pilot.curve, pilot.tail
    spans = [(pair.span(tail), count) for pair, count in composition.pairs]
    at = pilot.at if centre == pilot.epsilon else saddle_at_epsilon(GRID, curve, centre)[0]
    at = _narrowest(curve, at, centre)
    unmoved = composition.table(tail, 0.0)
    low, high = plain = _window(curve, unmoved, at)
    least, most = (sum(count * span[side] for span, count in spans) for side in (0, 1))
    tilt, steps = float(GRID[at]), composition.steps
    h = math.sqrt(12.0 * excess / (steps * (tilt + 1.0)))
    if centre > 0.0:
        h = min(h, centre / 50.0)
    widest = max(min(high, most) - max(low, least), *(span[1] - span[0] for span, _ in spans))
    h = 2.0 ** max(math.floor(math.log2(h)), math.ceil(math.log2(widest / largest)))
    for _ in range(64):
        low, high = _window(curve, unmoved + steps * _most_rise(h), at)
        if high - low > 1.1 * (plain[1] - plain[0]):
            low, high = _window(curve, composition.table(tail, h), at)
        low, high = min(low, -1e-3 * centre), max(high, centre * 1.01)
        # A step's mass can lie up to two points outside its span; what lies outside the window would be read on its other side.
        bottom, top = max(low, least - 2.0 * steps * h) - 2.0 * h, min(high, most + 2.0 * steps * h) + 2.0 * h
        if top - bottom <= 1.5 * largest * h:
            return Mesh(tilt, h, bottom, top, tail, steps * (tilt + 1.0) * h * h / 8.0)
        h *= 2.0
    raise TooWideError


def _narrowest(curve: Array, at: int, centre: float) -> int:
    """The tilt at or left of the saddle that needs the fewest mesh points; at most 4 digits are given away.

    Where rare large losses lie right of the saddle, the window there is wide.
    """
    logs = curve - GRID * centre
    allowed = [index for index in range(max(0, at - 56), at + 1, 2) if logs[index] < logs[at] + 9.0] + [at]

    def points(index: int) -> float:
        low, high = _window(curve, curve, index)
        return (high - low) * math.sqrt(GRID[index] + 1.0)

    return min(allowed, key=points)


def _window(curve: Array, raised: Array, at: int) -> tuple[float, float]:
    """Chernoff bounds on where the tilted total lies; ``raised`` is the curve of the mesh, nowhere less than ``curve``."""
    s, k = GRID[at], curve[at]
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = (raised - k + _WINDOW) / (GRID - s)
    high = float(bounds[at + 1 :].min()) if at + 1 < len(GRID) else math.inf
    # Below: the exponents from the tilt down to 0, where K is 0.
    low = max(float(bounds[:at].max()) if at else -math.inf, float((k - _WINDOW) / s))
    return low, high
