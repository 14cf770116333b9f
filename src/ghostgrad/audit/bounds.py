"""Lower bounds on epsilon from what an attack got right, on numpy and scipy alone.

Each is a confidence bound: a mechanism that *is* (epsilon, delta)-differentially private gets a larger lower bound with
probability at most ``1 - confidence``, over its own randomness and the coins that put canaries in or left them out.
Neighbouring: add or remove one canary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import bdtr, betaincinv, expit, ndtri

from ghostgrad.errors import ConfigurationError

_MOST_EPSILON = 700.0
"""Beyond, ``exp(epsilon)`` is no float; no finite number of guesses shows as much."""


def check_confidence(confidence: float) -> float:
    """Refuse what is no confidence level in (0.5, 1); at one half and below nothing would be shown."""
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0.5 < confidence < 1:
        raise ConfigurationError(f"confidence={confidence!r} must lie between 0.5 and 1, for example 0.95.")
    return float(confidence)


def one_run_p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """The largest probability of so many correct guesses under (epsilon, delta)-differential privacy.

    Steinke, Nasr and Jagielski (2023), theorem 5.2: each of ``m`` canaries is in by a fair coin of its own, and at most ``r``
    of the coins are guessed. With W binomial of ``r`` trials and success ``e^epsilon / (1 + e^epsilon)``,
    ``P(V >= v) <= P(W >= v) + 2 m delta max_i P(v > W >= v - i) / i`` over i from 1 to m.

    Args:
        correct: v, guesses that were right.
        guesses: r, fixed before the scores were seen; which coins are guessed may depend on the scores.
        canaries: m, of all runs together: canaries of other runs have coins of their own as well.
        epsilon, delta: the guarantee that is doubted.

    >>> round(one_run_p_value(75, 100, 1000, epsilon=0.673, delta=1e-4), 3)
    0.05
    """
    _check_counts(correct, guesses, canaries)
    success = float(expit(epsilon))
    below = float(bdtr(correct - 1, guesses, success)) if correct else 0.0
    if delta == 0.0 or correct == 0:
        return 1.0 - below
    # P(v > W >= v - i) for i = 1..v; a larger i adds nothing to it.
    steps = np.arange(1, correct + 1)
    further = np.where(steps < correct, bdtr(np.maximum(correct - 1 - steps, 0), guesses, success), 0.0)
    return float(min(1.0, 1.0 - below + 2.0 * canaries * delta * np.max((below - further) / steps)))


def one_run_epsilon(correct: int, guesses: int, canaries: int, delta: float, confidence: float) -> float:
    """The epsilon that so many correct guesses exceed at ``delta``, >= 0: where `one_run_p_value` is ``1 - confidence``.

    What is rejected at an epsilon is rejected at all smaller ones, since (epsilon, delta) implies (epsilon', delta) for
    epsilon' above; so the search needs no monotone p-value.

    >>> round(one_run_epsilon(75, 100, 1000, delta=1e-4, confidence=0.95), 3)
    0.673
    """
    level = 1.0 - check_confidence(confidence)

    def rejected(epsilon: float) -> bool:
        return one_run_p_value(correct, guesses, canaries, epsilon, delta) < level

    return _largest(rejected)


def _largest(rejected: Callable[[float], bool]) -> float:
    if not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high) and high < _MOST_EPSILON:
        low, high = high, 2.0 * high
    while high - low > 1e-9 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def rate_upper(hits: int, trials: int, level: float) -> float:
    """The one-sided upper bound of a rate that fails with probability at most ``level``: Clopper and Pearson (1934).

    It holds as well for the mean of trials whose rates differ, if there are fewer hits than that mean by one or more (Hoeffding
    1956, theorem 4).

    >>> round(rate_upper(0, 100, 0.05), 4)
    0.0295
    """
    if not 0 <= hits <= trials:
        raise ConfigurationError(f"hits={hits} of trials={trials}: count from 0 to the number of trials.")
    return 1.0 if hits == trials else float(betaincinv(hits + 1, trials - hits, 1.0 - level))


def errors_epsilon(false_alarms: float, misses: float, delta: float) -> float:
    """The epsilon, >= 0, that an attack of these error rates shows at ``delta``.

    ``P(alarm | in) <= e^epsilon P(alarm | out) + delta`` and the same of no alarm: Kairouz, Oh and Viswanath (2015), theorem 2.1;
    Jagielski, Ullman and Oprea (2020), section 3. Upper confidence bounds of the rates give a lower one of epsilon.

    >>> round(errors_epsilon(0.1, 0.2, 0.0), 4)
    2.0794
    """
    found = 0.0
    for rate, other in ((false_alarms, misses), (misses, false_alarms)):
        ahead = 1.0 - delta - other
        if ahead > 0.0:
            found = max(found, math.log(ahead / rate) if rate > 0.0 else math.inf)
    return found


def errors_mu(false_alarms: float, misses: float) -> float:
    """The mu, >= 0, of the Gaussian mechanism whose best attack has these error rates; a larger mu is less private.

    Its trade-off curve is ``miss = Phi(Phi^-1(1 - false alarm) - mu)``: Dong, Roth and Su (2022), equation 6; as a lower bound of
    an audit: Nasr et al. (2023), "Tight Auditing of Differentially Private Machine Learning", section 4.2.

    >>> round(errors_mu(0.5, 0.5), 4), round(errors_mu(0.1586553, 0.1586553), 4)
    (0.0, 2.0)
    """
    return max(0.0, -float(ndtri(false_alarms)) - float(ndtri(misses)))


def _check_counts(correct: int, guesses: int, canaries: int) -> None:
    if not 0 <= correct <= guesses <= canaries:
        raise ConfigurationError(
            f"correct={correct}, guesses={guesses}, canaries={canaries}: each must be at most the next, and none negative."
        )
