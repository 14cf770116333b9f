"""The example that fine-tunes a pretrained model, on a few reviews: it runs, in full and with adapters, within its budget."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("how", ["full", "lora"])
def test_it_trains_within_its_budget(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if how == "lora":
        pytest.importorskip("peft")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    data, example = importlib.import_module("data"), importlib.import_module("finetune_minilm")
    try:
        few = example.reviews(None, 12).head(80, 20)
    except data.DataMissing as missing:
        pytest.skip(str(missing))

    def reviews(folder: Any, length: int) -> Any:
        return few

    monkeypatch.setattr(example, "reviews", reviews)
    accuracy, epsilon = example.main(["--quick", "--seed", "0", *(["--lora"] if how == "lora" else [])])
    assert 0 <= accuracy <= 1
    assert 2.5 < epsilon <= 3
    assert "clipper" in capsys.readouterr().out
