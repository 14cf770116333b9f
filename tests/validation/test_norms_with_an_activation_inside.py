"""A BatchNorm subclass that also runs an activation is fixed as a whole; one that computes something else is left alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ghostgrad import ModuleValidator


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Doubled(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_norm_and_activation_become_group_norm_and_activation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), NormAct(16, nn.SiLU()))
    with torch.no_grad():
        model[1].weight.uniform_(1, 2)
    fixed = ModuleValidator.fix(model)
    norm, drop, act = fixed[1]
    assert isinstance(norm, nn.GroupNorm)
    assert isinstance(drop, nn.Identity)
    assert isinstance(act, nn.SiLU)
    assert torch.equal(norm.weight, model[1].weight)
    assert ModuleValidator.is_valid(fixed)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fixed(x), nn.functional.silu(norm(fixed[0](x))))


def test_what_computes_something_else_is_left_alone_and_reported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), Doubled(16, nn.SiLU()))
    assert type(ModuleValidator.fix(model)[1]) is Doubled
    assert not ModuleValidator.is_valid(ModuleValidator.fix(model))
