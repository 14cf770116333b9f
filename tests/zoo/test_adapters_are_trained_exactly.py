"""Parameter-efficient fine-tuning: adapters of PEFT around frozen public models, each held to the loop over single records."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import Architecture
from architectures.architecture import RECORDS, Batch, declare_torchvision_operators
from architectures.single_record import (
    Reference,
    difference,
    difference_with_dropout,
    private_step,
    reference,
)
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore")  # what other people's packages warn about while models are built

declare_torchvision_operators()
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

_SIZES = {"vocab_size": 53, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        **_SIZES, n_embd=24, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **_SIZES, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)  # type: ignore[no-any-return]


def text() -> Batch:
    return {
        "input_ids": torch.randint(5, 53, (RECORDS, 7)),
        "attention_mask": torch.ones(RECORDS, 7, dtype=torch.long),
    }


ADAPTERS: dict[str, tuple[Any, Any]] = {
    "LoRA": (gpt2, lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0)),
    "LoRA, also its bias": (gpt2, lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, bias="lora_only")),
    "LoRA of a classifier": (bert, lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2)),
    "LoRA of an embedding": (gpt2, lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["wte", "c_attn"])),
    "rank-stabilised LoRA": (bert, lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, use_rslora=True)),
    "DoRA": (bert, lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True)),
    "DoRA of Conv1D": (gpt2, lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=True)),
    "IA3": (gpt2, lambda: peft.IA3Config(task_type="CAUSAL_LM")),
    "IA3 of a classifier": (bert, lambda: peft.IA3Config(task_type="SEQ_CLS")),
    "prefix": (gpt2, lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix, projected": (gpt2, lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8)),
    "prompt": (gpt2, lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prompt of a classifier": (bert, lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "P-tuning": (gpt2, lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)),
    "VeRA": (bert, lambda: peft.VeraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])),
}  # fmt: skip


@functools.cache
def architecture(name: str) -> Architecture:
    base, config = ADAPTERS[name]
    return Architecture(name, "peft", lambda: peft.get_peft_model(base(), config()), text, scores)


def scores(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


@functools.lru_cache(maxsize=1)
def truth(name: str) -> Reference:
    torch.manual_seed(0)
    return reference(architecture(name))


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_private_step_of_the_adapter_is_the_textbook_step(name: str, mode: str) -> None:
    found = private_step(architecture(name), truth(name), mode)
    assert difference(found, truth(name).gradients) is None


@pytest.mark.parametrize("name", ADAPTERS)
def test_with_dropout_it_is_the_step_under_the_masks_of_the_batch(name: str) -> None:
    assert difference_with_dropout(architecture(name), truth(name)) is None


@pytest.mark.parametrize("name", ADAPTERS)
def test_something_is_trained_and_something_is_frozen(name: str) -> None:
    model = architecture(name).make()
    assert {p.requires_grad for p in model.parameters()} == {True, False}
