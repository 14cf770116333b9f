"""Modules that own parameters and have no rule of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from layer_case import RECORDS, Case, frozen, randn
from torch import Tensor, nn


class Scale(nn.Module):
    """Own parameters of odd shapes; a buffer that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.shift = nn.Parameter(torch.randn(()))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 2.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.scale * self.mask.to(x.dtype)) + self.shift


class Unbatchable(nn.Module):
    """Looks at values: `vmap` cannot batch it, so it is run in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        rows = [row @ self.weight if row.sum().item() > 0 else torch.tanh(row @ self.weight) for row in x]
        return torch.stack(rows)


class ClassToken(nn.Module):
    """A composite module with parameters of its own around sub-modules with rules."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 4, 4))
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(torch.tanh(self.layer(x)).mean(1))


class TwoInputsTwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(4, 3, 2)
        self.mix = Mix()

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        left, right = self.mix(self.layer(a, b), scale=2.0)
        return {"left": left, "right": right}


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        return scale * torch.cos(x * self.angle), torch.tanh(x + self.angle)


class OneOutputUnused(TwoInputsTwoOutputs):
    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"left": super().forward(a, b)["right"]}


class OwnLinear(nn.Linear):
    """A subclass with another forward: the rule of its base would be wrong."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2) + self.weight.sum()


class NamedLinear(nn.Linear):
    """A subclass with the forward of its base keeps the rule."""


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cells = kind(4, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Counting(nn.Module):
    """Keeps count of its calls in a buffer; a recomputation must not show in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x * self.weight)


class Standardised(nn.Conv2d):
    """A weight-standardised convolution."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / (weight.std((1, 2, 3), keepdim=True) + 0.1), self.bias)


def parametrised(kind: Callable[..., nn.Module], layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A layer whose weight is computed from other parameters, between two layers of the usual kind."""
    return lambda: nn.Sequential(nn.Linear(4, 4), kind(layer()), nn.Tanh(), nn.Linear(3, 2))


class Symmetric(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


def symmetric() -> nn.Module:
    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(nn.Linear(4, 4), layer, nn.Tanh())


class Temperature(nn.Module):
    """Scores of a learnable temperature, and a shift and a gain that are expanded or joined."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.gain = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(1, 4))
        self.shift, self.query, self.first = (
            nn.Parameter(torch.ones(4)),
            nn.Parameter(torch.ones(2, 4)),
            nn.Linear(4, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.gain.expand(x.shape[1], 4) + self.shift
        queries = self.query.expand(len(x), -1, -1)
        scores = queries @ x.mT * self.temperature.exp()
        return torch.cat([queries, scores.softmax(-1) @ x], 1)


def two_inputs() -> tuple[Tensor, ...]:
    return torch.randn(RECORDS, 4, dtype=torch.float64), torch.randn(RECORDS, 3, dtype=torch.float64)


CASES = [
    Case("prelu", lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()), randn(4)),
    Case("prelu-per-channel", lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.PReLU(3)), randn(2, 3, 3)),
    Case("bilinear-two-outputs", TwoInputsTwoOutputs, two_inputs),
    Case("bilinear-one-output-unused", OneOutputUnused, two_inputs),
    Case("bilinear-weight-frozen", frozen(TwoInputsTwoOutputs, "weight"), two_inputs),
    Case("own-parameters", lambda: nn.Sequential(nn.Linear(4, 4), Scale()), randn(4)),
    Case("own-parameters-partly-frozen", frozen(Scale, "shift"), randn(4)),
    Case("loop", lambda: nn.Sequential(nn.Linear(4, 4), Unbatchable()), randn(4)),
    Case("class-token", ClassToken, randn(3, 4)),
    Case("subclass-with-its-own-forward", lambda: nn.Sequential(OwnLinear(4, 3), nn.Tanh()), randn(4)),
    Case("subclass-of-linear", lambda: nn.Sequential(NamedLinear(4, 3), nn.Tanh()), randn(4)),
    Case("standardised-convolution", lambda: Standardised(2, 3, 2), randn(2, 3, 3)),
    Case("weight-norm", parametrised(nn.utils.parametrizations.weight_norm, lambda: nn.Linear(4, 3)), randn(4)),
    Case("weight-norm-sequence", parametrised(nn.utils.parametrizations.weight_norm, lambda: nn.Linear(4, 3)), randn(3, 4)),
    Case("orthogonal", parametrised(nn.utils.parametrizations.orthogonal, lambda: nn.Linear(4, 3)), randn(4)),
    Case("weight-norm-convolution", lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), nn.Tanh()), randn(2, 5)),
    Case("parametrization-of-ones-own", symmetric, randn(4)),
    Case("temperature", Temperature, randn(3, 4)),
    Case("counting-buffer", lambda: nn.Sequential(Counting(), nn.Linear(4, 2)), randn(4)),
    Case("lstm", lambda: Recurrent(nn.LSTM), randn(3, 4)),
    Case("gru", lambda: Recurrent(nn.GRU), randn(3, 4)),
]  # fmt: skip
