"""What an engine takes over from a ledger file, and what a state says of one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ghostgrad.distributed import Topology
from ghostgrad.ledger import LedgerFile, LedgerText
from ghostgrad.provenance import Provenance
from ghostgrad.spent import Made, Spent, part


def open_ledger(path: str | os.PathLike[str], spent: Spent, topology: Topology) -> tuple[LedgerFile | None, list[str]]:
    """Open the file on rank 0, and let every rank count what is in it; and the guarantees of its trainings, as sentences.

    Raises:
        LedgerError: the file is in use, or does not hold; on every rank.
    """
    with topology.together():
        file = LedgerFile(path, spent.accountant.neighbouring) if topology.rank == 0 else None
    topology.agree({})
    earlier = spent.accountant.ledger.steps
    text = None if file is None else file.text
    told = None if text is None else (text.ledger, text.spans, made_in(text), text.guarantees)
    found = topology.collect(told)[0]
    if found is not None:
        spent.merge(*found[:3])
    if file is not None and earlier:
        file.record(part(spent.accountant.ledger, 0, earlier), run=spent.run)
    spent.written = spent.accountant.ledger.steps
    return file, [] if found is None else found[3]


def made_in(text: LedgerText) -> Made:
    """How the releases of its trainings were made; unknown where it says two things of one training."""
    releases = Counter[tuple[str, int | None]]()
    for entry in text.entries:
        releases[entry.run, entry.training] += sum(count for _, count in entry.events)
    found: Made = {}
    for entry in text.entries:
        if entry.kind == "training" and entry.training is not None:
            training = (entry.run, entry.training)
            said = Provenance.read({**entry.settings, "guarantee": entry.guarantee})
            known, _ = found.get(training, (said, 0))
            found[training] = (said if said == known else Provenance(), releases[training])
    return found


def place_in(file: LedgerFile | None) -> dict[str, Any] | None:
    """For a state: the line that the file ends with now."""
    return None if file is None else {"id": file.text.identity, "lines": file.lines, "head": file.head}


def missing_from(file: LedgerFile | None, place: Mapping[str, Any] | None) -> str | None:
    """Why a file is not the one that a state was saved with, or a later one; None where it is."""
    if place is None:
        return None
    if file is None:
        return "the run had a ledger file, and this engine has none: PrivacyEngine(ledger=...)"
    if file.text.identity != place["id"]:
        return "this is another file than that of the run"
    if file.text.hashes[place["lines"] - 1 : place["lines"]] != [place["head"]]:
        return f"line {place['lines']} is missing or another: lines were cut off, or this is a copy that was continued apart"
    return None


def releases_made(file: LedgerFile | None, run: str) -> dict[int, dict[int, str]]:
    """Digests of what a run has released, by training and by the address of the noise."""
    found: dict[int, dict[int, str]] = {}
    for entry in [] if file is None else file.text.entries:
        if entry.run == run and entry.training is not None and entry.step is not None:
            found.setdefault(entry.training, {})[entry.step] = entry.digest
    return found
