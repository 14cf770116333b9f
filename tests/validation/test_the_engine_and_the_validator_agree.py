"""What the validator passes can be made private, what it refuses cannot, and what it fixed trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import ModuleValidator, PrivacyEngine
from ghostgrad.errors import GhostgradError, PrivacyError


def image_model(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))


def make_private(model: nn.Module):
    data = TensorDataset(torch.randn(32, 1, 8, 8), torch.randint(2, (32,)))
    engine = PrivacyEngine(seed=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


def train(model: nn.Module) -> None:
    model, optimizer, loader = make_private(model)
    for x, y in loader:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


REFUSED = {
    "batch norm": lambda: nn.BatchNorm2d(8),
    "frozen batch norm": lambda: nn.BatchNorm2d(8).requires_grad_(False),
    "batch norm without weights": lambda: nn.BatchNorm2d(8, affine=False),
    "eval mode without running statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False).eval(),
    "tracked instance norm": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "tracked instance norm without weights": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
}
ALLOWED = {
    "batch norm in eval mode": lambda: nn.BatchNorm2d(8).eval(),
    "frozen batch norm in eval mode": lambda: nn.BatchNorm2d(8).requires_grad_(False).eval(),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
}


@pytest.mark.parametrize("norm", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_cannot_be_made_private_until_it_is_fixed(norm):
    model = image_model(norm())
    assert not ModuleValidator.is_valid(model)
    assert not PrivacyEngine.is_compatible(model)
    with pytest.raises(GhostgradError, match="1"):
        make_private(model)
    train(ModuleValidator.fix(model))


@pytest.mark.parametrize("norm", ALLOWED.values(), ids=ALLOWED)
def test_what_is_allowed_trains(norm):
    model = image_model(norm())
    assert ModuleValidator.is_valid(model)
    assert PrivacyEngine.is_compatible(model)
    train(model)


def test_train_mode_that_comes_later_is_refused_by_name():
    model, _, loader = make_private(image_model(nn.BatchNorm2d(8).eval()))
    model.train()
    with pytest.raises(PrivacyError, match=r"^1: BatchNorm2d"):
        model(next(iter(loader))[0])


def test_running_statistics_that_are_frozen_do_not_move():
    model = image_model(nn.BatchNorm2d(8).eval())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    train(model)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
