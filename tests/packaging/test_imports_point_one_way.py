"""Imports between the parts of the library have no cycle, and the accounting stands on numpy and scipy alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ghostgrad

SOURCE = Path(ghostgrad.__file__).parent
ALONE = {"accounting": {"errors"}, "gradients": {"errors"}, "errors": set(), "keys": {"errors"}}
WIRING = {"__init__", "__main__", "privacy_engine", "integrations"}


def imported_parts(path: Path) -> set[str]:
    """The top-level parts of ghostgrad that a file imports, at its head or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "ghostgrad":
            names |= {f"ghostgrad.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[1] for name in names if name.startswith("ghostgrad.")}


def graph() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        found.setdefault(part, set()).update(imported_parts(path) - {part})
    found.pop("__init__")
    return found


def test_there_is_no_cycle():
    assert list(TopologicalSorter(graph()).static_order())


def test_nothing_but_the_wiring_imports_the_engine():
    assert {part for part, uses in graph().items() if "engine" in uses} <= WIRING


@pytest.mark.parametrize("part", ALONE)
def test_the_foundations_import_nothing_above_them(part):
    assert graph()[part] <= ALONE[part]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ghostgrad", "torch"),
        ("import ghostgrad.accounting", "torch"),
        ("import ghostgrad.accountants.utils", "torch"),
        ("from ghostgrad import PrivacyEngine", "matplotlib"),
        ("from ghostgrad import PrivacyEngine", "pandas"),
        ("from ghostgrad import PrivacyEngine", "opacus"),
    ],
)
def test_importing_stays_light(statement, absent):
    code = f"{statement}\nimport sys\nsys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
