"""What a logical step is reported as: which sampling its batch came from, and with how much noise."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence, Set

from ghostgrad.accounting import Accountant
from ghostgrad.errors import BudgetExhausted, ConfigurationError


class Spending(ABC):
    """Turns a logical step into releases."""

    guarantee: str
    """Which neighbouring relation and sampling the numbers hold for, as a sentence."""

    @abstractmethod
    def releases(self, noise_multiplier: float, draws: int, epochs: Set[int]) -> list[tuple[float, float, int]]:
        """``(noise_multiplier, sample_rate, steps)`` of a step over ``draws`` loader batches from these passes."""

    @abstractmethod
    def note(self, noise_multiplier: float, epochs: Set[int]) -> None:
        """The step was made."""

    def state_dict(self) -> list[list[float]]:
        """What was noted, as plain values."""
        return []

    def load_state_dict(self, state: Iterable[Sequence[float]]) -> None:  # noqa: B027 (nothing is noted by most)
        """Go on from what `state_dict` returned."""


class PoissonSpending(Spending):
    """Each draw takes every record independently with the sample rate.

    k draws added up in one step are k releases of noise multiplier ``sigma / sqrt(k)``: the step's noise of variance
    ``sigma^2 C^2`` is the sum of k shares of variance ``sigma^2 C^2 / k``, one for each draw.
    """

    guarantee = "neighbouring datasets differ by adding or removing one record; Poisson sampling"

    def __init__(self, sample_rate: float) -> None:
        self.sample_rate = sample_rate

    def releases(self, noise_multiplier: float, draws: int, epochs: Set[int]) -> list[tuple[float, float, int]]:
        k = max(1, draws)
        return [(noise_multiplier / math.sqrt(k), self.sample_rate, k)]

    def note(self, noise_multiplier: float, epochs: Set[int]) -> None:
        """Draws are independent: nothing to remember."""


class ShuffledSpending(Spending):
    """The user's own batches: a record is in at most one batch of a pass, and its order is not known to help.

    Without random sampling nothing is amplified. One record takes part once in each pass, so all steps of a pass together
    are one Gaussian release of the smallest noise multiplier among them (parallel composition), under zero-out
    adjacency: neighbouring datasets differ by blanking one record, which keeps its place in the order (Kairouz et al. 2021,
    section 1). A step over batches of k passes is shared out like k draws.
    """

    guarantee = "neighbouring datasets differ by blanking one record (zero-out adjacency); no amplification by sampling"

    def __init__(self) -> None:
        self._noted: set[tuple[int, float]] = set()

    def releases(self, noise_multiplier: float, draws: int, epochs: Set[int]) -> list[tuple[float, float, int]]:
        if not epochs:  # nothing of any record is in the step
            return []
        share = noise_multiplier / math.sqrt(len(epochs))
        new = sum((epoch, share) not in self._noted for epoch in epochs)
        return [(share, 1.0, new)] if new else []

    def note(self, noise_multiplier: float, epochs: Set[int]) -> None:
        self._noted |= {(epoch, noise_multiplier / math.sqrt(len(epochs))) for epoch in epochs}

    def state_dict(self) -> list[list[float]]:
        return [[epoch, share] for epoch, share in sorted(self._noted)]

    def load_state_dict(self, state: Iterable[Sequence[float]]) -> None:
        self._noted = {(int(epoch), float(share)) for epoch, share in state}


class Budget:
    """Refuses the release that would pass ``target_epsilon`` at ``target_delta``.

    Args:
        accountant: what was spent so far.
        target_epsilon, target_delta: the budget.
    """

    def __init__(self, accountant: Accountant, target_epsilon: float, target_delta: float) -> None:
        for name, value, top in (("target_epsilon", target_epsilon, math.inf), ("target_delta", target_delta, 1.0)):
            if value is None or not 0 < value < top:
                raise ConfigurationError(f"{name}={value} must lie between 0 and {top}.")
        self.accountant = accountant
        self.target_epsilon, self.target_delta = target_epsilon, target_delta
        self._allowed: dict[tuple[float, float], int] = {}
        self._expected = len(accountant)

    def check(self, releases: list[tuple[float, float, int]]) -> None:
        """Raise before a step that would spend too much.

        Raises:
            BudgetExhausted: naming what is spent and what the step would bring it to.
        """
        if len(self.accountant) != self._expected:
            self._allowed.clear()  # something else was spent in between
        self._expected = len(self.accountant) + sum(steps for _, _, steps in releases)
        for noise_multiplier, sample_rate, steps in releases:
            allowed = self._allowed.get((noise_multiplier, sample_rate), 0)
            if allowed < steps:
                allowed = self._look_ahead(noise_multiplier, sample_rate, steps)
            # What one kind of release uses up is no longer there for another.
            self._allowed = {(noise_multiplier, sample_rate): allowed - steps}

    def _look_ahead(self, noise_multiplier: float, sample_rate: float, steps: int) -> int:
        """How many such releases surely fit, so that epsilon need not be worked out at every step."""
        for ahead in (4096, 512, 64, 8, 1):
            if self._epsilon_after(noise_multiplier, sample_rate, ahead * steps) <= self.target_epsilon:
                return ahead * steps
        after = self._epsilon_after(noise_multiplier, sample_rate, steps)
        raise BudgetExhausted(
            f"this step would bring epsilon to {after:.4f} at delta={self.target_delta}, above "
            f"target_epsilon={self.target_epsilon}; {self.accountant.get_epsilon(self.target_delta):.4f} is spent. The "
            f"parameters were not touched. Stop training here, or plan more steps with a larger noise_multiplier."
        )

    def _epsilon_after(self, noise_multiplier: float, sample_rate: float, steps: int) -> float:
        trial = copy.deepcopy(self.accountant)
        trial.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        return trial.get_epsilon(self.target_delta)
