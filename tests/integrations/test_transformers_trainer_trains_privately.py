"""`DPTrainer` trains real transformers models: the Trainer's loop, with private steps."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from ghostgrad.errors import ConfigurationError, PrivacyError  # noqa: E402
from ghostgrad.integrations.plan import PrivacyPlan  # noqa: E402
from ghostgrad.integrations.record_losses import record_losses  # noqa: E402
from ghostgrad.integrations.transformers import DPTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns about

SMALL = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXTS = 40


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        **SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **SMALL, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def language() -> list[dict[str, Tensor]]:
    """Texts with paddings of different lengths, whose labels are not counted."""
    items = []
    for i in range(TEXTS):
        ids = torch.randint(3, 31, (8,))
        mask = torch.ones(8, dtype=torch.long)
        mask[8 - i % 4 :] = 0
        items.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return items


def sentences() -> list[dict[str, Any]]:
    items = []
    for i in range(TEXTS):
        ids = torch.randint(3, 31, (6,))
        ids[0] = 3 + i % 2
        items.append({"input_ids": ids, "attention_mask": torch.ones(6, dtype=torch.long), "labels": i % 2})
    return items


def arguments(folder: Path, **changed: Any) -> Any:
    options = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "learning_rate": 0.1, "use_cpu": True, "optim": "sgd", "disable_tqdm": True, "weight_decay": 0.0,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.5,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**options, **changed})


def trainer(folder: Path, model: nn.Module, data: Any, privacy: PrivacyPlan | None = None, **changed: Any) -> DPTrainer:
    plan = privacy or PrivacyPlan(target_delta=1e-3, noise_multiplier=0.0, seed=3)
    return DPTrainer(model, arguments(folder, **changed), privacy=plan, train_dataset=data)


def textbook_update(
    model: nn.Module, batch: dict[str, Tensor], bound: float, size: float, *, shift: bool
) -> dict[str, Tensor]:
    """Sum of the clipped gradients of single records, divided by the expected batch size."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for i in range(len(batch["labels"])):
        alone = copy.deepcopy(model)
        record = {name: value[i : i + 1] for name, value in batch.items()}
        labels = record.pop("labels")
        record_losses(alone(**record).logits, labels, shift=shift).sum().backward()
        grads = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
        norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
        for name, g in grads.items():
            total[name] += g * min(1.0, bound / norm)
    return {name: g / size for name, g in total.items()}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("build", "data", "shift"), [(gpt2, language, True), (bert, sentences, False)])
def test_a_step_is_the_textbook_step_of_the_whole_logical_batch(
    tmp_path: Path, build: Any, data: Any, shift: bool, parts: int
) -> None:
    model, records = build(), data()
    before = copy.deepcopy(model)
    run = trainer(tmp_path, model, records, max_steps=1, gradient_accumulation_steps=parts)
    seen: list[dict[str, Tensor]] = []
    original = run.training_step

    def spy(model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        seen.append({name: value.clone() for name, value in inputs.items()})
        return original(model, inputs)

    run.training_step = spy
    run.train()
    assert len(seen) == parts
    whole = {name: torch.cat([batch[name] for batch in seen]) for name in seen[0]}
    expected = textbook_update(before, whole, 0.5, 4.0 * parts, shift=shift)
    start = dict(before.named_parameters())
    update = {name: (start[name] - p).detach() / 0.1 for name, p in model.named_parameters()}
    gap = sum(float((update[name] - g).square().sum()) for name, g in expected.items()) ** 0.5
    size = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    assert gap < 1e-4 * size


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
    sizes = [len(step) for epoch in (0, 1) for step in _draws(run, epoch)]
    assert 0 in sizes[:25]


def _draws(run: DPTrainer, epoch: int) -> list[list[int]]:
    sampler: Any = run.private.loader.batch_sampler
    return [sampler.draw(epoch=epoch, step=step)[0] for step in range(len(sampler))]


def test_resuming_goes_on_with_what_was_spent(tmp_path: Path) -> None:
    plan = PrivacyPlan(target_delta=1e-3, noise_multiplier=1.0)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "linear"}
    first = trainer(tmp_path, gpt2(), language(), plan, **options)
    first.train()
    resumed = trainer(tmp_path, gpt2(), language(), plan, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.engine.accountant.history == first.engine.accountant.history
    assert resumed.state.global_step == 4
    assert resumed.private.optimizer.steps == 4


def test_going_back_to_a_checkpoint_does_not_forget_what_was_spent_after_it(tmp_path: Path) -> None:
    plan = PrivacyPlan(target_delta=1e-3, noise_multiplier=1.0)
    run = trainer(tmp_path, gpt2(), language(), plan, save_strategy="steps", save_steps=2, max_steps=4)
    run.train()
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(run.engine.accountant) == run.engine.steps == 6


def test_a_checkpoint_adds_to_what_another_training_has_spent(tmp_path: Path) -> None:
    plan = PrivacyPlan(target_delta=1e-3, noise_multiplier=1.0)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, gpt2(), language(), plan, **options).train()
    run = trainer(tmp_path, gpt2(), language(), plan, **{**options, "max_steps": 3})
    run.engine.accountant.step(noise_multiplier=5.0, sample_rate=0.5, steps=7)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(run.engine.accountant) == 7 + 2 + 1


def test_a_seeded_run_does_not_repeat_its_draws_when_resumed(tmp_path: Path) -> None:
    plan = PrivacyPlan(target_delta=1e-3, noise_multiplier=1.0, seed=1)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, gpt2(), language(), plan, **options).train()
    resumed = trainer(tmp_path, gpt2(), language(), plan, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.private.loader.feed.epoch == 1


def test_a_checkpoint_without_its_ledger_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, gpt2(), language(), **options).train()
    file = tmp_path / "checkpoint-2" / "privacy.json"
    assert json.loads(file.read_text())["steps"] == 2
    file.unlink()
    resumed = trainer(tmp_path, gpt2(), language(), **{**options, "max_steps": 3})
    with pytest.raises(PrivacyError, match="what its training has spent is not known"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


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


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"label_smoothing_factor": 0.1}, "label_smoothing_factor"), ({"max_grad_norm": 0.0}, "max_grad_norm"),
     ({"auto_find_batch_size": True}, "auto_find_batch_size")],
)  # fmt: skip
def test_settings_without_a_private_form_are_refused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        trainer(tmp_path, bert(), sentences(), **changed)


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
