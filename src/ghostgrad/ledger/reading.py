"""Reads a ledger file and shows that it is one chain."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ghostgrad.accounting import Event, Ledger, event_from_json
from ghostgrad.errors import ConfigurationError, LedgerError

FORMAT, VERSION = "ghostgrad-ledger-file", 1
ORIGIN = "0" * 64
"""What the first line names as the line before."""
LONGEST = 1 << 20
"""Bytes of a line; longer ones were not written here."""


@dataclass(frozen=True)
class Entry:
    """One line after the header.

    Attributes:
        line: its number in the file, from 1.
        kind: ``"release"`` of a logical step, ``"recorded"`` by the user or taken over from a checkpoint, or ``"training"``.
        run: the run that it belongs to, by name.
        events: what was released, with counts.
        training: number of the private training within its engine; None in ``"recorded"``.
        step: address of the step's noise; None but in ``"release"``.
        digest: of the released gradient; empty but in ``"release"``.
        steps: logical steps that it stands for.
        guarantee: for which neighbouring datasets, under which sampling, a training is accounted; empty but in ``"training"``.
        settings: public facts of a training; empty but in ``"training"``.
    """

    line: int
    kind: str
    run: str
    events: tuple[tuple[Event, int], ...]
    training: int | None = None
    step: int | None = None
    digest: str = ""
    steps: int = 0
    guarantee: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class LedgerText:
    """What a ledger file says.

    Attributes:
        identity: the random name of the file, the same in all copies of it; empty for an empty file.
        relation: for which neighbouring datasets its first accountant works; see `guarantees`.
        entries: all lines but the header.
        hashes: SHA-256 of each line.
        cut: bytes at the end that are no whole line: a crash in the middle of a write, of a step that was not made.
    """

    identity: str = ""
    relation: str = ""
    entries: list[Entry] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    cut: int = 0

    @property
    def head(self) -> str:
        """The hash of the last line; of 64 zeros where there is none."""
        return self.hashes[-1] if self.hashes else ORIGIN

    @property
    def guarantees(self) -> list[str]:
        """For which neighbouring datasets, under which sampling, its trainings are accounted: each sentence once."""
        return list(dict.fromkeys(entry.guarantee for entry in self.entries if entry.guarantee))

    @property
    def ledger(self) -> Ledger:
        """All releases, in order."""
        ledger = Ledger()
        for entry in self.entries:
            for event, count in entry.events:
                ledger.append(event, count)
        return ledger

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """``(run, releases, logical steps)`` in order, neighbours of one run joined."""
        found: list[tuple[str, int, int]] = []
        for entry in self.entries:
            releases = sum(count for _, count in entry.events)
            if found and found[-1][0] == entry.run:
                found[-1] = (entry.run, found[-1][1] + releases, found[-1][2] + entry.steps)
            else:
                found.append((entry.run, releases, entry.steps))
        return found


def read_ledger(path: str | os.PathLike[str], *, head: str | None = None) -> LedgerText:
    """Read and verify a ledger file.

    Whole lines that were taken off the end leave a file that is in order; only a ``head`` that was kept elsewhere shows them.
    Whoever rewrites the whole file, hashes included, is not found out either, but by a ``head``.

    Args:
        head: hash of a line that must be there, as a checkpoint or an earlier verification has it; its beginning is enough.

    Raises:
        LedgerError: tampered, reordered, forked, or without ``head``; with the number of the line.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise LedgerError(f"the ledger file {os.fspath(path)} cannot be read ({error}).") from error
    text = parse(content, os.fspath(path))
    if head is not None and not any(line.startswith(head) for line in [ORIGIN, *text.hashes] if head):
        raise LedgerError(
            f"{os.fspath(path)}: no line has the hash {head:.16}..., so lines were cut off after it was taken, or this is "
            f"another file, or another continuation of a copy. The file has {len(text.hashes)} lines.",
            len(text.hashes) + 1,
        )
    return text


def parse(content: bytes, name: str = "the ledger") -> LedgerText:
    """As `read_ledger`, of the bytes of a file."""
    text, seen = LedgerText(), {ORIGIN: 0}
    *lines, rest = content.split(b"\n")
    text.cut = len(rest)
    events: dict[str, Event] = {}
    for number, line in enumerate(lines, 1):
        plain = _object(line, name, number)
        _check_link(plain, text, seen, name, number)
        text.hashes.append(hashlib.sha256(line).hexdigest())
        seen[text.hashes[-1]] = number
        try:
            if number == 1:
                _read_header(plain, text)
            else:
                text.entries.append(_entry(plain, number, events))
        except (ConfigurationError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise LedgerError(
                f"{name}, line {number}: not what is written to a ledger file: {error!s:.200}", number
            ) from error
    return text


def _object(line: bytes, name: str, number: int) -> Mapping[str, Any]:
    try:
        if len(line) > LONGEST:
            raise ValueError(f"{len(line)} bytes in one line")
        plain = json.loads(line.decode("utf-8"), parse_constant=_refuse)
        if not isinstance(plain, dict):
            raise TypeError(f"a {type(plain).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise LedgerError(
            f"{name}, line {number}: no JSON object ({error!s:.80}): the file was tampered with, or damaged in its middle.",
            number,
        ) from error
    return plain


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of a ledger")


def _check_link(plain: Mapping[str, Any], text: LedgerText, seen: Mapping[str, int], name: str, number: int) -> None:
    before = plain.get("prev")
    if before == text.head and plain.get("n") == number:
        return
    if isinstance(before, str) and before in seen and before != text.head:
        raise LedgerError(
            f"{name}, line {number}: forked: lines {seen[before] + 1} and {number} both follow line {seen[before]}. Two "
            f"processes have continued one file, each without the releases of the other; what all of them released is the sum.",
            number,
        )
    if plain.get("n") != number:
        raise LedgerError(
            f"{name}, line {number}: it says that it is line {plain.get('n')!r:.20}: lines were removed, inserted or reordered.",
            number,
        )
    raise LedgerError(
        f"{name}, line {number}: it does not follow from line {number - 1}: one of the two was tampered with after it was "
        f"written.",
        number,
    )


def _read_header(plain: Mapping[str, Any], text: LedgerText) -> None:
    if plain.get("format") != FORMAT or plain.get("version") != VERSION:
        raise ValueError(f"format {plain.get('format')!r:.40}, version {plain.get('version')!r:.20}")
    text.identity, text.relation = _text(plain["id"]), _text(plain["relation"])


def _entry(plain: Mapping[str, Any], number: int, known: dict[str, Event]) -> Entry:
    kind, run = plain["kind"], _text(plain["run"])
    if kind == "release":
        events = tuple(_events(plain["events"], known))
        return Entry(
            number, kind, run, events, _count(plain["training"]), _count(plain["step"]), _text(plain["digest"]), 1
        )
    if kind == "recorded":
        return Entry(number, kind, run, tuple(_events(plain["events"], known)), steps=_count(plain["steps"]))
    if kind == "training":
        settings = plain["settings"]
        if not isinstance(settings, dict):
            raise TypeError("settings are no table")
        return Entry(
            number, kind, run, (), _count(plain["training"]), guarantee=_text(plain["relation"]), settings=settings
        )
    raise ValueError(f"kind {kind!r:.40}")


def _events(plain: Any, known: dict[str, Event]) -> Iterator[tuple[Event, int]]:
    if not isinstance(plain, list):
        raise TypeError("events are no list")
    for event, count in plain:
        words = repr(event)
        if words not in known:
            known[words] = event_from_json(event)
            Ledger().append(known[words])  # refuses what no accountant could read
        yield known[words], _count(count)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise ValueError(f"{value!r:.20} is no count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text is expected")
    return value
