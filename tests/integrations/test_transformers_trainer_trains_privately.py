"""`DPTrainer` trains real transformers models: the Trainer's loop, with private steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from tiny_trainers import (  # noqa: E402
    arguments,
    assert_a_step_is_the_textbook_step,
    bert,
    gpt2,
    language,
    sentences,
    trainer,
)

from ghostgrad.errors import ConfigurationError  # noqa: E402
from ghostgrad.integrations.plan import PrivacyPlan  # noqa: E402
from ghostgrad.integrations.record_losses import record_losses  # noqa: E402
from ghostgrad.integrations.transformers import DPTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns about


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("build", "data", "shift"), [(gpt2, language, True), (bert, sentences, False)])
def test_a_step_is_the_textbook_step_of_the_whole_logical_batch(
    tmp_path: Path, build: Any, data: Any, shift: bool, parts: int
) -> None:
    assert_a_step_is_the_textbook_step(tmp_path, build(), data(), shift=shift, parts=parts)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = gpt2()
    assert_a_step_is_the_textbook_step(tmp_path, model, language(), shift=True)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("kind", ["classification", "language"])
def test_a_step_on_low_rank_adapters_is_the_textbook_step(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    classifies = kind == "classification"
    task, base = ("SEQ_CLS", bert()) if classifies else ("CAUSAL_LM", gpt2())
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type=task, r=2, lora_dropout=0.0, init_lora_weights=False))
    records = sentences() if classifies else language()
    assert_a_step_is_the_textbook_step(tmp_path, adapted, records, shift=not classifies)


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_step_with_checkpointed_activations_is_the_textbook_step(tmp_path: Path, setting: str) -> None:
    assert_a_step_is_the_textbook_step(tmp_path, gpt2(), language(), shift=True, **{setting: True})


def test_a_step_in_bfloat16_is_the_textbook_step_as_far_as_its_digits_go(tmp_path: Path) -> None:
    assert_a_step_is_the_textbook_step(tmp_path, bert(), sentences(), shift=False, bf16=True, tolerance=0.03)


def test_the_schedule_of_the_trainer_sets_the_learning_rate_of_each_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert(), sentences(), max_steps=4, lr_scheduler_type="linear", warmup_steps=2)
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.05])


def test_callbacks_are_told_what_was_spent(tmp_path: Path) -> None:
    class Reader(transformers.TrainerCallback):
        told: list[dict[str, float]] = []  # noqa: RUF012 - one reader, one list

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
            self.told.append(logs)

    run = trainer(tmp_path, bert(), sentences(), PrivacyPlan(target_delta=1e-3, noise_multiplier=1.0))
    run.add_callback(Reader())
    run.train()
    assert [logs["privacy/steps"] for logs in Reader.told] == [1, 2, 3, 3]
    assert all(logs["privacy/epsilon"] > 0 and logs["privacy/delta"] == 1e-3 for logs in Reader.told)


def test_epsilon_and_steps_are_in_the_logs(tmp_path: Path) -> None:
    plan = PrivacyPlan(target_delta=1e-3, noise_multiplier=1.0)
    run = trainer(tmp_path, gpt2(), language(), plan)
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["privacy/steps"] for entry in logged] == [1, 2, 3]
    assert [entry["privacy/epsilon"] for entry in logged] == sorted(entry["privacy/epsilon"] for entry in logged)
    assert logged[-1]["privacy/epsilon"] == run.engine.get_epsilon(1e-3)
    assert "grad_norm" not in logged[-1]


def test_a_budget_is_planned_for_all_steps_of_the_trainer(tmp_path: Path) -> None:
    plan = PrivacyPlan(target_delta=1e-3, target_epsilon=2.0)
    run = trainer(tmp_path, bert(), sentences(), plan, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    run.train()
    assert run.engine.steps == run.state.global_step == 10
    assert 1.5 < run.engine.get_epsilon(1e-3) <= 2.0


def test_empty_batches_are_steps(tmp_path: Path) -> None:
    plan = PrivacyPlan(target_delta=1e-3, noise_multiplier=1.0, seed=0)
    run = trainer(tmp_path, bert(), sentences(), plan, per_device_train_batch_size=1, max_steps=25)
    run.train()
    assert run.engine.steps == 25
    sampler: Any = run.private.loader.batch_sampler
    assert any(not sampler.draw(epoch=0, step=step)[0] for step in range(25))
    with pytest.raises((ValueError, IndexError, KeyError, RuntimeError)):  # what it is kept from
        run.data_collator([])


def test_training_with_evaluation_and_a_schedule_learns(tmp_path: Path) -> None:
    plan = PrivacyPlan(target_delta=1e-3, noise_multiplier=0.3)
    records = sentences()
    run = DPTrainer(
        bert(),
        arguments(
            tmp_path, per_device_train_batch_size=10, max_steps=30, learning_rate=0.01, optim="adamw_torch",
            lr_scheduler_type="cosine", eval_strategy="steps", eval_steps=10,
        ),
        privacy=plan, train_dataset=records, eval_dataset=records,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    run.train()
    assert run.evaluate()["eval_accuracy"] > 0.8


def test_low_rank_adapters_train_and_the_rest_stays(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.0))
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    run = trainer(tmp_path, adapted, sentences(), PrivacyPlan(target_delta=1e-3, noise_multiplier=1.0))
    run.train()
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in adapted.named_parameters() if p.requires_grad}


def test_losses_of_the_user_are_used(tmp_path: Path) -> None:
    called = []

    def losses(outputs: Any, inputs: dict[str, Any]) -> Tensor:
        called.append(len(inputs["labels"]))
        return outputs.logits.square().mean(1)

    run = DPTrainer(
        bert(), arguments(tmp_path), privacy=PrivacyPlan(1e-3, noise_multiplier=1.0), train_dataset=sentences(),
        losses=losses,
    )  # fmt: skip
    run.train()
    assert len(called) == 3


def test_a_second_call_of_train_goes_on_spending(tmp_path: Path) -> None:
    run = trainer(tmp_path, bert(), sentences(), PrivacyPlan(1e-3, noise_multiplier=1.0))
    run.train()
    run.train()
    assert run.engine.steps == 6


def test_a_plan_needs_noise_or_a_target() -> None:
    with pytest.raises(ConfigurationError, match="exactly one"):
        PrivacyPlan(target_delta=1e-5)


def test_record_losses_do_not_depend_on_other_records() -> None:
    scores, labels = torch.randn(4, 5, 7), torch.randint(7, (4, 5))
    labels[1, 2:] = -100
    labels[2] = -100
    together = record_losses(scores, labels, shift=True)
    alone = [record_losses(scores[i : i + 1], labels[i : i + 1], shift=True) for i in range(4)]
    assert torch.allclose(together, torch.cat(alone))
    assert together[2] == 0
    assert record_losses(scores[:0], labels[:0], shift=True).shape == (0,)


def test_record_losses_know_regression_and_several_labels() -> None:
    scores = torch.randn(3, 4)
    assert record_losses(scores, torch.ones(3, 4)).shape == (3,)
    assert torch.allclose(
        record_losses(torch.tensor([[2.0], [0.0]]), torch.tensor([1.0, 3.0])), torch.tensor([1.0, 9.0])
    )


def test_record_losses_of_learned_prompts_leave_the_prompt_out() -> None:
    scores, labels = torch.randn(2, 7, 5), torch.randint(5, (2, 4))
    every = torch.nn.functional.cross_entropy(scores[:, 2:-1].reshape(-1, 5), labels.reshape(-1), reduction="none")
    assert torch.allclose(record_losses(scores, labels, shift=True), every.view(2, 4).mean(1))
