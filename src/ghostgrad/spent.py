"""Whose releases the ledger holds, so that going back to a checkpoint counts none twice and forgets none."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator

from ghostgrad.accounting import Accountant, Event, Ledger
from ghostgrad.provenance import Provenance

Span = tuple[str, int, int]
"""A run's name, with how many releases and how many logical steps of it come next in the ledger."""
Made = dict[tuple[str, int], tuple[Provenance, int]]
"""By run and number of a training in it: how its releases were made, and how many."""


class Spent:
    """The ledger of an engine, cut into runs.

    A run is what one training releases under one key, with its restarts. Checkpoints of one run hold beginnings of one list of
    releases, so the longer of two holds the other; different runs add up.

    >>> from ghostgrad.accounting import RDPAccountant
    >>> spent, other = Spent(RDPAccountant()), Spent(RDPAccountant())
    >>> other.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    >>> for _ in range(2):  # the second time adds nothing
    ...     spent.merge(other.accountant.ledger, other.spans)
    >>> spent.accountant.ledger.steps
    1
    """

    def __init__(self, accountant: Accountant) -> None:
        self.accountant = accountant
        self.run = new_run()
        """The run that goes on."""
        self.steps = 0
        """Logical steps made, of all runs."""
        self.written = 0
        """How many releases of the ledger are in the ledger file."""
        self.made: Made = {}
        """How releases were made, as far as it is known."""
        self._closed: list[Span] = []

    @property
    def spans(self) -> list[Span]:
        """The whole ledger, in order."""
        releases = self.accountant.ledger.steps - sum(span[1] for span in self._closed)
        steps = self.steps - sum(span[2] for span in self._closed)
        own = [(self.run, max(0, releases), max(0, steps))]
        return self._closed + (own if own[0][1:] != (0, 0) else [])

    def continue_run(self, run: str) -> None:
        """What is released from now on belongs to ``run``."""
        self._closed, self.run = self.spans, run

    def tell(self, training: int, provenance: Provenance, releases: int) -> None:
        """How further releases are made, by a training of the run that goes on."""
        _, before = self.made.get((self.run, training), (provenance, 0))
        self._told((self.run, training), provenance, before + releases)

    def _told(self, training: tuple[str, int], provenance: Provenance, releases: int) -> None:
        known, before = self.made.get(training, (provenance, 0))
        # Of one training two sources say the same, or one of them is wrong.
        self.made[training] = (known if known == provenance else Provenance(), max(before, releases))

    @property
    def provenance(self) -> dict[Provenance, int]:
        """How many releases were made in which way; those of `Provenance()` are the ones of which nothing is known."""
        found, untold = Counter[Provenance](), Counter[str]()
        for run, releases, _ in self.spans:
            untold[run] += releases
        for (run, _), (provenance, releases) in self.made.items():
            found[provenance] += releases
            untold[run] -= releases
        found[Provenance()] += (+untold).total()
        return dict(+found)

    def merge(self, ledger: Ledger, spans: Iterable[Span], made: Made | None = None) -> None:
        """Add the releases that are not known yet, and how they were made."""
        self._closed = self.spans
        known: Counter[str] = Counter()
        known_steps: Counter[str] = Counter()
        for run, releases, steps in self._closed:
            known[run] += releases
            known_steps[run] += steps
        begin = 0
        for run, releases, steps in spans:
            new, new_steps = max(0, releases - known[run]), max(0, steps - known_steps[run])
            known[run], known_steps[run] = max(0, known[run] - releases), max(0, known_steps[run] - steps)
            for event, count in part(ledger, begin + releases - new, begin + releases):
                self.accountant.record(event, count)
            if new or new_steps:
                self._closed.append((run, new, new_steps))
            self.steps += new_steps
            begin += releases
        for training, (provenance, told) in (made or {}).items():
            self._told(training, provenance, told)


def part(ledger: Ledger, begin: int, end: int) -> Iterator[tuple[Event, int]]:
    """Releases ``begin`` to ``end`` of a ledger, counted from 0."""
    at = 0
    for event, count in ledger:
        inside = min(end, at + count) - max(begin, at)
        if inside > 0:
            yield event, inside
        at += count


def new_run() -> str:
    """A name that no other run has."""
    return secrets.token_hex(8)
