"""``python -m ghostgrad report``: shows, compares, and stops a pipeline whose guarantee does not hold."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ghostgrad import PrivacyEngine, PrivacyReport
from ghostgrad.__main__ import main
from ghostgrad.accounting import Opaque

Train = Callable[..., PrivacyEngine]
Capture = pytest.CaptureFixture[str]


def saved(report: PrivacyReport, path: Path) -> str:
    report.save(path)
    return str(path)


def changed(report: PrivacyReport, path: Path, **values: Any) -> str:
    path.write_text(json.dumps({**report.data, **values}))
    return str(path)


def test_a_check_in_a_fresh_process_is_quick_and_needs_no_torch(train: Train, tmp_path: Path) -> None:
    path = saved(train(sample_rate=0.2).report(), tmp_path / "a.json")
    code = "import sys; from ghostgrad.__main__ import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for action in (["show", path], ["check", path, "--max-epsilon", "20"], ["diff", path, path]):
        subprocess.run([sys.executable, "-c", code, "report", *action], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3 * 2.0


def test_show_is_the_report_as_text(train: Train, tmp_path: Path, capsys: Capture) -> None:
    path = saved(train(engine=PrivacyEngine(seed=1)).report(title="Mine"), tmp_path / "a.json")
    assert main(["report", "show", path]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Mine\nThe guarantee does not hold.\n  Does not hold (seeded)")
    for part in ("WHAT IS PROTECTED", "EPSILON", "RELEASES", "WHAT EPSILON DOES NOT COUNT"):
        assert part in said


def test_diff_says_what_changed(train: Train, tmp_path: Path, capsys: Capture) -> None:
    one = saved(train().report(deltas=[1e-5]), tmp_path / "a.json")
    two = saved(train(noise_multiplier=2.0, poisson_sampling=False).report(deltas=[1e-5, 1e-6]), tmp_path / "b.json")
    assert main(["report", "diff", one, one]) == 0
    assert capsys.readouterr().out == "the reports say the same\n"
    assert main(["report", "diff", one, two]) == 1
    said = capsys.readouterr().out.splitlines()
    assert "neighbouring: 'add-or-remove-one' -> 'zero-out'" in said
    assert "trainings.0.noise_multiplier: 1.0 -> 2.0" in said
    assert any(line.startswith("epsilon.rdp at 1e-05.upper: ") for line in said)
    assert any(line.startswith("epsilon.pld at 1e-06: nothing -> ") for line in said)
    assert any(line.startswith("findings.not-amplified: nothing -> ") for line in said)
    assert [line for line in said if line.startswith(("figures", "ledger"))] == ["ledger: differs", "figures: differs"]


def test_a_guarantee_within_the_limit_passes(train: Train, tmp_path: Path, capsys: Capture) -> None:
    engine = train()
    path = saved(engine.report(deltas=[1e-5]), tmp_path / "a.json")
    for accountant in ("pld", "rdp"):
        for delta in (1e-5, 1e-7):  # the second is not in the report, but follows from its ledger
            epsilon = engine.get_epsilon(delta, accountant=accountant)
            options = ["--delta", str(delta), "--accountant", accountant]
            assert main(["report", "check", path, "--max-epsilon", str(epsilon * 1.00001), *options]) == 0
            assert capsys.readouterr().out.startswith("passed: ")
            assert main(["report", "check", path, "--max-epsilon", str(epsilon * 0.999), *options]) == 1
            assert f"by {accountant} is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"noise_multiplier": 0.0}, "no-noise"),
        ({"engine": lambda: PrivacyEngine(seed=1)}, "seeded"),
        ({"noise_generator": torch.Generator}, "noise-generator"),
        ({"data_loader": None, "sample_rate": 1.0, "expected_batch_size": 8.0}, "user-sampled"),
    ],
)
def test_a_guarantee_that_does_not_hold_fails(
    train: Train, tmp_path: Path, capsys: Capture, options: dict[str, Any], code: str
) -> None:
    made = {name: value() if callable(value) else value for name, value in options.items()}
    path = saved(train(**made).report(), tmp_path / "a.json")
    assert main(["report", "check", path, "--max-epsilon", "1e9"]) == 1
    assert code in capsys.readouterr().out
    accepted = main(["report", "check", path, "--max-epsilon", "1e9", "--accept", code])
    assert accepted == (0 if code in ("noise-generator", "user-sampled") else 1), "what is void cannot be accepted"


def test_a_report_of_nothing_fails(train: Train, tmp_path: Path, capsys: Capture) -> None:
    path = saved(train(steps=0).report(), tmp_path / "a.json")
    assert main(["report", "check", path, "--max-epsilon", "1"]) == 1
    assert "nothing was released" in capsys.readouterr().out


def test_a_report_with_private_numbers_fails(train: Train, tmp_path: Path, capsys: Capture) -> None:
    path = saved(train().report(not_private=True), tmp_path / "a.json")
    assert main(["report", "check", path, "--max-epsilon", "100"]) == 1
    assert "not private" in capsys.readouterr().out


def test_an_epsilon_that_its_ledger_denies_fails(train: Train, tmp_path: Path, capsys: Capture) -> None:
    report = train().report(deltas=[1e-5])
    rows = report.data["epsilon"]
    rows[1]["upper"] = rows[1]["lower"] = 0.1
    path = changed(report, tmp_path / "a.json", epsilon=rows)
    assert main(["report", "check", path, "--max-epsilon", "100"]) == 1
    assert "its ledger gives" in capsys.readouterr().out


def test_numbers_that_are_convolved_are_confirmed(train: Train, tmp_path: Path, capsys: Capture) -> None:
    engine = train(sample_rate=0.2)
    engine.accountant.record(Opaque(0.2, 1e-7))
    path = saved(engine.report(), tmp_path / "a.json")
    assert main(["report", "check", path, "--max-epsilon", "20", "--accept", "opaque-events"]) == 0, (
        capsys.readouterr().out
    )


def test_releases_that_its_ledger_denies_fail(train: Train, tmp_path: Path, capsys: Capture) -> None:
    report = train().report(deltas=[1e-5])
    path = changed(report, tmp_path / "a.json", releases={**report.data["releases"], "count": 2})
    assert main(["report", "check", path, "--max-epsilon", "100"]) == 1
    assert "does not follow from its ledger" in capsys.readouterr().out


def test_without_its_ledger_only_the_rows_of_a_report_can_be_read(
    train: Train, tmp_path: Path, capsys: Capture
) -> None:
    path = changed(train().report(deltas=[1e-5]), tmp_path / "a.json", ledger="unknown")
    assert main(["report", "check", path, "--max-epsilon", "100"]) == 0
    assert main(["report", "check", path, "--max-epsilon", "100", "--delta", "1e-6"]) == 1
    assert "unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "{folder}/none.json"], "cannot be read"),
        (["show", "{folder}/bad.json"], "not JSON"),
        (["check", "{folder}/bad.json", "--max-epsilon", "3"], "not JSON"),
        (["check", "{folder}/a.json", "--max-epsilon", "3", "--accountant", "gdp"], "accountant='gdp'"),
        (["check", "{folder}/a.json", "--max-epsilon", "nan"], "max_epsilon=nan"),
        (["check", "{folder}/a.json", "--max-epsilon", "3", "--delta", "2"], "delta=2"),
    ],
)
def test_what_cannot_be_used_is_explained(
    train: Train, tmp_path: Path, capsys: Capture, arguments: list[str], said: str
) -> None:
    saved(train().report(), tmp_path / "a.json")
    (tmp_path / "bad.json").write_text("{")
    assert main(["report", *(part.format(folder=tmp_path) for part in arguments)]) == 2
    assert said in capsys.readouterr().err
