"""Unmodified public architectures: a private step is the textbook step, in float32, in every mode.

The whole zoo is `python benchmarks/zoo.py`; here are those that differ in how they hold or use their parameters.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator

import pytest
import torch
from architectures import Architecture, Batch, all_architectures
from architectures.architecture import RECORDS, one_record
from architectures.single_record import (
    Reference,
    difference,
    difference_with_dropout,
    losses,
    norm,
    private_step,
    reference,
)
from torch import Tensor, nn

from ghostgrad import PrivacyEngine

pytestmark = pytest.mark.filterwarnings("ignore")  # what other people's packages warn about while models are built

NAMES = {
    "transformers": (
        "GPT-2", "GPT-Neo", "GPT-NeoX", "GPT-J", "OPT", "BLOOM", "MPT", "Falcon", "Llama", "Mistral", "Mixtral", "Qwen2",
        "Qwen3", "Gemma", "Gemma 2", "Phi", "Phi-3", "Mamba", "BERT", "BERT, masked language model", "RoBERTa", "DistilBERT",
        "ALBERT", "ELECTRA", "DeBERTa-v2", "T5", "BART", "ViT", "BEiT", "DINOv2", "CLIP vision", "Swin", "ConvNeXt",
        "SegFormer", "wav2vec 2.0", "Whisper",
    ),
    "timm": (
        "ResNet with GroupNorm (timm)", "ViT with LayerScale (timm)", "EVA-02 (timm)", "ConvNeXt V2 (timm)", "MLP-Mixer (timm)",
    ),
    "torchvision": ("ResNet", "ViT (torchvision)", "Swin (torchvision)", "MobileNetV2"),
    "torch": ("nn.LSTM classifier", "nn.Transformer"),
}  # fmt: skip
DROPOUT = {
    "transformers": (
        "gpt-oss", "DeBERTa-v2", "MPNet", "XLNet", "Funnel", "T5", "BART", "ViT", "BEiT", "BEiT, shared relative positions",
        "SigLIP vision", "Swin V2", "CvT", "ViLT", "WavLM", "GPT-2", "BERT", "Mixtral",
    ),
    "timm": ("ViT with registers, attention pooling (timm)", "CaiT (timm)", "XCiT (timm)"),
    "torchvision": ("Swin V2 (torchvision)",),
    "torch": ("nn.TransformerEncoder",),
}  # fmt: skip
CASES = [pytest.param(library, name, id=name) for library, names in NAMES.items() for name in names]

WITH_DROPOUT = [pytest.param(library, name, id=name) for library, names in DROPOUT.items() for name in names]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@functools.cache
def _known() -> dict[str, Architecture]:
    return {architecture.name: architecture for architecture in all_architectures()}


@functools.lru_cache(maxsize=1)
def _reference(name: str) -> Reference:
    return reference(_known()[name])


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize(("library", "name"), CASES)
def test_a_private_step_is_the_textbook_step(library: str, name: str, mode: str) -> None:
    _known()
    pytest.importorskip(library)
    torch.manual_seed(0)
    truth = _reference(name)
    assert difference(private_step(_known()[name], truth, mode), truth.gradients) is None


@pytest.mark.parametrize(("library", "name"), WITH_DROPOUT)
def test_with_dropout_a_step_is_that_of_plain_autograd_under_the_same_masks(library: str, name: str) -> None:
    pytest.importorskip(library)
    torch.manual_seed(0)
    assert difference_with_dropout(_known()[name], _reference(name)) is None


@pytest.mark.parametrize(
    ("library", "name"), [("transformers", "Swin V2"), ("timm", "Swin V2 (timm)"), ("transformers", "T5")]
)
@pytest.mark.parametrize("first", [1, 4, 7])
def test_batches_of_every_size_are_exact(library: str, name: str, first: int) -> None:
    """Windows, heads and tokens have these sizes too."""
    pytest.importorskip(library)
    torch.manual_seed(0)
    architecture, truth = _known()[name], _reference(name)
    model, optimizer = _private(copy.deepcopy(truth.model))
    for n in (first, *range(1, 13)):
        batch = {key: tensor.repeat(3, *[1] * (tensor.dim() - 1))[:n] for key, tensor in _by_name(truth.batch).items()}
        targets = truth.targets.repeat(3, *[1] * (truth.targets.dim() - 1))[:n]
        optimizer.zero_grad()
        losses(architecture.scores(_call(model, batch)), targets).mean().backward()
        optimizer.step()
        found = {name: p.grad for name, p in model.named_parameters()}
        assert difference(found, _textbook(architecture, truth, n)) is None, n  # type: ignore[arg-type]


def _private(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=None, noise_multiplier=0.0,
        max_grad_norm=1.0, sample_rate=0.01, expected_batch_size=1.0, loss_reduction="mean",
    )  # fmt: skip
    return model, optimizer


def _by_name(batch: Batch) -> dict[str, Tensor]:
    return batch if isinstance(batch, dict) else {str(i): tensor for i, tensor in enumerate(batch)}


def _call(model: nn.Module, batch: dict[str, Tensor]) -> object:
    return model(*batch.values()) if "0" in batch else model(**batch)


@functools.cache
def _each(name: str) -> tuple[dict[str, Tensor], ...]:
    """The clipped gradient of each record, alone."""
    architecture, truth = _known()[name], _reference(name)
    found = []
    for i in range(RECORDS):
        alone = copy.deepcopy(truth.model)
        record, target = one_record(truth.batch, i), truth.targets[i : i + 1]
        losses(architecture.scores(_call(alone, _by_name(record))), target).sum().backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in alone.named_parameters()}
        factor = min(1.0, 1.0 / norm(gradients))
        found.append({name: grad * factor for name, grad in gradients.items()})
    return tuple(found)


def _textbook(architecture: Architecture, truth: Reference, n: int) -> dict[str, Tensor]:
    each = [_each(architecture.name)[i % RECORDS] for i in range(n)]
    return {name: torch.stack([gradients[name] for gradients in each]).sum(0) for name in each[0]}


def test_the_comparison_notices_a_gradient_that_is_a_little_off() -> None:
    truth = _reference("nn.Transformer")
    found = {name: g.clone() for name, g in truth.gradients.items()}
    assert difference(found, truth.gradients) is None
    found["positions"] *= 1.05
    assert "positions" in (difference(found, truth.gradients) or "")


def test_the_comparison_notices_a_missing_gradient() -> None:
    truth = _reference("nn.Transformer").gradients
    found = {name: g for name, g in truth.items() if name != "positions"}
    assert "positions" in (difference(found, truth) or "")
