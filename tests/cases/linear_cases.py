"""Linear layers: every number of input dimensions, parts frozen, keyword calls, odd shapes."""

from __future__ import annotations

import torch
from layer_case import Case, frozen, randn
from torch import Tensor, nn


class AllRanks(nn.Module):
    """One layer that sees 3-d, then 4-d, then 2-d input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        x = self.layer(x.unflatten(1, (2, 3)).tanh())
        return self.layer(x.tanh().sum((1, 2)))


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


class Folded(nn.Module):
    """Time steps folded behind the record: rows [n * t, f]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x.flatten(0, 1))).unflatten(0, (len(x), -1)).sum(1)


class Transposed(nn.Module):
    """The layer mixes positions: its input is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2))


def tanh_after(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh())


CASES = [
    Case("linear-2d", lambda: nn.Linear(4, 3), randn(4)),
    Case("linear-2d-no-bias", lambda: tanh_after(nn.Linear(4, 3, bias=False)), randn(4)),
    Case("linear-3d-gram", lambda: tanh_after(nn.Linear(9, 8)), randn(3, 9)),
    Case("linear-3d-materialised", lambda: tanh_after(nn.Linear(2, 3)), randn(6, 2)),
    Case("linear-3d-no-bias", lambda: tanh_after(nn.Linear(4, 3, bias=False)), randn(5, 4)),
    Case("linear-4d", lambda: tanh_after(nn.Linear(4, 3)), randn(2, 3, 4)),
    Case("linear-5d-no-bias", lambda: tanh_after(nn.Linear(2, 3, bias=False)), randn(2, 1, 3, 2)),
    Case("linear-one-feature", lambda: nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 2)), randn(1)),
    Case("linear-as-wide-as-the-batch", lambda: nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7)), randn(7)),
    Case("linear-positions-as-many-as-records", lambda: tanh_after(nn.Linear(7, 7)), randn(7, 7)),
    Case("linear-bias-frozen", frozen(lambda: tanh_after(nn.Linear(4, 3)), "bias"), randn(4)),
    Case("linear-weight-frozen", frozen(lambda: tanh_after(nn.Linear(4, 3)), "weight"), randn(5, 4)),
    Case("linear-4d-after-3d-after-2d", AllRanks, randn(6, 4)),
    Case("linear-by-keyword", ByKeyword, randn(4)),
    Case("linear-folded-rows", Folded, randn(3, 4)),
    Case("linear-not-contiguous", Transposed, randn(5, 4)),
    Case("linear-deep", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 2)), randn(4)),
    Case(
        "linear-in-place-relu",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2), nn.ReLU(inplace=True)),
        randn(4),
    ),
]  # fmt: skip
