"""Dominating pairs on a mesh: privacy losses as masses at multiples of ``h``, never below the truth.

A *base* gives the masses of its unsampled log ratio ``t = log dP/dQ`` under both measures; a *pair* turns a base into the
privacy loss of a sampled release in one direction. `Loss` is connect-the-dots (Doroshenko, Ghazi, Kamath, Kumar and
Manurangsi 2022) written with per-bin masses: the masses p and r of a bin under P and Q move to its two ends so that both
are kept, which is the least pessimistic choice on the mesh and needs no difference of deltas.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri_exp

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Loss:
    """Masses ``mass[j]`` at losses ``(start + j) * h`` under P, and ``infinite`` at infinity."""

    start: int
    mass: Array
    infinite: float


class Pair(ABC):
    """One release in one direction: bin masses of its privacy loss under P and Q."""

    @abstractmethod
    def span(self, tail: float) -> tuple[float, float]:
        """Losses outside which P has at most ``tail`` mass, on either side."""

    @abstractmethod
    def bins(self, edges: Array) -> tuple[Array, Array]:
        """P and Q masses between ``edges``, a growing sequence of losses, and beyond: ``len(edges) + 1`` values."""

    def discretise(self, h: float, tail: float) -> Loss:
        """Return the connect-the-dots masses with mesh ``h``; mass above the span goes to infinity, below it up."""
        low, high = self.span(tail)
        first, last = math.floor(low / h) - 1, math.ceil(high / h) + 1
        edges: Array = np.arange(first, last + 1, dtype=np.float64) * h
        p, r = self.bins(edges)
        inner_p, inner_r = p[1:-1], r[1:-1]
        with np.errstate(over="ignore", invalid="ignore"):
            up = np.nan_to_num((inner_p - inner_r * np.exp(edges[:-1])) / -math.expm1(-h), nan=np.inf)
        up = np.clip(up, 0.0, inner_p)
        mass = np.zeros(len(edges))
        mass[:-1] += inner_p - up
        mass[1:] += up
        mass[0] += p[0]
        return Loss(first, mass, float(p[-1]))


class Base(ABC):
    """An unsampled release and its log ratio ``t``; P is with the record, Q without, each the other's mirror image."""

    @abstractmethod
    def top(self, tail: float) -> float:
        """A value of ``t`` above which P has at most ``tail`` mass (Q has less)."""

    @abstractmethod
    def masses(self, edges: Array) -> tuple[Array, Array]:
        """Masses of ``t`` under P and Q in ``(-inf, e0], (e0, e1], .., (en, inf)``."""


def _between(below: Array, above: Array) -> Array:
    """Masses between edges from the distribution function and its complement, whichever is the more exact."""
    left = np.diff(below, prepend=0.0, append=1.0)
    right = -np.diff(above, prepend=1.0, append=0.0)
    use_left = np.concatenate([below, [1.0]]) < 0.5
    return np.maximum(np.where(use_left, left, right), 0.0)


@dataclass(frozen=True)
class GaussianBase(Base):
    """N(1, sigma^2) against N(0, sigma^2)."""

    sigma: float

    def top(self, tail: float) -> float:
        x = 1.0 + self.sigma * max(1.0, -float(ndtri_exp(math.log(tail))))
        return (2.0 * x - 1.0) / (2.0 * self.sigma**2)

    def masses(self, edges: Array) -> tuple[Array, Array]:
        shifted, half = edges * self.sigma, 0.5 / self.sigma
        p = _between(ndtr(shifted - half), ndtr(half - shifted))
        return p, _between(ndtr(shifted + half), ndtr(-shifted - half))


@dataclass(frozen=True)
class LaplaceBase(Base):
    """Laplace noise of ``scale`` about 1 against about 0: ``t`` has atoms at both ends of ``[-1 / scale, 1 / scale]``."""

    scale: float

    def top(self, tail: float) -> float:
        return 1.0 / self.scale

    def masses(self, edges: Array) -> tuple[Array, Array]:
        end = 1.0 / self.scale
        slack = 1e-12 * end
        where = np.clip(edges, -end, end)
        above_q = np.where(
            edges >= end - slack, 0.0, np.where(edges < -end - slack, 1.0, 0.5 * np.exp(-(where + end) / 2))
        )
        below_p = np.where(
            edges >= end - slack, 1.0, np.where(edges < -end - slack, 0.0, 0.5 * np.exp((where - end) / 2))
        )
        return _between(below_p, 1.0 - below_p), _between(1.0 - above_q, above_q)


@dataclass(frozen=True)
class ResponseBase(Base):
    """Randomised response, which dominates every ``epsilon``-DP release."""

    epsilon: float

    def top(self, tail: float) -> float:
        return self.epsilon

    def masses(self, edges: Array) -> tuple[Array, Array]:
        yes, no = 1.0 / (1.0 + math.exp(-self.epsilon)), 1.0 / (1.0 + math.exp(self.epsilon))
        slack = 1e-12 * self.epsilon
        low, high = edges >= -self.epsilon - slack, edges >= self.epsilon - slack
        below_p, above_p = np.where(high, 1.0, np.where(low, no, 0.0)), np.where(high, 0.0, np.where(low, yes, 1.0))
        below_q, above_q = np.where(high, 1.0, np.where(low, yes, 0.0)), np.where(high, 0.0, np.where(low, no, 1.0))
        return _between(below_p, above_p), _between(below_q, above_q)


@dataclass(frozen=True)
class Sampled(Pair):
    """Poisson sampling of ``base`` at ``rate`` in (0, 1]: ``(1 - q) Q + q P`` against ``Q``, or the other way round."""

    base: Base
    rate: float
    remove: bool = True

    def _loss(self, t: float) -> float:
        if self.rate == 1.0:
            return t
        return math.log1p(self.rate * math.expm1(t)) if t < 700.0 else t + math.log(self.rate)

    def _ratio(self, loss: Array) -> Array:
        """``t`` at which ``log(1 - q + q exp(t))`` is ``loss``; ``-inf`` below its range."""
        if self.rate == 1.0:
            return loss
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            inner = np.log1p(np.maximum(np.expm1(np.minimum(loss, 1.0)) / self.rate, -1.0))
            outer = loss - math.log(self.rate) + np.log1p(-(1.0 - self.rate) * np.exp(-np.maximum(loss, 1.0)))
        return np.where(loss < 1.0, inner, outer)

    def span(self, tail: float) -> tuple[float, float]:
        top = self.base.top(tail)
        if self.remove:
            return self._loss(-top) if self.rate == 1.0 else math.log1p(-self.rate), self._loss(top)
        # P is Q of the base here; by the mirror symmetry of the base its t lies in (-top, top) but for the tail.
        return -self._loss(top), top if self.rate == 1.0 else -math.log1p(-self.rate)

    def bins(self, edges: Array) -> tuple[Array, Array]:
        if self.remove:
            p, r = self.base.masses(self._ratio(edges))
            return (1.0 - self.rate) * r + self.rate * p, r
        p, r = self.base.masses(self._ratio(-edges[::-1]))
        return r[::-1], ((1.0 - self.rate) * r + self.rate * p)[::-1]


@dataclass(frozen=True)
class FixedSize(Pair):
    """Sampling without replacement at ``rate``, replace-one; ``base`` at the doubled sensitivity.

    Zhu, Dong and Wang (2022), proposition 30: the curve of ``((1-q)Q + qP, Q)`` above ratio 1 and that of
    ``(P, (1-q)P + qQ)`` below; the slope that is missing at ratio 1 is an atom at loss 0.
    """

    base: Base
    rate: float

    def span(self, tail: float) -> tuple[float, float]:
        above, below = Sampled(self.base, self.rate).span(tail), Sampled(self.base, self.rate, False).span(tail)
        return below[0], above[1]

    def bins(self, edges: Array) -> tuple[Array, Array]:
        split = np.unique(np.concatenate([edges, [0.0]]))
        middle = int(np.searchsorted(split, 0.0))
        above = Sampled(self.base, self.rate).bins(split)
        below = Sampled(self.base, self.rate, False).bins(split)
        merged = []
        for high, low in zip(above, below, strict=True):
            values = np.concatenate([low[: middle + 1], high[middle + 1 :]])
            values[middle] += max(0.0, 1.0 - values.sum())
            merged.append(values)
        if len(split) != len(edges):  # 0 was no edge: join the two halves of its bin
            merged = [np.concatenate([m[:middle], [m[middle] + m[middle + 1]], m[middle + 2 :]]) for m in merged]
        return merged[0], merged[1]


@dataclass(frozen=True)
class ReplaceOne(Pair):
    """A Poisson-sampled Gaussian when one record is replaced: means +1 against -1, each with probability ``rate``.

    The pair dominates. Replacing u by u' (norms at most 1) turns ``(1-q) N(0) + q N(u)`` into ``(1-q) N(0) + q N(u')``. For
    a set A with mass Phi(z) under N(0), Neyman and Pearson give N(u)(A) <= Phi(z + 1/sigma) and N(u')(A) >=
    Phi(z - 1/sigma); both hold with equality for a half line and means +1, -1. So no ``P(A) - t Q(A)`` is larger than theirs.
    The loss is monotone in the output and its own mirror image.
    """

    sigma: float
    rate: float

    def span(self, tail: float) -> tuple[float, float]:
        x = 1.0 + self.sigma * max(1.0, -float(ndtri_exp(math.log(tail))))
        spread = [math.log1p(-self.rate), math.log1p(-self.rate)]
        for index, sign in enumerate((1.0, -1.0)):
            exponent = (2.0 * sign * x - 1.0) / (2.0 * self.sigma**2) + math.log(self.rate)
            spread[index] = float(np.logaddexp(spread[index], exponent))
        return spread[1] - spread[0], spread[0] - spread[1]

    def _output(self, loss: Array) -> Array:
        """The output x at a loss: the root of a quadratic in ``exp(x / sigma^2)``, by symmetry for losses >= 0."""
        size = np.minimum(np.abs(loss), 700.0)
        log_c = math.log(self.rate) - 0.5 / self.sigma**2
        log_b = np.log(1.0 - self.rate) + np.log(np.maximum(np.expm1(size), 1e-300))
        root = 0.5 * np.logaddexp(2.0 * log_b, math.log(4.0) + 2.0 * log_c + size)
        log_y = np.logaddexp(log_b, root) - math.log(2.0) - log_c
        return np.asarray(np.sign(loss) * self.sigma**2 * log_y)

    def bins(self, edges: Array) -> tuple[Array, Array]:
        x = self._output(edges) / self.sigma
        shift = 1.0 / self.sigma
        here, up, down = (_between(ndtr(x - m), ndtr(m - x)) for m in (0.0, shift, -shift))
        return (1.0 - self.rate) * here + self.rate * up, (1.0 - self.rate) * here + self.rate * down
