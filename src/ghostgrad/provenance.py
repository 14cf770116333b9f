"""How releases were made, as ledger files, checkpoints and reports say it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

UNKNOWN = "unknown"
SAMPLERS = ("poisson", "own batches", UNKNOWN)
_LONGEST = 1000


@dataclass(frozen=True)
class Provenance:
    """What a guarantee rests on, beside the noise multipliers and rates in a ledger; unknown where nothing tells it.

    Attributes:
        guarantee: for which neighbouring datasets, under which sampling, the releases are accounted.
        sampler: ``"poisson"``, ``"own batches"``, or ``"unknown"`` where batches were drawn outside of the library.
        noise: the name of its source.
        secure: whether it comes from the cryptographic generator in its floating-point-safe form.
        seeded: whether a seed that the user chose determines it; ``"unknown"`` for a generator of the user's.

    >>> known = Provenance("removing one record", "poisson", "keyed", secure=False, seeded=False)
    >>> Provenance.read(known.plain()) == known
    True
    >>> Provenance.read({"sampler": "poisson"}) == Provenance()  # a part of it is no answer
    True
    """

    guarantee: str = UNKNOWN
    sampler: str = UNKNOWN
    noise: str = UNKNOWN
    secure: bool | str = UNKNOWN
    seeded: bool | str = UNKNOWN

    def plain(self) -> dict[str, Any]:
        """As a table for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Provenance:
        """Of a table that may say more; all is unknown where it does not say all of it."""
        told: dict[str, Any] = {name: plain.get(name) for name in _ALLOWED}
        return cls(**told) if is_provenance(told) else cls()


def is_provenance(value: object) -> bool:
    """Whether something is a table as `Provenance.plain` gives it."""
    return (
        isinstance(value, Mapping)
        and set(value) == set(_ALLOWED)
        and all(allowed(value[name]) for name, allowed in _ALLOWED.items())
    )


def _is_words(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST


def _is_answer(value: object) -> bool:
    return isinstance(value, bool) or value == UNKNOWN


_ALLOWED: dict[str, Callable[[object], bool]] = {
    "guarantee": _is_words,
    "sampler": lambda value: value in SAMPLERS,
    "noise": _is_words,
    "secure": _is_answer,
    "seeded": _is_answer,
}
