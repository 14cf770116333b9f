"""Tiny models, data and trainers for the tests of `DPTrainer`, and the step that they are held to."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghostgrad.integrations.plan import PrivacyPlan
from ghostgrad.integrations.record_losses import record_losses
from ghostgrad.integrations.transformers import DPTrainer

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXTS = 40


def gpt2(dropout: float = 0.0) -> nn.Module:
    config = transformers.GPT2Config(
        **SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0
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


def assert_a_step_is_the_textbook_step(
    folder: Path,
    model: nn.Module,
    records: Any,
    *,
    shift: bool,
    parts: int = 1,
    tolerance: float = 1e-4,
    **changed: Any,
) -> None:
    """Take one step of the Trainer without noise and compare it with the loop over the single records that it saw."""
    before = copy.deepcopy(model)
    changed = {"per_device_train_batch_size": 8, "max_steps": 1, "gradient_accumulation_steps": parts, **changed}
    run = trainer(folder, model, records, **changed)
    seen: list[dict[str, Tensor]] = []
    original = run.training_step

    def spy(model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        seen.append({name: value.clone() for name, value in inputs.items()})
        return original(model, inputs)

    run.training_step = spy
    run.train()
    assert len(seen) == parts
    whole = {name: torch.cat([batch[name] for batch in seen]) for name in seen[0]}
    assert len(whole["labels"]) > 1
    expected = textbook_update(before, whole, 0.5, 8.0 * parts, shift=shift)
    start = dict(before.named_parameters())
    update = {name: (start[name] - p).detach() / 0.1 for name, p in model.named_parameters()}
    assert all(not bool(step.count_nonzero()) for name, step in update.items() if name not in expected)
    gap = sum(float((update[name] - g).square().sum()) for name, g in expected.items()) ** 0.5
    size = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    assert size > 0
    assert gap < tolerance * size
