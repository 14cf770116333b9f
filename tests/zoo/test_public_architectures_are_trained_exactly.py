"""Unmodified public architectures: a private step is the textbook step, in float32, in every mode.

The whole zoo is `python benchmarks/zoo.py`; here are those that differ in how they hold or use their parameters.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import pytest
import torch
from architectures import Architecture, all_architectures
from architectures.single_record import Reference, difference, private_step, reference

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
CASES = [pytest.param(library, name, id=name) for library, names in NAMES.items() for name in names]


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
