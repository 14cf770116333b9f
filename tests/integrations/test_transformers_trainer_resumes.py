"""A `DPTrainer` that was interrupted goes on: nothing spent is forgotten, nothing random is drawn twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from tiny_trainers import gpt2, language, trainer  # noqa: E402

from ghostgrad.errors import CheckpointError, PrivacyError  # noqa: E402
from ghostgrad.integrations.plan import PrivacyPlan  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns about

PLAN = PrivacyPlan(target_delta=1e-3, noise_multiplier=1.0)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def run_in(folder: Path, plan: PrivacyPlan = PLAN, **changed: Any) -> Any:
    """A trainer of a new process: same model, same data, and a generator that stands anywhere."""
    torch.manual_seed(0)
    model, records = gpt2(dropout=0.1), language()
    options = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "lr_scheduler_type": "cosine"}
    return trainer(folder, model, records, plan, **{**options, **changed})


def parameters(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("clipping", "steps", "parts"), [("flat", 13, 1), ("adaptive", 7, 2)])
def test_a_seeded_run_ends_where_the_uninterrupted_one_does(
    tmp_path: Path, clipping: str, steps: int, parts: int
) -> None:
    plan = PrivacyPlan(target_delta=1e-3, noise_multiplier=1.0, seed=1, clipping=clipping)
    whole = run_in(tmp_path, plan, max_steps=steps, gradient_accumulation_steps=parts)  # passes of 10 or 5 steps
    whole.train()
    for step in range(3, steps, 3):
        resumed = run_in(tmp_path, plan, max_steps=steps, gradient_accumulation_steps=parts, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(parameters(resumed.model), parameters(whole.model))
        assert resumed.engine.accountant.history == whole.engine.accountant.history
        logged = [[entry for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
        assert logged[0] == logged[1]


def test_no_noise_is_drawn_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ghostgrad.noise import KeyedGaussian

    drawn: list[tuple[bytes, int, int]] = []
    add_all = KeyedGaussian.add_all_

    def noted(self: Any, parts: Any, *, std: float, step: int) -> Any:
        drawn.extend((self._key.secret, step, place) for place, _ in parts)
        return add_all(self, parts, std=std, step=step)

    monkeypatch.setattr(KeyedGaussian, "add_all_", noted)
    plan = PrivacyPlan(target_delta=1e-3, noise_multiplier=1.0, seed=1)
    run_in(tmp_path, plan, max_steps=3).train()
    run_in(tmp_path, plan, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(drawn) == len(set(drawn)) > 0
    assert {step for _, step, _ in drawn} == set(range(1, 7))


def test_without_a_seed_a_resumed_run_has_a_key_of_its_own(tmp_path: Path) -> None:
    first = run_in(tmp_path, max_steps=3)
    first.train()
    resumed = run_in(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.engine.accountant.history == [(1.0, 0.1, 4)]
    assert resumed.state.global_step == resumed.engine.steps == 4
    samplers = [run.private.loader.batch_sampler for run in (first, resumed)]
    draws = [[sampler.draw(epoch=0, step=step) for step in range(10)] for sampler in samplers]
    assert draws[0] != draws[1]


def test_a_budget_covers_both_halves(tmp_path: Path) -> None:
    plan = PrivacyPlan(target_delta=1e-3, target_epsilon=2.0)
    run_in(tmp_path, plan, max_steps=6).train()
    resumed = run_in(tmp_path, plan, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(resumed.engine.accountant) == 6
    assert 1.5 < resumed.engine.get_epsilon(1e-3) <= 2.0


def test_going_back_to_a_checkpoint_does_not_forget_what_was_spent_after_it(tmp_path: Path) -> None:
    run = run_in(tmp_path, max_steps=6)
    run.train()
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(run.engine.accountant) == run.engine.steps == 9
    assert run.private.optimizer.noise_step == 9


def test_a_checkpoint_adds_to_what_another_training_has_spent(tmp_path: Path) -> None:
    run_in(tmp_path, max_steps=3).train()
    run = run_in(tmp_path, max_steps=4)
    run.engine.accountant.step(noise_multiplier=5.0, sample_rate=0.5, steps=7)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(run.engine.accountant) == 7 + 3 + 1


def test_a_checkpoint_adds_to_equal_steps_of_another_training(tmp_path: Path) -> None:
    run_in(tmp_path / "other", max_steps=3).train()
    run = run_in(tmp_path, max_steps=3)
    run.train()
    run.args.max_steps = 4
    run.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-3"))
    assert len(run.engine.accountant) == run.engine.steps == 3 + 3 + 1


def test_a_checkpoint_without_its_ledger_is_refused(tmp_path: Path) -> None:
    run_in(tmp_path, max_steps=3).train()
    file = tmp_path / "checkpoint-3" / "privacy.json"
    assert json.loads(file.read_text())["steps"] == 3
    file.unlink()
    with pytest.raises(PrivacyError, match="what its training has spent is not known"):
        run_in(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_of_other_noise_is_refused(tmp_path: Path) -> None:
    run_in(tmp_path, max_steps=3).train()
    resumed = run_in(tmp_path, PrivacyPlan(target_delta=1e-3, noise_multiplier=0.9), max_steps=4)
    with pytest.raises(CheckpointError, match=r"noise_multiplier \(1\.0"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_holds_no_key(tmp_path: Path) -> None:
    run = run_in(tmp_path, max_steps=3)
    run.train()
    secret = run.engine._key.secret
    for file in (tmp_path / "checkpoint-3").iterdir():
        content = file.read_bytes()
        assert secret not in content
        assert secret.hex().encode() not in content
