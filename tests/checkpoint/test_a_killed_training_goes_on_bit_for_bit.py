"""Killed anywhere and resumed, a training ends where the uninterrupted one does, and repeats no noise on other sums."""

from __future__ import annotations

import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interrupted import Settings, Training, equal, in_a_process, interrupted, note_releases, releases, uninterrupted

from ghostgrad.ledger import read_ledger

LONG = os.environ.get("GHOSTGRAD_LONG_TESTS") == "1"
SETTINGS = {
    "bk": Settings(mode="bk"),
    "ghost": Settings(mode="ghost", optimizer="momentum"),
    "hooks": Settings(mode="hooks", limit=2),
    "functorch": Settings(mode="functorch", seed=3),
    "pieces": Settings(limit=1, accumulation=2, clipping="adaptive"),
    "schedules": Settings(limit=2, accumulation=2, scheduled=True),
    "own batches": Settings(poisson=False, augmented=True),
    "workers": Settings(workers=2, augmented=True, limit=3),
    "per layer": Settings(clipping="per_layer", accumulation=3, seed=4),
}


@pytest.mark.parametrize("ledger", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_end_is_that_of_the_uninterrupted_training(name: str, ledger: bool, tmp_path: Path) -> None:
    settings = replace(SETTINGS[name], ledger=ledger)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    expected = uninterrupted(whole, settings)
    for round_number in range(5 if LONG else 1):  # 4 kills each
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        dice = random.Random(f"{name} {ledger} {round_number}")
        found = interrupted(
            parts, settings, whole / "first", kills=2 if settings.workers and not LONG else 4, dice=dice
        )
        for part in expected:
            assert equal(found[part], expected[part]), part
        assert all(len(sums) == 1 for sums in releases(parts / "releases").values())
        assert len(releases(parts / "releases")) == expected["steps"]
        if ledger:
            assert read_ledger(parts / "run.jsonl").ledger == read_ledger(whole / "run.jsonl").ledger


@pytest.mark.parametrize("settings", [Settings(), Settings(limit=2, clipping="adaptive")], ids=["whole", "pieces"])
def test_at_any_moment_the_ledger_file_counts_what_was_released_and_the_checkpoint_is_whole(
    settings: Settings, tmp_path: Path
) -> None:
    """Here the clock kills, also within the writing of a file."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    began = time.monotonic()
    expected = uninterrupted(whole, settings)
    length = time.monotonic() - began
    shutil.copy(whole / "first", parts / "checkpoint")
    shutil.copy(whole / "first.jsonl", parts / "run.jsonl")
    dice = random.Random(0)

    def run() -> None:
        note_releases(parts / "releases")
        training = Training(parts, settings)
        training.run(lambda training, place: training.save() if place in ("drawn", "cleared") else None)
        torch.save(training.outcome(), parts / "outcome")

    for _ in range(60 if LONG else 6):
        (parts / "outcome").unlink(missing_ok=True)
        ended = in_a_process(run, kill_after=dice.uniform(0, 2 * length))
        text = read_ledger(parts / "run.jsonl")
        steps = {entry.step for entry in text.entries if entry.kind == "release"}
        # The last noise may have been drawn for a step that was killed before it was written down, and made nothing known.
        assert len(steps) >= len(releases(parts / "releases")) - 1
        assert text.ledger.steps == len(steps)
        if ended:
            shutil.copy(whole / "first", parts / "checkpoint")
    assert in_a_process(run)
    assert equal(torch.load(parts / "outcome", weights_only=True), expected)
    assert all(len(sums) == 1 for sums in releases(parts / "releases").values())
