"""``python -m ghostgrad plan`` and ``epsilon``: readable, machine-readable, fast."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from ghostgrad.__main__ import main
from ghostgrad.accounting import make_plan
from ghostgrad.errors import ConfigurationError

RUN = ["--n", "60000", "--batch-size", "2048", "--epochs", "20", "--delta", "1e-5"]


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_plan_in_a_fresh_process_takes_less_than_two_seconds() -> None:
    start = _cpu_of_children()
    done = subprocess.run(
        [sys.executable, "-m", "ghostgrad", "plan", *RUN, "--epsilon", "3"], capture_output=True, text=True, check=True
    )
    assert _cpu_of_children() - start < 2.0
    assert "noise multiplier" in done.stdout
    assert "neighbouring: add-or-remove-one" in done.stdout


def test_plan_and_epsilon_are_inverse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *RUN, "--epsilon", "3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert 3.0 * (1 - 1e-4) <= plan["epsilons"]["pld"] <= 3.0
    assert plan["epsilons"]["gdp"] < plan["epsilons"]["pld"] < plan["epsilons"]["rdp"]
    assert main(["epsilon", *RUN, "--noise-multiplier", str(plan["noise_multiplier"]), "--json"]) == 0
    back = json.loads(capsys.readouterr().out)
    assert back["epsilons"] == plan["epsilons"]
    assert back["steps"] == plan["steps"] == 586


def test_readable_table_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *RUN, "--epsilon", "3"]) == 0
    text = capsys.readouterr().out
    for part in ("586 steps", "can be too low", "batch size", "what if", "half the steps", "membership attack"):
        assert part in text


def test_infinite_epsilon_is_said_in_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["epsilon", *RUN, "--noise-multiplier", "0"]) == 0
    assert "inf" in capsys.readouterr().out
    assert main(["epsilon", *RUN, "--noise-multiplier", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilons"]["rdp"] == "inf"


@pytest.mark.parametrize(
    ("change", "said"),
    [(["--epsilon", "-1"], "epsilon=-1"), (["--epsilon", "3", "--accountant", "pdl"], "did you mean 'pld'")],
)
def test_unusable_arguments_are_explained(change: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *RUN, *change]) == 2
    assert said in capsys.readouterr().err


def test_plan_refuses_contradictions() -> None:
    with pytest.raises(ConfigurationError, match="batch_size=200"):
        make_plan(dataset_size=100, batch_size=200, epochs=1, epsilon=1.0, delta=1e-5)
    with pytest.raises(ConfigurationError, match="exactly one"):
        make_plan(dataset_size=100, batch_size=20, epochs=1, delta=1e-5)
