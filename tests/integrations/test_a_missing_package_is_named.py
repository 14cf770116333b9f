"""Without their packages the integrations import, and say what to install when they are used."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ghostgrad
from ghostgrad.errors import MissingDependencyError
from ghostgrad.integrations.plan import PrivacyPlan

PLAN = PrivacyPlan(target_delta=1e-5, noise_multiplier=1.0)
USES: dict[str, Callable[[Any], Any]] = {
    "transformers": lambda module: module.DPTrainer(None, None, privacy=PLAN, train_dataset=[]),
    "lightning": lambda module: module.DPCallback(PLAN, max_grad_norm=1.0),
    "accelerate": lambda module: module.prepare(None),
}


@pytest.mark.parametrize("package", USES)
def test_the_extra_is_named_when_the_package_is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it now fails
    if package == "lightning":
        monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, f"ghostgrad.integrations.{package}", raising=False)
    module = importlib.import_module(f"ghostgrad.integrations.{package}")
    try:
        with pytest.raises(MissingDependencyError, match=rf"needs {package}.*pip install 'ghostgrad\[trainers\]'"):
            USES[package](module)
    finally:
        sys.modules.pop(f"ghostgrad.integrations.{package}", None)  # the next import finds the package again


def test_the_extra_has_every_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (extra,) = [line for line in text.splitlines() if line.startswith("trainers = ")]
    assert all(package in extra for package in [*USES, "peft"])


def test_nothing_is_imported_unasked() -> None:
    code = (
        "import sys, ghostgrad, ghostgrad.integrations, ghostgrad.integrations.plan; from ghostgrad import PrivacyEngine; "
        f"sys.exit(any(name in sys.modules for name in {list(USES)}))"
    )
    assert Path(ghostgrad.__file__).exists()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
