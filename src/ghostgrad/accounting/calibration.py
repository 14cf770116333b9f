"""Calibration: the one unknown that meets a target, bracketed and never above it."""

from __future__ import annotations

import math
from collections.abc import Callable

from ghostgrad.accounting._checks import check_count, check_delta, check_positive, check_rate
from ghostgrad.accounting.base import create_accountant
from ghostgrad.errors import ConfigurationError

TOLERANCE = 1e-4
_SMALLEST_NOISE = 1e-3
_LARGEST_NOISE = 1e9


def total_steps(steps: int | None, epochs: float | None, sample_rate: float) -> int:
    """Return ``steps``, or those of ``epochs`` passes at ``sample_rate``: ``round(epochs / sample_rate)``, at least 1.

    >>> total_steps(None, 20, 0.01)
    2000
    """
    if (steps is None) == (epochs is None):
        raise ConfigurationError(f"steps={steps!r} and epochs={epochs!r}: pass exactly one of the two.")
    if steps is not None:
        return check_count(steps)
    passes = check_positive(epochs, "epochs")
    if sample_rate == 0.0:
        raise ConfigurationError("sample_rate=0.0 has no epochs; pass steps.")
    return max(1, round(passes / sample_rate))


def get_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int | None = None,
    epochs: float | None = None,
    accountant: str = "rdp",
) -> float:
    """Return the smallest noise multiplier whose epsilon is at most ``target_epsilon``, within 1e-4 relative below it.

    Raises:
        ConfigurationError: An argument is out of range, or no noise meets the target (the nearest possible is said).

    >>> sigma = get_noise_multiplier(target_epsilon=3.0, target_delta=1e-5, sample_rate=0.01, steps=1000)
    >>> round(sigma, 2)
    0.86
    """
    target = check_positive(target_epsilon, "target_epsilon")
    delta, rate = check_delta(target_delta, "target_delta"), check_rate(sample_rate)
    count = total_steps(steps, epochs, rate)
    if rate == 0.0 or count == 0:
        raise ConfigurationError(
            f"sample_rate={rate}, steps={count}: nothing is released, epsilon is 0 with any noise; check them."
        )

    def epsilon(sigma: float) -> float:
        held = create_accountant(accountant)
        held.step(noise_multiplier=sigma, sample_rate=rate, steps=count)
        return held.get_epsilon(delta)

    return smallest_noise(epsilon, target, f"target_epsilon={target} at target_delta={delta}")


def smallest_noise(cost: Callable[[float], float], target: float, what: str, start: float = 1.0) -> float:
    """Return sigma with ``target * (1 - 1e-4) <= cost(sigma) <= target`` for a falling ``cost``.

    Where even almost no noise (sigma 0.001) costs less than the target, that sigma is returned.
    """
    low = high = start
    cost_high = cost_low = cost(start)
    while cost_high > target:
        low, cost_low = high, cost_high
        high = high * (2.0 if high < 16.0 else 8.0)
        if high > _LARGEST_NOISE:
            raise ConfigurationError(
                f"{what} cannot be met by noise: at noise_multiplier={low:.3g} it is still {cost_low:.6g}; "
                "ask for that or more, take fewer steps, or a larger delta."
            )
        cost_high = cost(high)
    while cost_low <= target:
        if cost_low >= target * (1.0 - TOLERANCE) or low <= _SMALLEST_NOISE:
            return low
        high, cost_high = low, cost_low
        low = max(low / 2.0, _SMALLEST_NOISE)
        cost_low = cost(low)
    return _close_in(cost, target, low, cost_low, high, cost_high)


def _close_in(
    cost: Callable[[float], float], target: float, low: float, cost_low: float, high: float, cost_high: float
) -> float:
    """Bracketed secant on ``log cost`` over ``log sigma``, aimed half a tolerance below the target, with bisection."""
    aim = math.log(target * (1.0 - 0.4 * TOLERANCE))
    for turn in range(200):
        if cost_high >= target * (1.0 - TOLERANCE) or high / low < 1.0 + 1e-13:
            break
        share = 0.5
        if turn % 4 != 3 and cost_high > 0.0 and math.isfinite(cost_low):
            above, below = math.log(cost_low), math.log(cost_high)
            share = (above - aim) / (above - below)
            # Not onto the old bracket ends: step a little past the estimate so that both ends move.
            share = min(max(share, 0.01), 0.99)
        sigma = low * (high / low) ** share
        value = cost(sigma)
        if value <= target:
            high, cost_high = sigma, value
        else:
            low, cost_low = sigma, value
    return high
