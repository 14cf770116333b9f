"""Argument checks shared by the accountants: one wording for one fault."""

from __future__ import annotations

import math
from numbers import Integral, Real

from ghostgrad.errors import ConfigurationError


def _real(name: str, value: object) -> float:
    if type(value) is float:  # the usual case, asked at every step
        number = value
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigurationError(f"{name}={value!r} is not a real number; pass a float.")
    else:
        number = float(value)
    if not math.isfinite(number):
        raise ConfigurationError(
            f"{name}={number} is not finite, so no privacy can be computed from it; pass a number."
        )
    return number


def check_delta(delta: object, name: str = "delta") -> float:
    """Return ``delta`` as a float strictly between 0 and 1; raise ``ConfigurationError`` otherwise."""
    number = _real(name, delta)
    if not 0.0 < number < 1.0:
        raise ConfigurationError(
            f"{name}={number} is outside (0, 1); pass the failure probability, well below 1 / (number of records)."
        )
    return number


def check_epsilon(epsilon: object, name: str = "epsilon") -> float:
    """Return ``epsilon`` as a finite float >= 0; raise ``ConfigurationError`` otherwise."""
    number = _real(name, epsilon)
    if number < 0.0:
        raise ConfigurationError(f"{name}={number} is negative; epsilon is at least 0.")
    return number


def check_positive(value: object, name: str) -> float:
    """Return ``value`` as a finite float > 0; raise ``ConfigurationError`` otherwise."""
    number = _real(name, value)
    if number <= 0.0:
        raise ConfigurationError(f"{name}={number} is not positive; pass a number above 0.")
    return number


def check_rate(rate: object, name: str = "sample_rate") -> float:
    """Return ``rate`` as a float in [0, 1]; raise ``ConfigurationError`` otherwise."""
    number = _real(name, rate)
    if not 0.0 <= number <= 1.0:
        raise ConfigurationError(
            f"{name}={number} is outside [0, 1]; pass a record's probability per step, batch size / dataset size."
        )
    return number


def check_noise(noise_multiplier: object, name: str = "noise_multiplier") -> float:
    """Return ``noise_multiplier`` as a finite float >= 0; raise ``ConfigurationError`` otherwise."""
    number = _real(name, noise_multiplier)
    if number < 0.0:
        raise ConfigurationError(f"{name}={number} is negative; it is a standard deviation in units of max_grad_norm.")
    return number


def check_count(count: object, name: str = "steps") -> int:
    """Return ``count`` as an int >= 0; raise ``ConfigurationError`` otherwise."""
    if type(count) is not int and (isinstance(count, bool) or not isinstance(count, Integral)):
        whole = isinstance(count, Real) and math.isfinite(float(count)) and float(count).is_integer()
        if isinstance(count, bool) or not whole:
            raise ConfigurationError(f"{name}={count!r} is not a whole number; pass an int >= 0.")
    number = int(count)  # type: ignore[call-overload]
    if number < 0:
        raise ConfigurationError(f"{name}={number} is negative; steps that were taken cannot be taken back.")
    return int(number)
