"""The short private training that tests of several ranks compare, and what is whole of a split one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, PrivacyEngine


def trained(
    module: nn.Module,
    data: TensorDataset,
    *,
    optimizer: Callable[..., Any] = lambda p: torch.optim.Adam(p, lr=0.05),
    physical: int | None = None,
    batch_size: int = 8,
    epochs: int = 1,
    **options: Any,
) -> tuple[int, float]:
    """Train with noise, in pieces of ``physical`` records if it is given; steps and epsilon. Options are of `make_private`."""
    engine = PrivacyEngine(seed=5)
    module, private, loader = engine.make_private(
        module=module, optimizer=optimizer([p for p in module.parameters() if p.requires_grad]), noise_multiplier=0.7,
        data_loader=DataLoader(data, batch_size=batch_size), max_grad_norm=0.3, **options,
    )  # fmt: skip
    for _ in range(epochs):
        with contextlib.ExitStack() as stack:
            pieces = loader
            if physical:
                manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=private)
                pieces = stack.enter_context(manager)
            for x, y in pieces:
                F.cross_entropy(module(x), y, reduction=options.get("loss_reduction", "mean")).backward()
                private.step()
                private.zero_grad()
    return engine.steps, engine.get_epsilon(1e-5)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that ranks may hold parts of."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
