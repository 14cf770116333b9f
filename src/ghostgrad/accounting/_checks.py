"""Argument checks shared by the accountants: one wording for one fault."""

from __future__ import annotations

import math
from numbers import Integral, Real

from ghostgrad.errors import ConfigurationError

MOST = 1 << 53
"""The largest number of releases: whole numbers are exact floats up to it."""


def precision(sigma: float) -> float:
    """Return ``1 / sigma^2``; infinite, or that of a smaller sigma, near the ends of the range of floats: never too small.

    >>> precision(2.0), precision(1e-200), precision(1e200)
    (0.25, inf, 1e-300)
    """
    if sigma == 0.0:
        return math.inf
    inverse = 1.0 / min(
        sigma, 1e150
    )  # less noise costs more; parts of a millionth of the result are still normal numbers
    return inverse * inverse


def check_finite(value: object, name: str) -> float:
    """Return ``value`` as a finite float; raise ``ConfigurationError`` otherwise."""
    if type(value) is float:  # the usual case, asked at every step
        number = value
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigurationError(f"{name}={value!r} is not a real number; pass a float.")
    else:
        number = _as_float(value)
    if not math.isfinite(number):
        raise ConfigurationError(
            f"{name}={number} is not finite, so no privacy can be computed from it; pass a number."
        )
    return number


def _as_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number or fraction beyond the largest float
        return math.inf


def check_delta(delta: object, name: str = "delta") -> float:
    """Return ``delta`` as a float strictly between 0 and 1; raise ``ConfigurationError`` otherwise."""
    number = check_finite(delta, name)
    if not 0.0 < number < 1.0:
        raise ConfigurationError(
            f"{name}={number} is outside (0, 1); pass the failure probability, well below 1 / (number of records)."
        )
    return number


def check_epsilon(epsilon: object, name: str = "epsilon") -> float:
    """Return ``epsilon`` as a finite float >= 0; raise ``ConfigurationError`` otherwise."""
    number = check_finite(epsilon, name)
    if number < 0.0:
        raise ConfigurationError(f"{name}={number} is negative; epsilon is at least 0.")
    return number


def check_positive(value: object, name: str) -> float:
    """Return ``value`` as a finite float > 0; raise ``ConfigurationError`` otherwise."""
    number = check_finite(value, name)
    if number <= 0.0:
        raise ConfigurationError(f"{name}={number} is not positive; pass a number above 0.")
    return number


def check_rate(rate: object, name: str = "sample_rate") -> float:
    """Return ``rate`` as a float in [0, 1]; raise ``ConfigurationError`` otherwise."""
    number = check_finite(rate, name)
    if not 0.0 <= number <= 1.0:
        raise ConfigurationError(
            f"{name}={number} is outside [0, 1]; pass a record's probability per step, batch size / dataset size."
        )
    return number


def check_noise(noise_multiplier: object, name: str = "noise_multiplier") -> float:
    """Return ``noise_multiplier`` as a finite float >= 0; raise ``ConfigurationError`` otherwise."""
    number = check_finite(noise_multiplier, name)
    if number < 0.0:
        raise ConfigurationError(f"{name}={number} is negative; it is a standard deviation in units of max_grad_norm.")
    return number


def check_count(count: object, name: str = "steps") -> int:
    """Return ``count`` as an int from 0 to 2**53; raise ``ConfigurationError`` otherwise."""
    if type(count) is not int and (isinstance(count, bool) or not isinstance(count, Integral)):
        whole = isinstance(count, Real) and _as_float(count).is_integer()
        if isinstance(count, bool) or not whole:
            raise ConfigurationError(f"{name}={count!r} is not a whole number; pass an int >= 0.")
    number: int = int(count)  # type: ignore[call-overload]
    if number < 0:
        raise ConfigurationError(f"{name}={number} is negative; steps that were taken cannot be taken back.")
    if number > MOST:
        raise ConfigurationError(f"{name} is above 2**53, more than can be counted exactly; check it.")
    return number
