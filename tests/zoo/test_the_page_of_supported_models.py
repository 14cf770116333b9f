"""The page that the zoo wrote: nothing in it is wrong, and at least 95 of 100 are exact in every mode."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "supported-models.md").read_text()


def test_nothing_is_wrong() -> None:
    ours = [cell for row in _rows() for title, cell in row.items() if "Opacus" not in title]
    assert "wrong" not in ours
    assert "crash" not in ours


def test_every_row_has_a_cell_for_every_title() -> None:
    assert len(_rows()) >= 139
    assert all(
        row[title] in ("exact", "refused", "wrong")
        for row in _rows()
        for title in row
        if title not in ("model", "why not")
    )


def _rows() -> list[dict[str, str]]:
    """The tables, a row a model, by title."""
    rows: list[dict[str, str]] = []
    titles: list[str] = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells[:1] == ["model"]:
            titles = cells
        elif cells and not cells[0].startswith("---"):
            rows.append(dict(zip(titles, cells, strict=True)))
    return rows


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk", "dropout"])
def test_most_are_exact(mode: str) -> None:
    found = re.search(rf"\* {mode}: (\d+) of (\d+) exact", PAGE)
    assert found is not None
    exact, of = map(int, found.groups())
    assert of >= 56
    assert exact >= 0.95 * of


def test_every_refusal_says_why() -> None:
    refused = [row for row in _rows() if "refused" in [cell for title, cell in row.items() if "Opacus" not in title]]
    assert all(len(row["why not"]) > 40 for row in refused)
