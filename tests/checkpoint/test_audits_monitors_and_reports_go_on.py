"""What is built on a training goes on with it: audits, monitors and reports after a resume, with a ledger file and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, Monitor, PrivacyEngine, PrivacyReport
from ghostgrad.__main__ import main
from ghostgrad.accounting import Gaussian, PoissonSampled
from ghostgrad.audit import GradientCanaries, loss_score
from ghostgrad.errors import CheckpointError, ConfigurationError, PrivacyError
from ghostgrad.ledger import LedgerFile, read_ledger
from ghostgrad.ledger.__main__ import main as verify

DATA = TensorDataset(torch.arange(72.0).view(24, 3) / 72, torch.arange(24) % 2)


class Run:
    """A private training with its own way to stop: what is not in the file is gone."""

    def __init__(self, *, limit: int | None = None, private: dict[str, Any] | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.engine = PrivacyEngine(**options)
        self.limit = limit
        self.open(nn.Linear(3, 2), **(private or {}))

    def open(self, module: nn.Module, **private: Any) -> Run:
        options = {
            "data_loader": DataLoader(DATA, batch_size=6),
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
            **private,
        }
        self.module, self.optimizer, self.loader = self.engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), **options
        )
        return self

    @property
    def parts(self) -> dict[str, Any]:
        return {"module": self.module, "optimizer": self.optimizer}

    def train(self, steps: int) -> Run:
        until = self.optimizer.steps + steps
        while self.optimizer.steps < until:
            if self.limit is None:
                self._pass(self.loader, until)
            else:
                with BatchMemoryManager(
                    data_loader=self.loader, max_physical_batch_size=self.limit, optimizer=self.optimizer
                ) as pieces:
                    self._pass(pieces, until)
        return self

    def _pass(self, batches: Any, until: int) -> None:
        for x, y in batches:
            nn.functional.cross_entropy(self.module(x), y, reduction="sum").div(max(1, len(x))).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.optimizer.steps == until:
                return

    def save(self, path: Path) -> Path:
        self.engine.save_checkpoint(path, **self.parts)
        return path

    def load(self, path: Path, **options: Any) -> Run:
        self.engine.load_checkpoint(path, **self.parts, **options)
        return self

    def stop(self) -> None:
        if self.engine._ledger is not None:
            self.engine._ledger.close()


def test_canaries_after_a_resume_meet_new_noise_or_the_same_release(tmp_path: Path) -> None:
    first = Run()
    path = first.train(2).save(tmp_path / "checkpoint")
    with GradientCanaries(first.optimizer, seed=1) as before:
        first.train(150)
    fresh = Run().load(path, fresh_key=True)
    with GradientCanaries(fresh.optimizer, after=before, seed=2) as canaries:
        fresh.train(150)
    assert canaries.result(delta=1e-5).verdict == "consistent"
    again = Run().load(path)
    with GradientCanaries(again.optimizer, after=before, seed=2) as canaries:
        again.train(150)
    # With other coins the sums are others under the key of the checkpoint, which is what must not be published twice.
    assert canaries.result(delta=1e-5).verdict == "contradicted"


def test_canaries_after_a_resume_are_stopped_by_a_ledger_file(tmp_path: Path) -> None:
    first = Run(ledger=tmp_path / "run.jsonl")
    path = first.train(2).save(tmp_path / "checkpoint")
    with GradientCanaries(first.optimizer, seed=1):
        first.train(3)
    first.stop()
    again = Run(ledger=tmp_path / "run.jsonl").load(path)
    with GradientCanaries(again.optimizer, seed=2), pytest.raises(PrivacyError, match="another sum"):
        again.train(3)


@pytest.mark.parametrize("ledger", [False, True])
def test_a_monitor_counts_on_with_the_same_releases(ledger: bool, tmp_path: Path) -> None:
    options = {"ledger": tmp_path / "run.jsonl"} if ledger else {}
    run = Run(**options)
    monitor = Monitor(run.engine, private_share=0.1)
    path = run.train(3).save(tmp_path / "checkpoint")
    run.train(3)
    run.stop()
    again = Run(**options)
    monitored = Monitor(again.engine, private_share=0.1)
    again.load(path).train(3)
    assert all(map(torch.equal, run.module.parameters(), again.module.parameters()))
    assert torch.equal(monitored.counts, monitor.counts)
    assert again.engine.accountant.history == run.engine.accountant.history
    assert monitored.epsilon == monitor.epsilon
    if ledger:
        assert read_ledger(tmp_path / "run.jsonl").ledger.steps == 6


@pytest.mark.parametrize("ledger", [False, True])
def test_a_resume_without_the_monitor_does_not_repeat_the_noise(ledger: bool, tmp_path: Path) -> None:
    options = {"ledger": tmp_path / "run.jsonl"} if ledger else {}
    run = Run(**options)
    Monitor(run.engine, private_share=0.1)
    path = run.train(2).save(tmp_path / "checkpoint")
    sums = _noise_of_the_next_step(run)
    run.stop()
    again = Run(**options).load(path)
    if ledger:
        with pytest.raises(PrivacyError, match="another sum"):
            again.train(1)
    else:
        assert not torch.equal(_noise_of_the_next_step(again), sums)


def _noise_of_the_next_step(run: Run) -> torch.Tensor:
    """Of the weight, in units of its standard deviation."""
    found = []
    add_all = run.optimizer.noise.add_all_

    def noted(slices: Any, *, std: float, step: int) -> None:
        before = slices[0][1].clone()
        add_all(slices, std=std, step=step)
        found.append((slices[0][1] - before) / std)

    run.optimizer.noise.add_all_ = noted
    run.train(1)
    return found[0].round(decimals=3)


@pytest.mark.parametrize("ledger", [False, True])
@pytest.mark.parametrize("exact", [True, False])
def test_a_report_after_a_resume_counts_everything(exact: bool, ledger: bool, tmp_path: Path) -> None:
    options = {"ledger": tmp_path / "run.jsonl"} if ledger else {}
    run = Run(limit=2, private={"accumulation_steps": 2}, **options)
    path = run.train(3).save(tmp_path / "checkpoint")
    whole = run.train(4).engine.report(deltas=[1e-5]).data
    run.stop()
    again = Run(limit=2, private={"accumulation_steps": 2}, **options).load(path, fresh_key=not exact).train(4)
    report = again.engine.report(deltas=[1e-5])
    spent = 11 if ledger and not exact else 7
    assert report.data["releases"]["steps"] == again.engine.steps == spent
    assert (report.data["epsilon"] == whole["epsilon"]) is (spent == 7)
    training, expected = report.data["trainings"][0], whole["trainings"][0]
    assert training["steps"] == 7
    assert report.data["guarantee"] == whole["guarantee"]
    # What was released after the checkpoint is of no training that goes on; the ledger file says how it was made.
    (made,) = report.data["releases"]["made"]
    assert (made["releases"], made["sampler"], made["secure"], made["seeded"]) == (spent, "poisson", False, False)
    assert (report.holds, report.data["findings"]) == ("yes", [])
    assert ("How the releases were made" in report.to_html()) is (spent == 11)
    if exact:
        assert training["sampling"] == expected["sampling"]
    path = tmp_path / "report.json"
    path.write_text(report.to_json())
    epsilon = again.engine.get_epsilon(1e-5)
    check = ["report", "check", str(path), "--max-epsilon"]
    assert main([*check, f"{epsilon * 1.01}"]) == 0
    assert main([*check, f"{epsilon * 0.9}"]) == 1


def test_an_audit_leaves_the_ledger_file_of_its_engine_alone(tmp_path: Path) -> None:
    run = Run(ledger=tmp_path / "run.jsonl").train(2)
    before = (tmp_path / "run.jsonl").read_bytes()

    def train(engine: PrivacyEngine, data: Any) -> Any:
        model = nn.Linear(3, 1)
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(data, batch_size=8),
        )  # fmt: skip
        for x, y in loader:
            (model(x) - y).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss_score(model, lambda model, record: (model(record[0]) - record[1]).pow(2).sum())

    data = TensorDataset(torch.randn(24, 3), torch.randn(24, 1))
    canaries = [(torch.randn(3), torch.randn(1)) for _ in range(10)]
    result = run.engine.audit(train, data, canaries, delta=1e-3, confidence=0.999)
    assert result.verdict == "consistent"
    assert (tmp_path / "run.jsonl").read_bytes() == before
    assert (run.engine.steps, len(run.engine.accountant)) == (2, 2)
    run.train(1)
    assert read_ledger(tmp_path / "run.jsonl").ledger.steps == 3


def test_secure_mode_goes_on_bit_for_bit_and_only_as_secure(tmp_path: Path) -> None:
    run = Run(secure_mode=True)
    path = run.train(2).save(tmp_path / "checkpoint")
    run.train(3)
    again = Run(secure_mode=True).load(path).train(3)
    assert all(map(torch.equal, run.module.parameters(), again.module.parameters()))
    report = again.engine.report(deltas=[1e-5]).data["trainings"][0]["noise"]
    assert report == run.engine.report(deltas=[1e-5]).data["trainings"][0]["noise"]
    assert report["secure"]
    assert report["seeded"] is False
    with pytest.raises(CheckpointError, match="secure_mode"):
        Run().load(path)


@pytest.mark.parametrize("ledger", [False, True])
def test_a_second_training_of_an_engine_is_saved_and_the_first_stays_spent(ledger: bool, tmp_path: Path) -> None:
    options = {"ledger": tmp_path / "run.jsonl"} if ledger else {}
    run = Run(**options).train(3)
    module = run.module
    run.engine.detach()
    run.open(module).train(2)
    path = run.save(tmp_path / "checkpoint")
    run.train(2)
    run.stop()
    again = Run(**options).load(path).train(2)
    assert again.engine.steps == (9 if ledger else 7)  # the file knows of the two after the checkpoint
    assert len(again.engine.accountant) == again.engine.steps
    report = again.engine.report(deltas=[1e-5])
    assert report.data["releases"]["steps"] == again.engine.steps
    assert sum(made["releases"] for made in report.data["releases"]["made"]) == again.engine.steps
    assert report.holds == "yes"
    assert "How the releases were made" in report.to_markdown()  # the first training is told of nowhere else
    if ledger:
        assert read_ledger(tmp_path / "run.jsonl").ledger.steps == 9


BY_HAND = {"data_loader": None, "sample_rate": 0.3, "expected_batch_size": 6.0}
GENERATOR = {"noise_generator": torch.Generator().manual_seed(0)}


@pytest.mark.parametrize(
    ("before", "options", "codes", "holds"),
    [
        ({}, {}, [], "yes"),
        ({"seed": 1}, {}, ["seeded"], "no"),
        ({}, GENERATOR, ["noise-generator"], "unknown"),
        ({}, BY_HAND, ["user-sampled"], "unknown"),
        ({}, {"poisson_sampling": False}, ["not-amplified"], "yes"),
    ],
    ids=["poisson", "seeded", "generator", "by hand", "own batches"],
)
def test_a_report_says_what_the_ledger_file_tells_of_a_process_that_ended(
    before: dict[str, Any], options: dict[str, Any], codes: list[str], holds: str, tmp_path: Path
) -> None:
    first = Run(ledger=tmp_path / "run.jsonl", private=options, **before)
    if first.loader is None:
        for _ in range(3):
            first.optimizer.step()
            first.optimizer.zero_grad()
    else:
        first.train(3)
    first.stop()
    again = Run(ledger=tmp_path / "run.jsonl").train(2)
    report = again.engine.report(deltas=[1e-5])
    assert report.holds == holds
    assert [finding["code"] for finding in report.data["findings"]] == codes
    data = report.data
    del data["releases"]["made"][0]
    with pytest.raises(ConfigurationError, match="carried-over"):
        PrivacyReport.from_data(data)


@pytest.mark.parametrize("lacking", ["settings", "one setting", "agreement", "steps"])
def test_a_ledger_file_that_does_not_tell_all_leaves_the_steps_unknown(lacking: str, tmp_path: Path) -> None:
    file = LedgerFile(tmp_path / "run.jsonl", "add-or-remove-one")
    settings = {"sampler": "poisson", "noise": "keyed", "secure": False, "seeded": False}
    told = {"settings": {}, "one setting": {**settings, "seeded": "no"}}.get(lacking, settings)
    file.training(run="a", number=0, relation="", settings=told)
    events = [(PoissonSampled(0.1, Gaussian(1.0)), 1)]
    file.release(events, run="a", training=0, step=1, digest="")
    if lacking == "agreement":
        file.training(run="a", number=0, relation="", settings={**settings, "noise": "another"})
    if lacking == "steps":
        file.record(events, run="a", steps=1)  # taken over from a checkpoint that the file had not seen
    file.close()
    again = Run(ledger=tmp_path / "run.jsonl").train(2)
    report = again.engine.report(deltas=[1e-5])
    (finding,) = report.data["findings"]
    assert (finding["code"], report.holds) == ("carried-over", "unknown")
    assert f"1 of the {again.engine.steps} releases" in finding["statement"]
    report.save(tmp_path / "report.json")
    check = ["report", "check", str(tmp_path / "report.json"), "--max-epsilon", "1000"]
    assert main(check) == 1
    assert main([*check, "--accept", "carried-over"]) == 0


@pytest.mark.parametrize("exact", [True, False])
def test_a_report_remembers_that_a_part_was_seeded(exact: bool, tmp_path: Path) -> None:
    path = Run(seed=1).train(2).save(tmp_path / "checkpoint")
    again = Run(ledger=tmp_path / "run.jsonl").load(path, fresh_key=not exact).train(1)
    assert again.engine.report(deltas=[1e-5]).holds == "no"
    path = again.save(tmp_path / "checkpoint")
    again.stop()
    without = Run().load(path, acknowledge=["ledger"], fresh_key=True).train(1)
    assert without.engine.report(deltas=[1e-5]).holds == "no"
    from_file = Run(ledger=tmp_path / "run.jsonl").train(1).engine.report(deltas=[1e-5])
    assert from_file.holds == ("no" if exact else "unknown")  # the file was told of the two before it without how


@pytest.mark.parametrize("change", [{"sampler": "shuffled"}, {"seeded": "no"}, {"noise": 1}, {"more": 1}])
def test_a_state_that_tells_something_else_is_refused(change: dict[str, Any]) -> None:
    run = Run().train(1)
    state = run.engine.state_dict()
    state["made"][0][2] |= change
    with pytest.raises(CheckpointError, match="made"):
        Run().engine.load_state_dict(state)


def test_a_report_remembers_that_a_part_had_noise_of_another_source(tmp_path: Path) -> None:
    path = Run(private=GENERATOR).train(2).save(tmp_path / "checkpoint")
    again = Run().load(path, acknowledge=["noise"]).train(1)
    report = again.engine.report(deltas=[1e-5])
    assert [(made["releases"], made["seeded"]) for made in report.data["releases"]["made"]] == [
        (2, "unknown"),
        (1, False),
    ]
    assert report.holds == "unknown"
    assert "torch generator" in report.to_html()


def test_steps_of_which_nothing_is_known_stay_so_beside_others_that_are_counted_twice(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path / "run.jsonl", "add-or-remove-one")
    file.record([(PoissonSampled(0.1, Gaussian(1.0)), 2)], run="a", steps=2)
    file.close()
    path = Run().train(2).save(tmp_path / "checkpoint")
    again = Run(ledger=tmp_path / "run.jsonl").load(path)
    again.engine.detach()  # and the same two steps once more:
    report = again.open(nn.Linear(3, 2)).load(path).engine.report(deltas=[1e-5])
    assert [training["steps"] for training in report.data["trainings"]] == [2, 2]
    assert report.data["releases"]["steps"] == 4
    assert report.holds == "unknown"


@pytest.mark.parametrize("ledger", [False, True])
def test_batches_that_were_not_sampled_stay_known(ledger: bool, tmp_path: Path, capsys: Any) -> None:
    options = {"ledger": tmp_path / "run.jsonl"} if ledger else {}
    run = Run(private={"poisson_sampling": False}, **options).train(2)
    path = run.save(tmp_path / "checkpoint")
    run.stop()
    again = Run(**options)
    if not ledger:
        again.load(path, acknowledge=["sampler"], fresh_key=True)
    report = again.train(1).engine.report(deltas=[1e-5])
    assert report.data["neighbouring"] == "zero-out"
    assert "blanking" in again.engine.guarantee
    assert "Poisson" in again.engine.guarantee
    if ledger:
        assert verify([str(tmp_path / "run.jsonl")]) == 0
        assert "blanking one record" in capsys.readouterr().out
