"""The ledger: every private release of a run, run-length encoded, as readable JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ghostgrad.accounting._checks import check_count
from ghostgrad.accounting.events import Event, Gaussian, PoissonSampled, event_from_json, event_to_json, opened
from ghostgrad.errors import ConfigurationError

FORMAT = "ghostgrad-ledger"
VERSION = 1


class Ledger:
    """The order, kind and number of releases; knows nothing of epsilon.

    Equal neighbours are one entry, so a million equal steps take the room of one. Appending is constant time.

    >>> ledger = Ledger()
    >>> ledger.append(PoissonSampled(0.01, Gaussian(1.0)), 1000)
    >>> ledger.append(PoissonSampled(0.01, Gaussian(1.0)), 1)
    >>> len(ledger), ledger.steps
    (1, 1001)
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._counts: list[int] = []
        self._totals: dict[Event, int] = {}
        self._sampled: dict[tuple[float, float], int] = {}
        self._steps = 0
        self.revision = 0  # grows with every change, so that answers can be cached

    def append(self, event: Event, count: int = 1) -> None:
        """Add ``count`` releases of ``event``; 0 adds nothing."""
        number = check_count(count, "count")
        if number == 0:
            return
        # Opened first, so that what no accountant could read is refused before it is written down.
        plain = isinstance(event, PoissonSampled) and isinstance(event.event, Gaussian) and 0.0 < event.rate < 1.0
        parts = [(event, number)] if plain else opened(event, number)
        if self._events and self._events[-1] == event:
            self._counts[-1] += number
        else:
            self._events.append(event)
            self._counts.append(number)
        for part, times in parts:
            if isinstance(part, PoissonSampled) and isinstance(part.event, Gaussian):
                key = (part.rate, part.event.sigma)
                self._sampled[key] = self._sampled.get(key, 0) + times
            else:
                self._totals[part] = self._totals.get(part, 0) + times
        self._steps += number
        self.revision += 1

    def sampled_gaussians(self) -> dict[tuple[float, float], int]:
        """Poisson-sampled Gaussians at rates below 1: ``{(rate, sigma): times}``."""
        return self._sampled

    def others(self) -> dict[Event, int]:
        """All atomic events but those of `sampled_gaussians`, with their number."""
        return self._totals

    @property
    def steps(self) -> int:
        """The number of entries with their repetitions."""
        return self._steps

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[tuple[Event, int]]:
        return iter(zip(self._events, self._counts, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        """Events are frozen, so that a copy of the lists is a copy of the ledger, also at 1e5 entries."""
        twin = Ledger()
        twin._events, twin._counts = self._events.copy(), self._counts.copy()
        twin._totals, twin._sampled = self._totals.copy(), self._sampled.copy()
        twin._steps, twin.revision = self._steps, self.revision
        return twin

    def to_json(self) -> str:
        """Return the ledger as one JSON document; `from_json` is the inverse.

        >>> Ledger.from_json(Ledger().to_json()).steps
        0
        """
        return json.dumps(self.state_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Read what `to_json` wrote; raises ``ConfigurationError`` for other formats and versions, naming them."""
        try:
            plain = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigurationError(f"the ledger is not JSON ({error}); was the file cut short?") from error
        return cls.from_state_dict(plain)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: format, version, and ``[event, count]`` in order."""
        entries = [[event_to_json(event), count] for event, count in self]
        return {"format": FORMAT, "version": VERSION, "entries": entries}

    @classmethod
    def from_state_dict(cls, plain: Mapping[str, Any]) -> Ledger:
        """Read what `state_dict` returned; raises ``ConfigurationError`` for other formats and versions."""
        if not isinstance(plain, Mapping) or plain.get("format") != FORMAT:
            found = plain.get("format") if isinstance(plain, Mapping) else type(plain).__name__
            raise ConfigurationError(f"format={found!r} is not {FORMAT!r}; pass what Ledger.state_dict() returned.")
        if plain.get("version") != VERSION:
            raise ConfigurationError(
                f"ledger version={plain.get('version')!r} is not {VERSION}, the one this release reads; "
                "read it with the version of ghostgrad that wrote it."
            )
        if not isinstance(plain.get("entries"), (list, tuple)):
            raise ConfigurationError(
                "the ledger has no list of entries, so what was spent is not known; it may be cut off."
            )
        ledger = cls()
        for entry in plain["entries"]:
            if not isinstance(entry, (list, tuple)) or len(entry) != 2:
                raise ConfigurationError(f"ledger entry {entry!r} is not [event, count].")
            ledger.append(event_from_json(entry[0]), entry[1])
        return ledger
