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

from ghostgrad.accounting._pairs import Loss
from ghostgrad.accounting._pilots import (
    GRID,
    LARGEST,
    LEVELS,
    TAIL,
    Composition,
    Mesh,
    Pilot,
    TooWideError,
    mesh_for,
    pilot_at_delta,
    pilot_at_epsilon,
    pilot_with_tail,
)

Array = NDArray[np.float64]

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Total:
    """The composed, tilted masses and what is needed to read delta from them."""

    losses: Array
    suffix_p: Array  # sum over losses >= l of mass * exp(-tilt (l - reference)), under P
    suffix_q: Array  # the same with exp(-(tilt + 1) (l - reference)), under Q
    log_scale: float  # log M - tilt * reference
    reference: float
    infinite: float
    tilt: float
    noise: float  # how far a mass can be off by the transform's round-off

    def rounding(self, epsilon: float, hidden: bool) -> float:
        """What round-off may have ``hidden`` of delta at ``epsilon``: it is as good as random, and what is below 0 was cut off.

        What it may have added: cut off so, all of it has one sign.
        """
        if self.noise == 0.0:
            return 0.0
        at = min(int(np.searchsorted(self.losses, epsilon, side="right")), len(self.losses) - 1)
        h, left = float(self.losses[1] - self.losses[0]), float(len(self.losses) - at)
        power = 2.0 if hidden else 1.0  # the length of the vector of weights exp(-tilt h j), or their sum
        weights = min(left, -1.0 / math.expm1(-power * self.tilt * h)) ** (1.0 / power)
        log = self.log_scale + self.tilt * (self.reference - float(self.losses[at]))
        return math.exp(min(0.0, log + math.log(self.noise) + math.log(weights)))

    def delta(self, epsilon: float) -> float:
        """Delta at ``epsilon``: exact for the mesh."""
        at = int(np.searchsorted(self.losses, epsilon, side="right"))
        if at >= len(self.losses):
            return self.infinite
        finite = float(self.suffix_p[at] - math.exp(min(epsilon - self.reference, 600.0)) * self.suffix_q[at])
        if finite <= 0.0:
            return self.infinite
        return min(1.0, self.infinite + math.exp(min(0.0, self.log_scale + math.log(finite))))

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta``; infinite where the mass at infinity is more."""
        aim = delta - self.infinite
        if aim <= 0.0:
            return math.inf
        scaled = math.exp(min(math.log(aim) - self.log_scale, 700.0))
        at_mesh = self.suffix_p - np.exp(np.minimum(self.losses - self.reference, 600.0)) * self.suffix_q
        inside = int(np.searchsorted(-at_mesh, -scaled))  # first mesh point at or below aim
        if inside >= len(self.losses):
            return float(self.losses[-1])
        p, q = float(self.suffix_p[inside]), float(self.suffix_q[inside])
        room = p - scaled
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
    noise = max(0.0, -float(mass.min()))  # no mass is negative but by round-off
    mass = np.maximum(np.roll(mass, offset - first), 0.0)
    losses = np.arange(first, first + count) * mesh.h
    # The cap on the second exponent binds far below the reference only, where it makes delta larger.
    away = reference - losses
    weights = (mass * np.exp(np.minimum(exponent * away, 690.0)) for exponent in (mesh.tilt, mesh.tilt + 1.0))
    suffix = [np.cumsum(weight[::-1])[::-1] for weight in weights]
    scale = log_scale - mesh.tilt * reference
    return Total(losses, suffix[0], suffix[1], scale, reference, -math.expm1(log_finite), mesh.tilt, noise)


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
    largest: int = LARGEST
    name: str = "convolution"

    def epsilon(self, delta: float, with_lower: bool = False) -> tuple[float, float, float]:
        """Lower and upper bounds of epsilon, and the predicted excess of the upper one; 0 and infinity without a mesh."""
        try:
            return self._epsilon(delta, with_lower)
        except TooWideError:
            return 0.0, math.inf, 0.0

    def _epsilon(self, delta: float, with_lower: bool) -> tuple[float, float, float]:
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
        mesh = mesh_for(pilot, pilot.epsilon, tolerance * max(pilot.epsilon, floor), self.largest)
        total = compose(pilot.composition, mesh, pilot.epsilon)
        upper = total.epsilon(delta * (1.0 - 1e-6))
        scale = max(upper, floor)
        if upper > 0.0 and mesh.excess > 3.0 * tolerance * scale:  # the Chernoff pilot was far above
            finer = mesh_for(pilot, upper, tolerance * scale, self.largest)
            if finer.excess < mesh.excess:
                mesh, total = finer, compose(pilot.composition, finer, upper)
                upper = min(upper, total.epsilon(delta * (1.0 - 1e-6)))
        lower = self._lower(pilot.composition, mesh, total, delta) if with_lower else 0.0
        return min(lower, upper), upper, mesh.excess

    @staticmethod
    def _moved(composition: Composition, mesh: Mesh, miss: float) -> float:
        """How far the mesh is above the truth, but for probability ``miss`` (Hoeffding 1963, theorem 2).

        Each step was moved up by independent noise in an interval of width h and mean at most h^2 / 8.
        """
        return composition.steps * mesh.h**2 / 8.0 + mesh.h * math.sqrt(composition.steps * -math.log(miss) / 2.0)

    def _lower(self, composition: Composition, mesh: Mesh, total: Total, delta: float) -> float:
        # At most as much again is missed by the low tails that were moved up to the mesh, and by round-off.
        miss = 1e-3 * delta
        epsilon = total.epsilon(delta + 3.0 * miss + total.infinite)
        if total.rounding(epsilon, hidden=False) > miss:
            return 0.0
        return max(0.0, epsilon - self._moved(composition, mesh, miss))

    def delta(self, epsilon: float) -> tuple[float, float]:
        """Lower and upper bounds of delta; 0 and 1 without a mesh."""
        try:
            return self._delta(epsilon)
        except TooWideError:
            return 0.0, 1.0

    def _delta(self, epsilon: float) -> tuple[float, float]:
        pilots = sorted((pilot_at_epsilon(c, epsilon) for c in self.directions), key=lambda p: -p.log_delta)
        lowest = highest = 0.0
        for pilot in pilots:
            if highest > 0.0 and pilot.log_delta < math.log(highest) - 0.05:
                continue
            low, value, infinite = self._read(pilot, epsilon)
            if value > 0.0 and infinite > 0.5 * TAIL * value:  # the Chernoff look was far above
                finite = max(value - infinite, 1e-3 * value)
                again = self._read(pilot_at_epsilon(pilot.composition, epsilon, finite), epsilon)
                low, value = max(low, again[0]), min(value, again[1])
            for level in LEVELS[::-1]:  # a mesh too coarse for so short a tail: every longer one gives a bound, too
                if value <= 1e3 * math.exp(min(pilot.proven, 0.0)):
                    break
                if level > 1e4 * pilot.tail * pilot.composition.steps / TAIL:
                    pilot = pilot_with_tail(pilot.composition, epsilon, level)
                    value = min(value, self._read(pilot, epsilon)[1])
            lowest, highest = max(lowest, low), max(highest, value * (1.0 + _ROUNDING))
        return min(lowest, highest), min(1.0, highest)

    def _read(self, pilot: Pilot, epsilon: float) -> tuple[float, float, float]:
        """Lower and upper bounds of delta, and the mass put at infinity."""
        excess = 0.5 * self.tolerance / float(GRID[pilot.at])  # delta then exceeds by a share of half the tolerance
        if epsilon > 0.0:
            excess = min(excess, self.tolerance * epsilon / 2.0)
        mesh = mesh_for(pilot, epsilon, excess, self.largest)
        total = compose(pilot.composition, mesh, epsilon)
        value = min(1.0, total.delta(epsilon) + total.rounding(epsilon, hidden=True))
        miss = max(1e-3 * value, 1e-300)
        moved = epsilon + self._moved(pilot.composition, mesh, miss)
        further = total.delta(moved) - total.rounding(moved, hidden=False)
        lower = further * (1.0 - 1e-6) - miss - total.infinite - pilot.composition.steps * mesh.tail
        return max(0.0, lower), value, total.infinite
