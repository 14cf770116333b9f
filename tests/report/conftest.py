"""Small private trainings to report on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import PrivacyEngine

Train = Callable[..., PrivacyEngine]


@pytest.fixture
def train() -> Train:
    """Trains for some steps and returns the engine; options go to the engine (``seed``, ...) and to ``make_private``."""

    def run(
        *,
        steps: int = 3,
        engine: PrivacyEngine | None = None,
        data: Any = None,
        module: nn.Module | None = None,
        **options: Any,
    ) -> PrivacyEngine:
        torch.manual_seed(0)
        module = module or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        data = data or TensorDataset(torch.randn(40, 4), torch.randint(3, (40,)))
        engine = engine or PrivacyEngine()
        own = {"data_loader": DataLoader(data, batch_size=8), "noise_multiplier": 1.0, "max_grad_norm": 1.0}
        if options.get("poisson_sampling", True):
            own["sample_rate"] = 1.0  # every record in every batch, for which the accountants answer at once
        module, optimizer, loader = engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), **{**own, **options}
        )
        source = loader if loader is not None else DataLoader(data, batch_size=8)
        batches = (batch for _ in range(steps) for batch in source)
        for _ in range(steps):
            x, y = next(batches)
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return engine

    return run
