"""Weights used several times, in several places, and models of unusual layout."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from layer_case import RECORDS, Case, ids, randn
from torch import Tensor, nn

Pair = namedtuple("Pair", ["left", "right"])


class Repeated(nn.Module):
    """One layer, called several times."""

    def __init__(self, layer: nn.Module, times: int) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


class Recurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.keep, self.head = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        for step in range(x.shape[1]):
            state = torch.tanh(self.read(x[:, step]) + self.keep(state))
        return self.head(state)


class LanguageModel(nn.Module):
    """Table and head share their weight."""

    def __init__(self, head_bias: bool = False) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(6, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 6, bias=head_bias)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(tokens))))


class TwoHeads(LanguageModel):
    """The shared weight is used by three modules."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(3, 6)
        self.second.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.mix(self.table(tokens))
        return self.head(torch.tanh(hidden)) * self.second(torch.sin(hidden))


class TiedModules(nn.Module):
    """Two modules of one kind with one weight."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        second.weight = first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class SharedScale(nn.Module):
    """A norm's scale and a custom module share a weight: an elementwise and a generic use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.prelu = nn.LayerNorm(4), nn.PReLU(4)
        self.prelu.weight = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.norm(x))


class Branches(nn.Module):
    """Layers that this forward does not use, or whose output leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.ignored = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.ignored(x)
        return torch.tanh(self.used(x))


@dataclass
class Answer:
    main: Tensor
    extra: Tensor
    note: str = "kept"


class Outputs(nn.Module):
    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape, self.left, self.right = shape, nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        left, right = torch.tanh(self.left(x)), self.right(x)
        if self.shape == "dict":
            return {"left": left, "nested": [right, x.long()]}
        if self.shape == "dataclass":
            return Answer(left, right)
        return Pair(left, right) if self.shape == "namedtuple" else (left, (right, None))


class NestedInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, batch: dict[str, Any], *, scale: float) -> Tensor:
        a, b = batch["pair"]
        return torch.tanh(self.left(a)) * self.right(b) * scale


class TimeFirst(nn.Module):
    """Inputs and outputs are [t, n, ...]; the head of a time-first model."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(5, 4), nn.Linear(4, 7)
        self.norm, self.head = nn.LayerNorm(7), nn.Linear(7, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.layer(self.table(tokens)))))


class TimeFirstPooled(nn.Module):
    """Inside, after pooling over time, layers see [n, f]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.pooled, self.norm, self.one = (
            nn.Linear(4, 5),
            nn.Linear(5, 6),
            nn.LayerNorm(6),
            nn.Embedding(5, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.pooled(torch.tanh(self.layer(x)).sum(0)))
        return (hidden * self.one((x[0, :, 0] > 0).long())).unsqueeze(0)


class TimeFirstLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.prelu = nn.LSTM(4, 3), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.cells(x)[0])


def siamese(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return model(x), model(x.flip(1))


def siamese_distance(model: nn.Module, x: Tensor) -> Tensor:
    return model(x) * model(x.sin())


def nested(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    return model({"pair": (a, b), "name": "text"}, scale=0.5)


class KeywordsOnly(nn.Module):
    """Called by keyword only, and calls its parts so; with an argument that says nothing of the records."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table, self.norm = nn.Linear(4, 3), nn.Embedding(5, 3), nn.LayerNorm(3)

    def forward(self, *, x: Tensor, ids: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        return self.norm(input=torch.tanh(self.layer(input=x)) + scale * self.table(input=ids))


def by_keyword(model: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return model(ids=ids, scale=0.5, mask=None, x=x)


def two_heads_two_losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Two forwards and three outputs with a loss each, all in one backward."""
    (first, second), other = model(x), model(x.flip(1))
    return {"a": first, "b": second.exp(), "c": other[0] * 2}


def time_first(*shape: int) -> Any:
    return lambda: (torch.randn(shape[0], RECORDS, *shape[1:], dtype=torch.float64),)


CASES = [
    Case("linear-twice", lambda: Repeated(nn.Linear(4, 4), 2), randn(4)),
    Case("linear-three-times-sequence", lambda: Repeated(nn.Linear(4, 4), 3), randn(3, 4)),
    Case("linear-ten-times-materialised", lambda: Repeated(nn.Linear(2, 2), 10), randn(2)),
    Case("conv-twice", lambda: Repeated(nn.Conv2d(2, 2, 3, padding=1), 2), randn(2, 4, 4)),
    Case("transposed-conv-three-times", lambda: Repeated(nn.ConvTranspose1d(2, 2, 2, groups=2), 3), randn(2, 3)),
    Case("layernorm-twice", lambda: Repeated(nn.LayerNorm(4), 2), randn(4)),
    Case("groupnorm-twice", lambda: Repeated(nn.GroupNorm(2, 4), 2), randn(4, 3)),
    Case("generic-twice", lambda: Repeated(nn.PReLU(), 2), randn(4)),
    Case("recurrence", Recurrence, randn(4, 3)),
    Case("tied-table-and-head", LanguageModel, ids(6, 4)),
    Case("tied-table-and-head-one-token", LanguageModel, ids(6, 1)),
    Case("tied-table-and-two-heads", TwoHeads, ids(6, 3)),
    Case("tied-linears", lambda: TiedModules(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)), randn(4)),
    Case("tied-convs", lambda: TiedModules(nn.Conv1d(3, 3, 3), nn.Conv1d(3, 3, 3, dilation=2)), randn(3, 8)),
    Case("tied-conv-and-its-transpose", lambda: TiedModules(nn.Conv1d(3, 2, 3), nn.ConvTranspose1d(2, 3, 3)), randn(3, 6)),
    Case("tied-scale", SharedScale, randn(4)),
    Case("tied-scale-sequence", SharedScale, lambda: (torch.randn(RECORDS, 4, 4, dtype=torch.float64),)),
    Case("unused-layers", Branches, randn(4)),
    *(Case(f"outputs-{shape}", lambda shape=shape: Outputs(shape), randn(4)) for shape in
      ("tuple", "namedtuple", "dict", "dataclass")),
    Case("nested-inputs", NestedInputs, lambda: (*randn(4)(), *randn(2)()), run=nested),
    Case("siamese", lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), randn(4), run=siamese),
    Case("siamese-product", lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), randn(4), run=siamese_distance),
    Case("siamese-convs", lambda: nn.Sequential(nn.Conv1d(4, 3, 2), nn.PReLU()), randn(4, 3), run=siamese),
    Case("keywords-only", KeywordsOnly, lambda: (*randn(4)(), *ids(5)()), run=by_keyword),
    Case("several-outputs-and-losses", lambda: Outputs("namedtuple"), randn(4), run=two_heads_two_losses),
    Case("time-first", TimeFirst, lambda: (torch.randint(5, (4, RECORDS)),), dims=(1,), out_dim=1, batch_first=False),
    Case("time-first-pooled", TimeFirstPooled, time_first(3, 4), dims=(1,), out_dim=1, batch_first=False),
    Case("time-first-lstm", TimeFirstLSTM, time_first(3, 4), dims=(1,), out_dim=1, batch_first=False),
    Case("time-as-long-as-the-batch", TimeFirst, lambda: (torch.randint(5, (RECORDS, RECORDS)),), dims=(1,), out_dim=1,
         batch_first=False),
]  # fmt: skip
