"""Calibration: the one unknown that meets a target, bracketed and never above it.

``accountant`` is a name, or an accountant whose options are kept and whose ledger is already spent (it is not changed).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

from ghostgrad.accounting._attacks import true_positive_bound
from ghostgrad.accounting._checks import MOST, check_count, check_delta, check_noise, check_positive, check_rate
from ghostgrad.accounting.base import Accountant, AccountingWarning, fresh
from ghostgrad.errors import ConfigurationError

TOLERANCE = 1e-4
_SMALLEST_NOISE = 1e-3
_LARGEST_NOISE = 1e9
_MOST_STEPS = 1 << 50


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
    count = passes / sample_rate
    if not count <= MOST:
        raise ConfigurationError(
            f"epochs={passes:g} at sample_rate={sample_rate:g} are {count:g} steps, more than can be counted; check both."
        )
    return max(1, round(count))


def get_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    steps: int | None = None,
    epochs: float | None = None,
    accountant: str | Accountant = "rdp",
) -> float:
    """Return the smallest noise multiplier whose epsilon is at most ``target_epsilon``, within 1e-4 relative below it.

    Raises:
        ConfigurationError: An argument is out of range, or no noise meets the target (the nearest possible is said).

    >>> sigma = get_noise_multiplier(target_epsilon=3.0, target_delta=1e-5, sample_rate=0.01, steps=1000)
    >>> round(sigma, 2)
    0.86
    """
    target = check_positive(target_epsilon, "target_epsilon")
    delta = check_delta(target_delta, "target_delta")
    rate, count = _plan(sample_rate, steps, epochs)

    def epsilon(sigma: float) -> float:
        return _epsilon(accountant, sigma, rate, count, delta)

    return smallest_noise(epsilon, target, f"target_epsilon={target} at target_delta={delta}")


def get_steps(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    noise_multiplier: float,
    accountant: str | Accountant = "rdp",
) -> int:
    """Return the largest number of steps whose epsilon is at most ``target_epsilon``.

    Raises:
        ConfigurationError: Even one step costs more (its epsilon is said), or no number of steps costs as much.

    >>> get_steps(target_epsilon=3.0, target_delta=1e-5, sample_rate=0.01, noise_multiplier=1.0) > 2000
    True
    """
    target, sigma = check_positive(target_epsilon, "target_epsilon"), check_noise(noise_multiplier)
    delta, rate = check_delta(target_delta, "target_delta"), check_rate(sample_rate)
    return most_steps(lambda count: _epsilon(accountant, sigma, rate, count, delta), target)


def most_steps(epsilon: Callable[[int], float], target: float) -> int:
    """Return the largest count with ``epsilon(count) <= target`` for a growing ``epsilon``, at least 1.

    >>> most_steps(lambda count: 0.1 * count, 1.05)
    10
    """
    low, high, cost = 1, 2, epsilon(1)
    if cost > target:
        raise ConfigurationError(
            f"target_epsilon={target} is less than one step costs ({cost:.6g}); use more noise or a lower sample_rate."
        )
    while epsilon(high) <= target:
        low, high = high, 2 * high
        if high > _MOST_STEPS:
            raise ConfigurationError(
                f"target_epsilon={target} is not reached within {low} steps; there is no need to limit them."
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon(middle) <= target else (low, middle)
    return low


def get_sample_rate(
    *,
    target_epsilon: float,
    target_delta: float,
    noise_multiplier: float,
    steps: int | None = None,
    epochs: float | None = None,
    accountant: str | Accountant = "rdp",
) -> float:
    """Return the largest sample rate whose epsilon is at most ``target_epsilon``, within 1e-4 relative below it.

    With ``epochs`` the number of steps shrinks as the rate grows. A target that even full batches meet returns 1.

    Raises:
        ConfigurationError: Even the smallest rate (1e-9, or one record in a million steps an epoch) costs more.

    >>> rate = get_sample_rate(target_epsilon=3.0, target_delta=1e-5, noise_multiplier=1.0, steps=1000)
    >>> 0.012 < rate < 0.016
    True
    """
    target, sigma = check_positive(target_epsilon, "target_epsilon"), check_noise(noise_multiplier)
    delta = check_delta(target_delta, "target_delta")
    smallest = 1e-9 if epochs is None else 1e-6

    def epsilon(rate: float) -> float:
        return _epsilon(accountant, sigma, rate, total_steps(steps, epochs, rate), delta)

    if epsilon(1.0) <= target:
        return 1.0
    cost = epsilon(smallest)
    if cost > target:
        raise ConfigurationError(
            f"target_epsilon={target} at target_delta={delta} cannot be met by sample_rate: at {smallest:g} it is still "
            f"{cost:.6g}; ask for that or more, or use more noise."
        )
    # In terms of 1 / rate the cost falls, as it does in sigma.
    return 1.0 / _close_in(lambda t: epsilon(1.0 / t), target, 1.0, epsilon(1.0), 1.0 / smallest, cost)


def get_batch_size(
    *,
    dataset_size: int,
    target_epsilon: float,
    target_delta: float,
    noise_multiplier: float,
    steps: int | None = None,
    epochs: float | None = None,
    accountant: str | Accountant = "rdp",
) -> int:
    """Return the largest expected batch size whose epsilon is at most ``target_epsilon``.

    Raises:
        ConfigurationError: Even batches of one record cost more.

    >>> get_batch_size(dataset_size=60000, target_epsilon=3.0, target_delta=1e-5, noise_multiplier=1.0, steps=1000) > 700
    True
    """
    size = check_count(dataset_size, "dataset_size")
    rate = get_sample_rate(
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        noise_multiplier=noise_multiplier,
        steps=steps,
        epochs=epochs,
        accountant=accountant,
    )
    batch = min(size, math.floor(rate * size * (1.0 + 1e-12)))
    if batch < 1:
        raise ConfigurationError(
            f"target_epsilon={target_epsilon} allows sample_rate={rate:.3g}, less than one of {size} records per step; "
            "use more noise or fewer steps."
        )
    return batch


def get_noise_multiplier_for_attack(
    *,
    sample_rate: float,
    steps: int | None = None,
    epochs: float | None = None,
    advantage: float | None = None,
    tpr: float | None = None,
    fpr: float | None = None,
    accountant: str | Accountant = "pld",
) -> float:
    """Return the smallest noise multiplier under which every membership attack stays below a success.

    Pass ``advantage`` (the largest allowed true minus false positive rate), or ``tpr`` and ``fpr`` (the largest allowed
    true positive rate at that false positive rate). Within 1e-4 relative below the target. For adding or removing one
    record: the attacker knows all other records and every released model.

    Raises:
        ConfigurationError: Neither or both are given, or the target is not in (0, 1); ``tpr`` must exceed ``fpr``.

    >>> sigma = get_noise_multiplier_for_attack(advantage=0.2, sample_rate=0.01, steps=1000)
    >>> 0.6 < sigma < 1.2
    True
    """
    rate, count = _plan(sample_rate, steps, epochs)
    if (advantage is None) == (tpr is None or fpr is None):
        raise ConfigurationError(f"advantage={advantage}, tpr={tpr}, fpr={fpr}: pass advantage alone, or tpr and fpr.")
    if advantage is not None:
        target = check_delta(advantage, "advantage")
        what = f"advantage={target}"
    else:
        target, at = check_delta(tpr, "tpr"), check_delta(fpr, "fpr")
        what = f"tpr={target} at fpr={at}"
        if target <= at:
            raise ConfigurationError(f"{what} is what guessing reaches; ask for tpr above fpr={at}.")

    def success(sigma: float) -> float:
        held = fresh(accountant)
        held.step(noise_multiplier=sigma, sample_rate=rate, steps=count)
        return held.get_delta(0.0) if advantage is not None else true_positive_bound(held, at)

    return smallest_noise(success, target, what)


def _plan(sample_rate: float, steps: int | None, epochs: float | None) -> tuple[float, int]:
    rate = check_rate(sample_rate)
    count = total_steps(steps, epochs, rate)
    if rate == 0.0 or count == 0:
        raise ConfigurationError(
            f"sample_rate={rate}, steps={count}: nothing is released, epsilon is 0 with any noise; check them."
        )
    return rate, count


def _epsilon(accountant: str | Accountant, sigma: float, rate: float, count: int, delta: float) -> float:
    held = fresh(accountant)
    held.step(noise_multiplier=sigma, sample_rate=rate, steps=count)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", AccountingWarning
        )  # a search passes through loose places; its end is what counts
        return held.get_epsilon(delta)


def smallest_noise(
    cost: Callable[[float], float], target: float, what: str, start: float = 1.0, closest: float = 1e-13
) -> float:
    """Return sigma with ``target * (1 - 1e-4) <= cost(sigma) <= target`` for a falling ``cost``.

    Where even almost no noise (sigma 0.001) costs less than the target, that sigma is returned; where the cost jumps over
    the target, the first sigma below it, to ``closest`` relative.
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
    return _close_in(cost, target, low, cost_low, high, cost_high, closest)


def _close_in(
    cost: Callable[[float], float],
    target: float,
    low: float,
    cost_low: float,
    high: float,
    cost_high: float,
    closest: float = 1e-13,
) -> float:
    """Bracketed secant on ``log cost`` over ``log sigma``, aimed half a tolerance below the target, with bisection.

    An end that stays put counts for half (the Illinois rule), so that the other does not creep.
    """
    aim = math.log(target * (1.0 - 0.4 * TOLERANCE))
    low_weight, high_weight, moved = 1.0, 1.0, ""
    for turn in range(200):
        if cost_high >= target * (1.0 - TOLERANCE) or high / low < 1.0 + closest:
            break
        share = 0.5
        if turn % (4 if turn < 8 else 2) != (3 if turn < 8 else 1) and cost_high > 0.0 and math.isfinite(cost_low):
            above = low_weight * (math.log(cost_low) - aim)
            below = high_weight * (aim - math.log(cost_high))
            share = above / (above + below)
            # Not onto the old bracket ends: step a little past the estimate so that both ends move.
            share = min(max(share, 0.01), 0.99)
        sigma = low * (high / low) ** share
        value = cost(sigma)
        if value <= target:
            high, cost_high = sigma, value
            low_weight, high_weight, moved = (low_weight / 2.0 if moved == "high" else 1.0), 1.0, "high"
        else:
            low, cost_low = sigma, value
            low_weight, high_weight, moved = 1.0, (high_weight / 2.0 if moved == "low" else 1.0), "low"
    return high
