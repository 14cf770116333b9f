"""What an engine takes over from a ledger file, and what a state says of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ghostgrad.distributed import Topology
from ghostgrad.ledger import LedgerFile
from ghostgrad.spent import Spent, part


def open_ledger(path: str | os.PathLike[str], spent: Spent, topology: Topology) -> tuple[LedgerFile | None, list[str]]:
    """Open the file on rank 0, and let every rank count what is in it; and the guarantees of its trainings, as sentences.

    Raises:
        LedgerError: the file is in use, or does not hold; on every rank.
    """
    with topology.together():
        file = LedgerFile(path, spent.accountant.neighbouring) if topology.rank == 0 else None
    topology.agree({})
    earlier = spent.accountant.ledger.steps
    found = topology.collect(None if file is None else (file.text.ledger, file.text.spans, file.text.guarantees))[0]
    if found is not None:
        spent.merge(*found[:2])
    if file is not None and earlier:
        file.record(part(spent.accountant.ledger, 0, earlier), run=spent.run)
    spent.written = spent.accountant.ledger.steps
    return file, [] if found is None else found[2]


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
