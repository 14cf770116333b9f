"""The page of supported layers names every layer that has a rule, with the rule's name as `explain()` shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghostgrad.layers.registry import _RULES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "supported-layers.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("layer", _RULES, ids=lambda layer: layer.__name__)
def test_every_layer_with_a_rule_has_a_row(layer):
    (row,) = [row for row in ROWS if f"`{layer.__name__}`" in row.split("|")[1] and "instead" not in row][:1]
    assert row.split("|")[2].strip() == _RULES[layer].name
