"""The short form of benchmarks/soak.py: everything fails now and then, and memory, sums and counts stay right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from soak import Soak

from ghostgrad.clipping import ClippedSum
from ghostgrad.journal import Journal


def test_random_failures_leave_right_sums_counts_and_memory(tmp_path: Path) -> None:
    found = Soak(tmp_path / "run.jsonl", 400, workers=0, seed=0, odds=0.1).run()
    assert found.faults(most_objects=100, most_mib=16.0) == []
    assert found.released == 400
    assert found.empty > 5
    assert len(found.broken) == 6


def test_workers_that_fail_do_not_change_that(tmp_path: Path) -> None:
    found = Soak(tmp_path / "run.jsonl", 90, workers=1, seed=1, odds=0.1).run()
    assert found.faults(most_objects=100, most_mib=16.0) == []
    assert found.broken["data"] > 0


def _count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    note = Journal.note
    monkeypatch.setattr(Journal, "note", lambda self, *what: [note(self, *what) for _ in range(2)])


def _halve_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    take = ClippedSum.take
    monkeypatch.setattr(ClippedSum, "take", lambda self, parameter: take(self, parameter) / 2)


def _leak(monkeypatch: pytest.MonkeyPatch) -> None:
    close, kept = ClippedSum.close, list[Any]()

    def closed(self: ClippedSum) -> None:
        kept.extend([] for _ in range(10))
        close(self)

    monkeypatch.setattr(ClippedSum, "close", closed)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (_count_twice, "60 releases made, 120 in the ledger"),
        (_halve_sums, "released sums are wrong"),
        (_leak, "objects grow"),
    ],
)
def test_the_soak_finds_what_is_planted(
    plant: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = Soak(tmp_path / "run.jsonl", 60, workers=0, seed=0).run()
    assert any(words in fault for fault in found.faults(most_objects=100, most_mib=16.0))
