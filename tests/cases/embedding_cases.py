"""Embedding tables and bags, with every option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from layer_case import RECORDS, Case, ids
from torch import Tensor, nn

ROWS = 5  # fewer than ids in a record: there are repeats


def then_linear(layer: nn.Module, features: int = 3) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(features, 2))


class Bag(nn.Module):
    """A bag, called with whatever it is given by keyword."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(ROWS, 3, **options)
        self.head = nn.Linear(3, 2)

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.bag(input=ids, per_sample_weights=weights)))


class RaggedBag(Bag):
    """Bags of different lengths, given as one row of ids and offsets; the second bag may be empty."""

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        lengths = ids.sum(1) % (ids.shape[1] + 1)
        used = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        offsets = lengths.cumsum(0) - lengths
        if self.bag.include_last_offset:
            offsets = torch.cat([offsets, lengths.sum().unsqueeze(0)])
        return self.head(torch.tanh(self.bag(ids[used], offsets, None if weights is None else weights[used])))


class TwoBagsARecord(Bag):
    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.bag(ids.flatten(0, 1)))).unflatten(0, ids.shape[:2])


class LearnedBagWeights(Bag):
    """The weights within the bag are computed by another layer."""

    def __init__(self) -> None:
        super().__init__(mode="sum")
        self.weigh = nn.Linear(4, 4)

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        assert weights is not None
        return super().forward(ids, self.weigh(weights))


def ids_and_weights() -> tuple[Tensor, ...]:
    return torch.randint(ROWS, (RECORDS, 4)), torch.randn(RECORDS, 4, dtype=torch.float64)


def embedding(**options: Any) -> Callable[[], nn.Module]:
    return lambda: then_linear(nn.Embedding(ROWS, 3, **options))


BAG_OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "sum-padding": {"mode": "sum", "padding_idx": 1},
    "mean-padding": {"mode": "mean", "padding_idx": -1},
    "max-padding": {"mode": "max", "padding_idx": 1},
    "sum-by-frequency": {"mode": "sum", "scale_grad_by_freq": True},
    "mean-by-frequency": {"mode": "mean", "scale_grad_by_freq": True},
    "sum-sparse": {"mode": "sum", "sparse": True},
}

CASES = [
    Case("embedding", embedding(), ids(ROWS, 4)),
    Case("embedding-one-id", embedding(), ids(ROWS)),
    Case("embedding-3d-ids", embedding(), ids(ROWS, 2, 3)),
    Case("embedding-int32", embedding(), lambda: (torch.randint(ROWS, (RECORDS, 4), dtype=torch.int32),)),
    Case("embedding-padding", embedding(padding_idx=2), ids(ROWS, 6)),
    Case("embedding-negative-padding", embedding(padding_idx=-1), ids(ROWS, 6)),
    Case("embedding-by-frequency", embedding(scale_grad_by_freq=True), ids(ROWS, 6)),
    Case("embedding-padding-by-frequency", embedding(scale_grad_by_freq=True, padding_idx=0), ids(ROWS, 6)),
    Case("embedding-sparse", embedding(sparse=True), ids(ROWS, 4)),
    Case("embedding-root", lambda: nn.Embedding(ROWS, 3), ids(ROWS, 4)),
    Case("embedding-as-wide-as-the-batch", lambda: nn.Embedding(RECORDS, RECORDS), ids(RECORDS, RECORDS)),
    *(Case(f"bag-{name}", lambda o=options: Bag(**o), ids(ROWS, 4)) for name, options in BAG_OPTIONS.items()),
    *(
        Case(f"bag-ragged-{name}", lambda o=options: RaggedBag(**o), ids(ROWS, 4), generic=False)
        for name, options in BAG_OPTIONS.items()
    ),
    Case("bag-weighted", lambda: Bag(mode="sum"), ids_and_weights),
    Case("bag-weighted-padding", lambda: Bag(mode="sum", padding_idx=0), ids_and_weights),
    Case("bag-learned-weights", LearnedBagWeights, ids_and_weights),
    Case("bag-ragged-weighted", lambda: RaggedBag(mode="sum"), ids_and_weights, generic=False),
    *(
        Case(f"bag-ragged-last-offset-{mode}", lambda m=mode: RaggedBag(mode=m, include_last_offset=True), ids(ROWS, 4),
             generic=False)
        for mode in ("sum", "mean", "max")
    ),
    Case("bag-two-a-record", lambda: TwoBagsARecord(mode="mean"), ids(ROWS, 2, 3)),
    Case("bag-two-a-record-max", lambda: TwoBagsARecord(mode="max"), ids(ROWS, 2, 3)),
]  # fmt: skip
