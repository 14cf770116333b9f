"""The example of each trainer in its quick form: it runs, learns and keeps its budget."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("tqdm", reason="the examples need the extra `examples`")

pytestmark = pytest.mark.filterwarnings("ignore")  # what the trainers warn about


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def script(name: str, *, trainer: str, needs: str) -> ModuleType:
    pytest.importorskip(trainer, exc_type=ImportError)
    data = importlib.import_module("data")
    try:
        getattr(data, needs)()
    except data.DataMissing as missing:
        pytest.skip(str(missing))
    return importlib.import_module(name)


def test_the_transformers_example_learns_letter_frequencies(capsys: pytest.CaptureFixture[str]) -> None:
    example = script("transformers_trainer", trainer="transformers", needs="speeches")
    perplexity, epsilon = example.main(["--quick", "--seed", "0"])
    assert perplexity < 40, "guessing gives 97"
    assert 2.5 < epsilon <= 3
    assert "clipper bk" in capsys.readouterr().out


def test_the_lightning_example_beats_the_commonest_class() -> None:
    example = script("lightning_trainer", trainer="lightning.pytorch", needs="clothing_reviews")
    accuracy, epsilon = example.main(["--quick", "--seed", "0"])
    assert accuracy > 0.6, "always answering 'Tops' gives 0.46"
    assert 2.5 < epsilon <= 3


@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_the_accelerate_example_beats_the_commonest_class(precision: list[str]) -> None:
    example = script("accelerate_loop", trainer="accelerate", needs="adult")
    accelerate = importlib.import_module("accelerate")
    try:
        accuracy, epsilon = example.main(["--quick", "--seed", "0", *precision])
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
    assert accuracy > 0.78, "always answering 'no' gives 0.76"
    assert 0.8 < epsilon <= 1
