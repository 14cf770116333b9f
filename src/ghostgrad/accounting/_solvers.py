"""From a ledger to the exact method that suits it: closed form, contour inversion or convolution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ghostgrad.accounting._checks import precision
from ghostgrad.accounting._closed_forms import ClosedForm, gaussian_form, sampled_form
from ghostgrad.accounting._contour import Contour, Steps
from ghostgrad.accounting._convolution import Convolution
from ghostgrad.accounting._pairs import FixedSize, GaussianBase, LaplaceBase, Pair, ReplaceOne, ResponseBase, Sampled
from ghostgrad.accounting._pilots import LARGEST, Composition
from ghostgrad.accounting.events import Event, FixedSizeSampled, Gaussian, Laplace, Opaque, PoissonSampled

Array = NDArray[np.float64]

SMALLEST_SIGMA = 0.05  # below, losses are in the hundreds per step and the Renyi bound is used
LARGEST_SIGMA = 1e9  # above, losses are too near 0 for the digits of a float
MOST_STEPS = 10**10  # above, a mesh within memory is too coarse to be worth reading
_CONTOUR_PAIRS = 256
_CONVOLUTION_PAIRS = 24


@dataclass(frozen=True)
class Releases:
    """A ledger sorted by kind: sampled Gaussians ``{(rate, sigma): times}``, the summed precision of plain ones, others."""

    sampled: Mapping[tuple[float, float], int]
    precision: float
    others: Mapping[Event, int]
    replace: bool

    @property
    def noiseless(self) -> bool:
        """Whether something was released without noise."""
        return (
            math.isinf(self.precision)
            or any(isinstance(e, FixedSizeSampled) and _sigma(e) == 0.0 for e in self.others)
            or bool((self.table[:, 1] == 0.0).any())
        )

    @cached_property
    def table(self) -> Array:
        """Rows (rate, sigma, count) of the sampled Gaussians, sorted, so that the order of steps changes no rounding."""
        rows = np.array([(rate, sigma, count) for (rate, sigma), count in self.sampled.items()], dtype=np.float64)
        rows = rows.reshape(-1, 3)
        return np.asarray(rows[np.lexsort((rows[:, 1], rows[:, 0]))])

    @property
    def empty(self) -> bool:
        """Whether nothing was released."""
        return not self.sampled and not self.others and self.precision == 0.0


def sort_releases(sampled: Mapping[tuple[float, float], int], others: Mapping[Event, int], replace: bool) -> Releases:
    """Merge plain Gaussians into one precision."""
    total = 0.0
    rest: dict[Event, int] = {}
    for event, count in others.items():
        if isinstance(event, Gaussian):
            total += count * precision(event.sigma)
        elif not (isinstance(event, Opaque) and event.epsilon == 0.0):
            rest[event] = count
    return Releases(sampled, total, dict(sorted(rest.items(), key=repr)), replace)


def _sigma(event: FixedSizeSampled) -> float:
    return event.event.sigma if isinstance(event.event, Gaussian) else math.inf


def _readable(releases: Releases, delta: float) -> bool:
    """Whether numbers are of a size that floats can hold on a line or a mesh; the Renyi bound answers for the rest."""
    rates, sigmas, counts = releases.table.T
    rest = min((event.rate for event in releases.others if hasattr(event, "rate")), default=1.0)
    steps = counts.sum() + sum(releases.others.values())
    return bool(
        rates.min(initial=rest) >= 1e-30
        and sigmas.min(initial=1.0) >= SMALLEST_SIGMA
        and sigmas.max(initial=1.0) <= LARGEST_SIGMA
        and (releases.precision == 0.0 or 1e-18 <= releases.precision <= 1e12)
        and steps <= MOST_STEPS
        and delta >= 1e-200
    )


def closed_form(releases: Releases) -> ClosedForm | None:
    """The exact curve, where there is one."""
    if releases.others:
        return None
    if not releases.sampled:
        return gaussian_form(math.sqrt(releases.precision))
    if len(releases.sampled) == 1 and releases.precision == 0.0 and not releases.replace:
        ((rate, sigma), count) = next(iter(releases.sampled.items()))
        if count == 1 and sigma >= 1e-3:
            return sampled_form(rate, sigma)
    return None


def contour(releases: Releases, delta: float = 1.0, rounding_up: bool = True) -> Contour | None:
    """Contour inversion; for Poisson-sampled and plain Gaussians under adding or removing a record."""
    if releases.others or releases.replace or not releases.sampled or not _readable(releases, delta):
        return None
    table = _bucketed(releases.table, _CONTOUR_PAIRS, rounding_up)
    return Contour(Steps(table[:, 0], table[:, 1], table[:, 2], releases.precision))


def exact_pairs(releases: Releases) -> bool:
    """Whether `contour` rounds nothing."""
    return len(releases.sampled) <= _CONTOUR_PAIRS


def convolution(releases: Releases, tolerance: float, delta: float = 1.0, largest: int = LARGEST) -> Convolution | None:
    """Convolution on a mesh; ``None`` where a release has too little noise or no dominating pair."""
    pairs = _pairs(releases) if _readable(releases, delta) else None
    if pairs is None:
        return None
    if not any(isinstance(pair, Sampled) and pair.rate < 1.0 for pair, _ in pairs):
        return Convolution((Composition(tuple(pairs)),), tolerance, largest)  # every pair is its own mirror image
    add = [(Sampled(p.base, p.rate, False) if isinstance(p, Sampled) else p, n) for p, n in pairs]
    return Convolution((Composition(tuple(pairs)), Composition(tuple(add))), tolerance, largest)


def _pairs(releases: Releases) -> list[tuple[Pair, int]] | None:
    pairs: list[tuple[Pair, int]] = []
    if releases.precision > 0.0:
        pairs.append((Sampled(GaussianBase(releases.precision**-0.5), 1.0), 1))
    if releases.sampled:
        for rate, sigma, count in _bucketed(releases.table, _CONVOLUTION_PAIRS, True).tolist():
            pair = ReplaceOne(sigma, rate) if releases.replace else Sampled(GaussianBase(sigma), rate)
            pairs.append((pair, int(count)))
    for event, count in releases.others.items():
        other = _pair(event, releases.replace)
        if other is None:
            return None
        pairs.append((other, count))
    return pairs if all(SMALLEST_SIGMA <= _noise(pair) <= LARGEST_SIGMA for pair, _ in pairs) else None


def _pair(event: Event, replace: bool) -> Pair | None:
    if isinstance(event, Laplace):
        return Sampled(LaplaceBase(event.scale), 1.0)
    if isinstance(event, Opaque):
        return Sampled(ResponseBase(event.epsilon), 1.0)
    if isinstance(event, PoissonSampled) and isinstance(event.event, Laplace) and not replace:
        return Sampled(LaplaceBase(event.event.scale), event.rate)
    if isinstance(event, FixedSizeSampled) and isinstance(event.event, Gaussian):
        return FixedSize(GaussianBase(event.event.sigma / 2.0), event.rate)
    return None


def _noise(pair: Pair) -> float:
    """How much noise a pair has, on the scale of a Gaussian's sigma."""
    if isinstance(pair, ReplaceOne):
        return pair.sigma / 2.0
    base = pair.base if isinstance(pair, (Sampled, FixedSize)) else None
    if isinstance(base, GaussianBase):
        return base.sigma
    if isinstance(base, LaplaceBase):
        return base.scale
    return 500.0 * SMALLEST_SIGMA / base.epsilon if isinstance(base, ResponseBase) else 0.0


def _bucketed(table: Array, most: int, rounding_up: bool) -> Array:
    """Rows (rate, sigma, count); more than ``most`` distinct pairs are rounded to fewer, towards more (or less) loss."""
    if len(table) <= most:
        return table
    table = table.copy()
    rates = np.unique(table[:, 0])
    if len(rates) > 8:
        table[:, 0] = _rounded(table[:, 0], 16, upwards=rounding_up)
        rates = np.unique(table[:, 0])
    table[:, 1] = _rounded(table[:, 1], max(2, most // len(rates)), upwards=not rounding_up)
    keys, member = np.unique(table[:, :2], axis=0, return_inverse=True)
    return np.column_stack([keys, np.bincount(member.ravel(), table[:, 2])])


def _rounded(values: Array, most: int, upwards: bool) -> Array:
    """Values rounded to a geometric grid of ``most`` values from the least to the largest."""
    grid = np.geomspace(values.min(), values.max(), most)
    grid[0], grid[-1] = values.min(), values.max()
    if upwards:
        return np.asarray(grid[np.searchsorted(grid, values, side="left")])
    return np.asarray(grid[np.searchsorted(grid, values, side="right") - 1])
