"""What ranks exchange in a private step, counted where torch dispatches it, beside a plain one; by the benchmark's script."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from communication import Form, measured, table

FACTS = 6000
"""Bytes that the comparison of the ranks in a step may take."""


def test_calls_and_bytes_of_a_step() -> None:
    forms = {
        (layout, mode, pieces, kept): Form(layout, mode, pieces, kept)
        for layout, mode, pieces, kept in [
            ("wrapped", None, 1, False), ("wrapped", "bk", 1, False), ("wrapped", "bk", 4, False),
            ("split", None, 1, False), ("split", "bk", 1, False), ("split", "ghost", 1, False),
            ("split", None, 4, True), ("split", "ghost", 4, True),
        ]
    }  # fmt: skip
    results = measured(2, 16, list(forms.values()))
    found = dict(zip(forms, results, strict=True))
    units = 5

    plain, private = found["wrapped", None, 1, False], found["wrapped", "bk", 1, False]
    assert plain[0]["all-reduce"] == private[0]["all-reduce"] == found["wrapped", "bk", 4, False][0]["all-reduce"] == 1
    assert plain[1]["all-reduce"] == private[1]["all-reduce"] == found["wrapped", "bk", 4, False][1]["all-reduce"]
    assert sum(private[1].values()) - sum(plain[1].values()) < FACTS

    plain = found["split", None, 1, False]
    for mode, passes in (("bk", 2), ("ghost", 3)):
        calls, sent = found["split", mode, 1, False]
        assert calls["reduce-scatter"] == plain[0]["reduce-scatter"] == units
        assert sent["reduce-scatter"] == plain[1]["reduce-scatter"]
        assert calls["all-gather"] == passes * units + 2
        assert abs(sent["all-gather"] - plain[1]["all-gather"] * passes // 2) < FACTS
        assert (calls["all-reduce"], sent["all-reduce"]) == (1, 1)

    plain, private = found["split", None, 4, True], found["split", "ghost", 4, True]
    assert private[0]["reduce-scatter"] == plain[0]["reduce-scatter"] == 4 * units
    assert private[0]["all-gather"] == plain[0]["all-gather"] + 2
    assert sum(private[1].values()) - sum(plain[1].values()) < FACTS
    assert "FSDP2, weights kept, private, ghost" in table(list(forms.values()), results, 1)
