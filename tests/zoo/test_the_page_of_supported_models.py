"""The page that the zoo wrote: nothing in it is wrong, and at least 95 of 100 are exact in every mode."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "supported-models.md").read_text()


def test_nothing_is_wrong() -> None:
    assert "| wrong" not in PAGE
    assert "| crash" not in PAGE


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
def test_most_are_exact(mode: str) -> None:
    found = re.search(rf"\* {mode}: (\d+) of (\d+) exact", PAGE)
    assert found is not None
    exact, of = map(int, found.groups())
    assert of >= 56
    assert exact >= 0.95 * of


def test_every_refusal_says_why() -> None:
    refused = [line for line in PAGE.splitlines() if "| refused" in line]
    assert all(len(line.split("|")[-2]) > 40 for line in refused)
