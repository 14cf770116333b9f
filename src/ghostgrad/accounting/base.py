"""One interface for every way to turn a ledger into epsilon, and the registry of such ways."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ghostgrad.accounting._checks import check_count, check_noise, check_rate
from ghostgrad.accounting.events import Event, FixedSizeSampled, Gaussian, PoissonSampled
from ghostgrad.accounting.ledger import Ledger
from ghostgrad.errors import ConfigurationError, choose


class AccountingWarning(UserWarning):
    """The bound is valid but looser than it could be, or it is an approximation."""


@dataclass(frozen=True)
class Bounds:
    """``lower <= true epsilon <= upper`` at a delta. ``lower`` is 0 where a method has no lower bound.

    >>> Bounds(lower=0.5, upper=1.0, delta=1e-5, neighbouring="add-or-remove-one", method="pld").error
    0.5
    """

    lower: float
    upper: float
    delta: float
    neighbouring: str
    method: str

    @property
    def error(self) -> float:
        """``upper - lower``."""
        return self.upper - self.lower


@dataclass(frozen=True)
class DeltaBounds:
    """``lower <= true delta <= upper`` at an epsilon. ``lower`` is 0 where a method has no lower bound.

    >>> DeltaBounds(lower=1e-7, upper=1e-6, epsilon=1.0, neighbouring="replace-one", method="pld").upper
    1e-06
    """

    lower: float
    upper: float
    epsilon: float
    neighbouring: str
    method: str


class Accountant(ABC):
    """Epsilon of the ledger of one run. Subclasses say how; the ledger and its upkeep are here.

    Guarantee: the ledger's releases together are (epsilon, delta)-differentially private for neighbouring datasets
    that differ by adding or removing one record; by replacing one where `neighbouring` says so.
    """

    mechanism: ClassVar[str]

    def __init__(self) -> None:
        self.ledger = Ledger()

    @abstractmethod
    def get_epsilon(self, delta: float) -> float:
        """Return epsilon (>= 0, possibly infinite) at ``delta`` in (0, 1)."""

    @abstractmethod
    def get_delta(self, epsilon: float) -> float:
        """Return delta in [0, 1] at ``epsilon`` (finite, >= 0)."""

    def get_bounds(self, delta: float) -> Bounds:
        """Return lower and upper bounds of the true epsilon; a method without a lower bound says 0."""
        return Bounds(0.0, self.get_epsilon(delta), delta, self.neighbouring, self.mechanism)

    def get_delta_bounds(self, epsilon: float) -> DeltaBounds:
        """Return lower and upper bounds of the true delta; a method without a lower bound says 0."""
        return DeltaBounds(0.0, self.get_delta(epsilon), epsilon, self.neighbouring, self.mechanism)

    @property
    def neighbouring(self) -> str:
        """``"add-or-remove-one"``, or ``"replace-one"`` where a fixed-size sample is in the ledger."""
        return (
            "replace-one" if any(isinstance(e, FixedSizeSampled) for e in self.ledger.others()) else "add-or-remove-one"
        )

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Record ``steps`` logical steps: Gaussian noise on the clipped sum of a Poisson sample.

        Raises:
            ConfigurationError: ``noise_multiplier`` is negative, ``sample_rate`` outside [0, 1], ``steps`` negative,
                or anything is not finite.

        >>> from ghostgrad.accounting import RDPAccountant
        >>> accountant = RDPAccountant()
        >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
        >>> len(accountant)
        1000
        """
        sigma, rate = check_noise(noise_multiplier), check_rate(sample_rate)
        self.ledger.append(PoissonSampled(rate, Gaussian(sigma)), check_count(steps))

    def record(self, event: Event, count: int = 1) -> None:
        """Record ``count`` releases of any event."""
        self.ledger.append(event, count)

    def __len__(self) -> int:
        return self.ledger.steps

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """``(noise_multiplier, sample_rate, steps)`` of the Poisson-sampled Gaussian entries, as Opacus has it.

        Assigning such a list replaces the ledger.
        """
        return [
            (event.event.sigma, event.rate, count)
            for event, count in self.ledger
            if isinstance(event, PoissonSampled) and isinstance(event.event, Gaussian)
        ]

    @history.setter
    def history(self, entries: Iterable[tuple[float, float, int]]) -> None:
        self.ledger = _from_history(entries)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: Opacus' keys ``history`` and ``mechanism``, and the whole ``ledger`` with its version."""
        return {"history": self.history, "mechanism": self.mechanism, "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the ledger by what `state_dict` returned, here or in Opacus.

        The ledger does not depend on the method, so one written by another method is accepted.

        Raises:
            ConfigurationError: Keys are missing, the ledger is of another version, or an event is unknown (named).
        """
        if not isinstance(state_dict, Mapping) or not {"history", "mechanism"} <= set(state_dict):
            found = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ConfigurationError(f"the accountant's state holds {found}; 'history' and 'mechanism' are needed.")
        choose("mechanism", str(state_dict["mechanism"]), _REGISTRY)
        plain = state_dict.get("ledger")
        held = Ledger.from_state_dict(plain) if plain is not None else None
        stated = _from_history(state_dict["history"])
        if held is not None and stated.steps > held.steps:
            raise ConfigurationError(
                f"the history has {stated.steps} steps but the ledger {held.steps}: one of them is cut off. Load the state as it "
                f"was saved."
            )
        self.ledger = stated if held is None else held


class EitherNeighbour(Accountant):
    """An accountant that can be asked for either neighbouring relation.

    Args:
        neighbouring: ``"add-or-remove-one"`` (default) or ``"replace-one"``.
    """

    def __init__(self, neighbouring: Literal["add-or-remove-one", "replace-one"] = "add-or-remove-one") -> None:
        super().__init__()
        self.replace = choose("neighbouring", neighbouring, ["add-or-remove-one", "replace-one"]) == "replace-one"

    @property
    def neighbouring(self) -> str:
        """The relation that answers hold for."""
        return "replace-one" if self.replace else super().neighbouring


def fresh(accountant: str | Accountant) -> Accountant:
    """Return an accountant to try things on: new by name, or a copy of one with its ledger and options."""
    return copy.deepcopy(accountant) if isinstance(accountant, Accountant) else create_accountant(accountant)


def _from_history(entries: Iterable[tuple[float, float, int]]) -> Ledger:
    ledger = Ledger()
    if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Iterable):
        raise ConfigurationError(f"history={entries!r} is not a list of (noise_multiplier, sample_rate, steps).")
    for entry in entries:
        if not isinstance(entry, (tuple, list)) or len(entry) != 3:
            raise ConfigurationError(f"history entry {entry!r} is not (noise_multiplier, sample_rate, steps).")
        sigma, rate, steps = entry
        ledger.append(PoissonSampled(check_rate(rate), Gaussian(check_noise(sigma))), check_count(steps))
    return ledger


_REGISTRY: dict[str, Callable[[], Accountant]] = {}


def register_accountant(name: str, factory: Callable[[], Accountant]) -> None:
    """Make ``create_accountant(name)`` call ``factory``.

    >>> from ghostgrad.accounting import RDPAccountant
    >>> register_accountant("mine", RDPAccountant)
    >>> type(create_accountant("mine")).__name__
    'RDPAccountant'
    """
    _REGISTRY[name] = factory


def registered_accountants() -> tuple[str, ...]:
    """Names that `create_accountant` knows."""
    return tuple(_REGISTRY)


def create_accountant(mechanism: str | Accountant) -> Accountant:
    """Return a fresh accountant: ``"rdp"``, ``"pld"``, ``"prv"``, ``"gdp"`` or registered; one passed comes back.

    Raises:
        ConfigurationError: The name is unknown.

    >>> create_accountant("rdp").get_epsilon(1e-5)
    0.0
    """
    if isinstance(mechanism, Accountant):
        return mechanism
    return _REGISTRY[choose("accountant", mechanism, _REGISTRY)]()
