"""The page's table: every planted fault is contradicted by some attack, a correct training by none; and how it is written."""

from __future__ import annotations

import re
from pathlib import Path

import audit_faults
import pytest
from _attacks import ATTACKS
from _faults import FAULTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")


def rows(page: str) -> dict[str, list[str]]:
    """The cells of the table of verdicts, by fault."""
    found: dict[str, list[str]] = {}
    for line in page.split(audit_faults.BEGIN)[1].split("\n\n")[1].splitlines()[2:]:
        fault, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        found[fault] = cells
    return found


def test_the_table_has_a_cell_for_every_fault_and_attack() -> None:
    assert list(rows(PAGE)) == list(FAULTS)
    assert all(len(cells) == len(ATTACKS) for cells in rows(PAGE).values())
    assert {cell for cells in rows(PAGE).values() for cell in cells} == {"**contradicted**", "consistent", "not played"}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_contradicted_and_nothing_else(fault: str) -> None:
    assert ("**contradicted**" in rows(PAGE)[fault]) is (fault != "none")


def test_the_tests_that_need_no_statistics_exist() -> None:
    assert set(audit_faults.ALSO_CAUGHT_BY) == set(FAULTS) - {"none"}
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in audit_faults.ALSO_CAUGHT_BY.values() if not re.search(rf"def {name}\(", text)]
    assert missing == []
    assert all(f"`{name}`" in PAGE for name in audit_faults.ALSO_CAUGHT_BY.values())


def test_the_script_writes_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    some = {name: ATTACKS[name] for name in ("gradient canaries", "gradient canaries after a resume")}
    monkeypatch.setattr(audit_faults, "ATTACKS", some)
    monkeypatch.setattr(audit_faults, "PAGE", tmp_path / "audit.md")
    monkeypatch.setattr(audit_faults, "FIGURES", tmp_path / "audit")
    (tmp_path / "audit.md").write_text(f"before\n{audit_faults.BEGIN}\nold\n{audit_faults.END}\nafter\n")
    audit_faults.write(audit_faults.attack_all(["none", "noise again after a resume"], short=True))
    page = (tmp_path / "audit.md").read_text()
    assert rows(page) == {
        "none": ["consistent", "consistent"],
        "noise again after a resume": ["consistent", "**contradicted**"],
    }
    assert page.startswith("before")
    assert page.endswith("after\n")
    assert "old" not in page
    assert (tmp_path / "audit" / "faults.svg").read_text().startswith("<?xml")
