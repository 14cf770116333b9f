"""Exact privacy curves: the Gaussian mechanism, and one Poisson-sampled Gaussian step in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.special import erfcx, ndtr

_MARGIN = 6e-9  # above the rounding of the special functions and of the root search
_DELTA_MARGIN = 1e-10


def _mills(x: float) -> float:
    return math.sqrt(math.pi / 2.0) * float(erfcx(x / math.sqrt(2.0)))


def _mills_slope(middle: float, width: float) -> float:
    """The mean fall of Mills' ratio m over a small ``width``, without the difference of its ends: ``-m' = 1 - x m``."""
    mills = _mills(middle)
    fall = 1.0 - middle * mills
    bend = 2.0 * fall + middle * (middle * fall - mills)  # its second derivative, by m' = x m - 1
    return fall + width * width / 24.0 * bend


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Delta of a Gaussian mechanism with sensitivity / sigma = ``mu`` at any real ``epsilon``.

    Balle and Wang (2018), theorem 8, in a form that neither overflows nor loses its small values.

    >>> round(gaussian_delta(1.0, 1.0), 6)
    0.126937
    """
    if mu == 0.0:
        return max(0.0, -math.expm1(epsilon))
    low, high = epsilon / mu - mu / 2.0, epsilon / mu + mu / 2.0
    density = math.exp(-low * low / 2.0) / math.sqrt(2.0 * math.pi)
    if mu < 1e-3 and epsilon >= 0.0:
        return density * mu * _mills_slope(epsilon / mu, mu)
    if low > 0.0:
        return density * (_mills(low) - _mills(high))
    if high > 0.0:
        return float(ndtr(-low)) - density * _mills(high)
    return float(ndtr(-low)) - math.exp(epsilon) * float(ndtr(-high))


def invert(delta_of: Callable[[float], float], delta: float) -> float:
    """Return the epsilon >= 0 at which the falling ``delta_of`` reaches ``delta``; infinite if it never does."""
    if delta_of(0.0) <= delta:
        return 0.0
    high = 1.0
    while delta_of(high) > delta:
        high *= 2.0
        if high > 1e300:
            return math.inf
    low = 0.0 if high == 1.0 else high / 2.0
    while low == 0.0 and high > 1e-300 and delta_of(high / 2.0) <= delta:
        high /= 2.0
    least = 5e-324  # the smallest float: no delta is below it
    target = math.log(delta)
    return float(brentq(lambda e: math.log(max(delta_of(e), least)) - target, low, high, xtol=high * 1e-14, rtol=1e-14))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism with sensitivity / sigma = ``mu``.

    >>> round(gaussian_epsilon(1.0, 1e-5), 4)
    4.3772
    """
    return invert(lambda epsilon: gaussian_delta(epsilon, mu), delta)


def _log_shift(epsilon: float, rate: float) -> float:
    share = math.expm1(epsilon) / rate
    return math.log1p(share) if share < 1e300 else math.log(math.expm1(epsilon)) - math.log(rate)


def sampled_delta(epsilon: float, rate: float, sigma: float, remove: bool) -> float:
    """Delta of one Poisson-sampled Gaussian step at ``epsilon >= 0``, for removing or adding a record.

    The loss is monotone in the output, so the curve is that of the unsampled mechanism at a shifted epsilon (Zhu, Dong
    and Wang 2022, theorem 11).
    """
    mu = 1.0 / sigma
    if rate == 1.0:
        return gaussian_delta(epsilon, mu)
    if remove:
        # log(1 + (e^epsilon - 1) / rate), in the form that neither cancels nor overflows
        small = epsilon < 1.0
        shifted = (
            _log_shift(epsilon, rate)
            if small
            else epsilon - math.log(rate) + math.log1p(-(1.0 - rate) * math.exp(-epsilon))
        )
        return rate * gaussian_delta(shifted, mu)
    left = (math.expm1(-epsilon) + rate) / rate  # exp(shifted); none where the loss cannot reach epsilon
    if left <= 0.0:
        return 0.0
    return math.exp(epsilon) * rate * left * gaussian_delta(-math.log(left), mu)


@dataclass(frozen=True)
class ClosedForm:
    """A privacy curve known exactly: ``curves`` are the deltas of all directions at an epsilon."""

    curves: tuple[Callable[[float], float], ...]
    name: str = "closed form"

    def epsilon(self, delta: float) -> tuple[float, float]:
        """Lower and upper bounds of epsilon."""
        exact = max(invert(curve, delta) for curve in self.curves)
        # Where the curve is flat, epsilon's margin is less than delta's: what `delta` adds is taken off first.
        above = max(invert(curve, delta * (1.0 - 2.0 * _DELTA_MARGIN)) for curve in self.curves)
        return max(0.0, exact * (1.0 - _MARGIN)), above * (1.0 + _MARGIN)

    def delta(self, epsilon: float) -> tuple[float, float]:
        """Lower and upper bounds of delta."""
        exact = max(curve(epsilon) for curve in self.curves)
        return exact * (1.0 - _MARGIN), min(1.0, exact * (1.0 + _DELTA_MARGIN))


def gaussian_form(mu: float) -> ClosedForm:
    """The Gaussian mechanism, which is its own mirror image."""
    return ClosedForm((lambda epsilon: gaussian_delta(epsilon, mu),))


def sampled_form(rate: float, sigma: float) -> ClosedForm:
    """One Poisson-sampled Gaussian step."""
    return ClosedForm(
        (
            lambda epsilon: sampled_delta(epsilon, rate, sigma, remove=True),
            lambda epsilon: sampled_delta(epsilon, rate, sigma, remove=False),
        )
    )
