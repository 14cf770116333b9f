"""The clippers trained on real digits for three epochs: one model, whichever clipper, however the batches are cut."""

from __future__ import annotations

import importlib
import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, PrivacyEngine

MODES = ["hooks", "ghost", "bk", "functorch"]


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    """800 digits to train on, 400 to test on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "examples")
        data = importlib.import_module("data")
        try:
            split = data.mnist_5k()
        except data.DataMissing as missing:
            pytest.skip(str(missing))
    x, y = split.train.tensors
    test_x, test_y = split.test.tensors
    pick, held = torch.arange(0, len(x), len(x) // 800)[:800], torch.arange(0, len(test_x), len(test_x) // 400)[:400]
    return TensorDataset(x[pick].view(-1, 1, 28, 28), y[pick]), test_x[held].view(-1, 1, 28, 28), test_y[held]


def network(dtype: torch.dtype) -> nn.Module:
    """With kinks in float64; in float32 without, since the last bit can put an activation on the other side of a kink."""
    kinks = dtype == torch.float64
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.GroupNorm(2, 8), nn.ReLU(inplace=True) if kinks else nn.Tanh(),
        nn.MaxPool2d(2) if kinks else nn.AvgPool2d(2), nn.Flatten(), nn.Linear(288, 10),
    ).to(dtype)  # fmt: skip


def train(
    dataset: TensorDataset, mode: str, noise: float, limit: int | None, accumulation_steps: int, dtype: torch.dtype
) -> nn.Module:
    torch.manual_seed(0)
    model = network(dtype)
    model, optimizer, loader = PrivacyEngine(seed=1).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), data_loader=DataLoader(dataset, batch_size=80),
        noise_multiplier=noise, max_grad_norm=1.0, grad_sample_mode=mode, accumulation_steps=accumulation_steps,
    )  # fmt: skip
    for _ in range(3):
        manager: Any = nullcontext(loader)
        if limit is not None:
            manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=limit, optimizer=optimizer)
        with manager as batches:
            for x, y in batches:
                optimizer.zero_grad()
                F.cross_entropy(model(x.to(dtype)), y).backward()
                optimizer.step()
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_clippers_and_physical_batches_train_one_model(
    digits: tuple[TensorDataset, Tensor, Tensor], noise: float, accumulation_steps: int, dtype: torch.dtype,
    tolerance: float,
) -> None:  # fmt: skip
    dataset, x, y = digits
    results = {}
    for mode, limit in itertools.product(MODES, (None, 33)):
        model = train(dataset, mode, noise, limit, accumulation_steps, dtype)
        with torch.no_grad():
            accuracy = (model.eval()(x.to(dtype)).argmax(1) == y).double().mean().item()
        results[mode, limit] = accuracy, torch.cat([p.detach().flatten() for p in model.parameters()])
    accuracy, reference = results["hooks", None]
    assert accuracy > (0.75 if noise == 0 else 0.3)
    for other, parameters in results.values():
        assert other == accuracy
        assert (parameters - reference).norm() <= tolerance * reference.norm()
