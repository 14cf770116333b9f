"""Killed anywhere and resumed, a training ends where the uninterrupted one does, and repeats no noise on other sums."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from interrupted import Settings, equal, interrupted, releases, uninterrupted

from ghostgrad.ledger import read_ledger

SETTINGS = {
    "bk": Settings(mode="bk"),
    "ghost": Settings(mode="ghost", optimizer="momentum"),
    "hooks": Settings(mode="hooks", limit=2),
    "functorch": Settings(mode="functorch", seed=3),
    "pieces": Settings(limit=1, accumulation=2, clipping="adaptive"),
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
    parts.mkdir()
    expected = uninterrupted(whole, settings)
    found = interrupted(parts, settings, whole / "first", kills=3, dice=random.Random(name))
    for part in expected:
        assert equal(found[part], expected[part]), part
    assert all(len(sums) == 1 for sums in releases(parts / "releases").values())
    assert len(releases(parts / "releases")) == expected["steps"]
    if ledger:
        assert read_ledger(parts / "run.jsonl").ledger == read_ledger(whole / "run.jsonl").ledger
