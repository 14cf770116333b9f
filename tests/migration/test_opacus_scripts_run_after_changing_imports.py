"""Training scripts written for Opacus run here after changing the package name in their import lines, and nothing else."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.txt"))
IMPORT_LINE = re.compile(r"^(from|import) opacus\b", flags=re.MULTILINE)


def with_changed_imports(script: str) -> str:
    changed = IMPORT_LINE.sub(r"\1 ghostgrad", script)
    assert "opacus" not in changed, "a script that needs more than its import lines changed proves nothing"
    return changed


def run(path: Path, source: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, str(path), "exec"), names)
    return names


def check(names: dict[str, Any]) -> None:
    assert 0 < names["epsilon"] < math.inf
    assert names.get("accuracy", 1.0) > 0.7, "it must have learned something"
    assert names.get("largest", 1) <= 32, "a physical batch is never larger than was asked"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs_with_ghostgrad(path):
    check(run(path, with_changed_imports(path.read_text())))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs_with_opacus_and_reports_the_same_epsilon(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("opacus")
        theirs = run(path, path.read_text())
        check(theirs)
        ours = run(path, with_changed_imports(path.read_text()))
    assert ours["epsilon"] == pytest.approx(theirs["epsilon"], rel=2e-2)
    if "sigma" in theirs:
        assert ours["sigma"] == pytest.approx(theirs["sigma"], rel=2e-2)


def test_the_criterion_of_ghost_mode_is_the_one_given():
    script = next(path for path in SCRIPTS if path.stem == "ghost")
    names = run(script, with_changed_imports(script.read_text()))
    assert all(isinstance(loss, float) and math.isfinite(loss) for loss in names["losses"])


def test_per_sample_gradients_are_readable_in_hooks_mode():
    script = next(path for path in SCRIPTS if path.stem == "hooks")
    names = run(script, with_changed_imports(script.read_text()))
    shapes = [tuple(p.shape) for p in names["model"].parameters()]
    assert [tuple(shape[1:]) for shape in names["per_sample"]] == shapes
