"""Every example script in its quick form: it runs, learns, keeps its budget and says which clipper it used.

The two long forms whose accuracy the examples' page claims to be good are held to it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytest.importorskip("tqdm", reason="the examples need the extra `examples`")


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def script(name: str, *, needs: str) -> ModuleType:
    """The example as a module; skips where the package with its data is not installed."""
    data = importlib.import_module("data")
    try:
        getattr(data, needs)()
    except data.DataMissing as missing:
        pytest.skip(str(missing))
    return importlib.import_module(name)


def test_image_example_learns_digits_within_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy, epsilon = importlib.import_module("images").main(["--quick", "--seed", "0"])
    assert accuracy > 0.4, "ten classes: guessing gives 0.1"
    assert 2.5 < epsilon <= 3
    shown = capsys.readouterr()
    assert "clipper" in shown.out
    assert "100%|" in shown.err, "the progress bar"


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk", "functorch"])
def test_image_example_gives_the_same_result_in_every_clipper(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    images = importlib.import_module("images")
    assert images.main(["--quick", "--seed", "1", "--mode", mode]) == images.main(["--quick", "--seed", "1"])
    assert mode in capsys.readouterr().out


def test_image_example_learns_fashion() -> None:
    accuracy, epsilon = script("images", needs="fashion_mnist").main(["--quick", "--seed", "0", "--dataset", "fashion"])
    assert accuracy > 0.4
    assert epsilon <= 3


def test_tabular_example_beats_the_commonest_class() -> None:
    accuracy, epsilon = script("tabular", needs="adult").main(["--quick", "--seed", "0"])
    assert accuracy > 0.78, "always answering 'no' gives 0.76"
    assert epsilon <= 1


def test_the_long_form_on_adult_reaches_its_accuracy_at_epsilon_1() -> None:
    accuracy, epsilon = script("tabular", needs="adult").main(["--seed", "0"])
    assert accuracy >= 0.843
    assert 0.99 < epsilon <= 1


def test_the_long_form_on_fashion_reaches_its_accuracy_at_epsilon_3() -> None:
    accuracy, epsilon = script("images", needs="fashion_mnist").main(["--seed", "0", "--dataset", "fashion"])
    assert accuracy >= 0.86
    assert 2.98 < epsilon <= 3


def test_text_example_beats_the_commonest_class() -> None:
    accuracy, epsilon = script("text_classification", needs="clothing_reviews").main(["--quick", "--seed", "0"])
    assert accuracy > 0.6, "always answering 'Tops' gives 0.46"
    assert epsilon <= 3


def test_language_model_example_learns_letter_frequencies() -> None:
    perplexity, epsilon = script("char_lm", needs="speeches").main(["--quick", "--seed", "0"])
    assert perplexity < 40, "guessing gives 97"
    assert epsilon <= 3


def test_compared_clippers_end_at_the_same_parameters(tmp_path: Path) -> None:
    figure = tmp_path / "clippers.png"
    apart = importlib.import_module("compare_clippers").main(["--quick", "--figure", str(figure)])
    assert apart < 1e-4
    assert figure.stat().st_size > 1000


def test_the_epsilon_of_the_demo_is_that_of_the_reference_library(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pytest.importorskip("dp_accounting")
    rdp = pytest.importorskip("dp_accounting.rdp")
    images = importlib.import_module("images")
    engines = []

    class Noted(images.PrivacyEngine):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            engines.append(self)

    monkeypatch.setattr(images, "PrivacyEngine", Noted)
    _, epsilon = images.main(["--quick", "--seed", "0"])
    oracle = rdp.RdpAccountant()
    for noise_multiplier, sample_rate, steps in engines[0].accountant.history:
        gaussian = reference.GaussianDpEvent(noise_multiplier)
        oracle.compose(reference.PoissonSampledDpEvent(sample_rate, gaussian), steps)
    assert epsilon == pytest.approx(oracle.get_epsilon(images.DELTA), rel=1e-3)
