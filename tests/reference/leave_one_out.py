"""What one step releases through the public API, and how far it moves when one record leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgrad import PrivacyEngine

C = 0.01
MODES = ["hooks", "ghost", "bk", "functorch"]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def released_sum(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, mode: str, **options: object) -> Tensor:
    """The noise-free sum of one step over the batch, through the public API."""
    model = copy.deepcopy(model)
    engine = PrivacyEngine(seed=0)
    options = {"max_grad_norm": C, **options}
    model, optimizer, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=1.0, noise_multiplier=0.0, grad_sample_mode=mode, **options,
    )  # fmt: skip
    if len(x):
        loss(model, x, y).backward()
    optimizer.step()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def sensitivity(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, mode: str, **options: object) -> float:
    """The largest move of the sum over all records that could leave."""
    whole = released_sum(model, loss, x, y, mode, **options)
    moves = []
    for i in range(len(x)):
        rest = torch.arange(len(x)) != i
        moves.append((whole - released_sum(model, loss, x[rest], y[rest], mode, **options)).norm().item())
    return max(moves)


def classifier() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    return model, 3 * torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def made_private(model: nn.Module, **options: object) -> tuple:
    """A model with an optimizer, sampled by hand, without noise."""
    return PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=1.0, noise_multiplier=0.0, max_grad_norm=C, **options,
    )  # fmt: skip
