"""From scores to counts: what an attack that sees scores gets right, without choosing after the fact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ghostgrad.accounting._closed_forms import gaussian_epsilon
from ghostgrad.audit.bounds import errors_epsilon, errors_mu, one_run_epsilon, rate_upper
from ghostgrad.errors import ConfigurationError

Floats = NDArray[np.float64]
Coins = NDArray[np.bool_]


@dataclass(frozen=True)
class Guesses:
    """Guessed coins of one run, or of several: the bound needs no independence of the canaries.

    Attributes:
        correct: guesses that were right.
        guesses: how many coins were guessed; fixed before the scores were seen.
        canaries: coins tossed.
    """

    correct: int
    guesses: int
    canaries: int

    bound = "one-run bound (Steinke, Nasr and Jagielski 2023, theorem 5.2)"

    def epsilon_lower(self, delta: float, level: float) -> float:
        """The epsilon that is exceeded at ``delta``; wrong with probability at most ``level``, for all deltas together."""
        return one_run_epsilon(self.correct, self.guesses, self.canaries, delta, 1.0 - level)

    def __str__(self) -> str:
        return f"{self.correct} of {self.guesses} guesses right, of {self.canaries} canaries"


@dataclass(frozen=True)
class Errors:
    """Errors of a fixed threshold over independent trials.

    Attributes:
        false_alarms: trials with the canary left out that scored above the threshold.
        excluded: trials with the canary left out.
        misses: trials with the canary in that did not.
        included: trials with the canary in.
        gaussian: whether a trial is one release of the Gaussian mechanism, of which errors show more (`errors_mu`).
    """

    false_alarms: int
    excluded: int
    misses: int
    included: int
    gaussian: bool = False

    @property
    def bound(self) -> str:
        """Which bound it gives."""
        form = ", Gaussian form" if self.gaussian else ""
        return f"many-run bound (Clopper and Pearson on both error rates{form})"

    def rates(self, level: float) -> tuple[float, float]:
        """Upper bounds of the rate of false alarms and of misses, which hold together but for ``level``."""
        return (
            rate_upper(self.false_alarms, self.excluded, level / 2),
            rate_upper(self.misses, self.included, level / 2),
        )

    def mu_lower(self, level: float) -> float:
        """The mu of the Gaussian mechanism that is exceeded."""
        return errors_mu(*self.rates(level))

    def epsilon_lower(self, delta: float, level: float) -> float:
        """The epsilon that is exceeded at ``delta``; wrong with probability at most ``level``, for all deltas together."""
        found = errors_epsilon(*self.rates(level), delta)
        return max(found, gaussian_epsilon(self.mu_lower(level), delta)) if self.gaussian else found

    def __str__(self) -> str:
        return (
            f"{self.false_alarms} false alarms in {self.excluded} trials without the canary, "
            f"{self.misses} misses in {self.included} with it"
        )


Evidence = Guesses | Errors


def guess_extremes(scores: Floats, included: Coins, guesses: int) -> Guesses:
    """Guess that the highest scores are of canaries that are in, and the lowest of canaries that are out, half of each.

    >>> guess_extremes(np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, False, False, False]), 2)
    Guesses(correct=2, guesses=2, canaries=4)
    """
    order = np.argsort(scores, kind="stable")
    out, into = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return Guesses(int(included[into].sum() + (~included[out]).sum()), guesses, len(scores))


def count_errors(scores: Floats, included: Coins, threshold: float, *, gaussian: bool = False) -> Errors:
    """Errors of a threshold that was fixed before these scores were seen.

    >>> count_errors(np.array([0.9, 0.2, 0.7]), np.array([True, True, False]), 0.5)
    Errors(false_alarms=1, excluded=1, misses=1, included=2, gaussian=False)
    """
    alarm = scores > threshold
    return Errors(
        int(alarm[~included].sum()),
        int((~included).sum()),
        int((~alarm[included]).sum()),
        int(included.sum()),
        gaussian,
    )


def split_errors(scores: Floats, included: Coins, level: float) -> Errors:
    """Errors of a threshold that the first half of the trials chose, on the second half: the choice costs no confidence.

    The threshold is the one that separates most, by the mu that the first half shows with it.
    """
    half = len(scores) // 2
    seen, coins = scores[:half], included[:half]
    values = np.unique(seen)
    candidates = [*((values[1:] + values[:-1]) / 2).tolist(), *values[:1].tolist()]
    best = max(candidates, key=lambda threshold: count_errors(seen, coins, threshold).mu_lower(level), default=0.0)
    return count_errors(scores[half:], included[half:], best)


def default_guesses(canaries: int) -> tuple[int, ...]:
    """A tenth, a third and all of the canaries: few sure guesses show most of a leak that is large, many of one that is small."""
    return tuple(dict.fromkeys(max(1, round(canaries * share)) for share in (0.1, 1 / 3, 1)))


def check_scores(scores: Sequence[float] | Floats, included: Coins) -> Floats:
    """Scores as an array, one for each canary.

    Raises:
        ConfigurationError: another number of them, or NaN among them.
    """
    found = np.asarray(scores, dtype=np.float64)
    if found.shape != included.shape:
        raise ConfigurationError(
            f"scores have the shape {list(found.shape)} for {len(included)} canaries; give one each."
        )
    if bool(np.isnan(found).any()):
        raise ConfigurationError(
            f"the score of {int(np.isnan(found).sum())} canaries is NaN, which is neither high nor low. The model diverged, or "
            f"the score divides by zero; let it return a number, or minus infinity for canaries that look left out."
        )
    return found
