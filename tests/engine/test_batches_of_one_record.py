"""A memory manager may hand out single records: they are read once, not in every step, and vouch for no larger batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import MODES, TinyGPT, drawn, next_word, private, sentences
from torch import Tensor, nn

from ghostgrad import PrivacyError


class Counted(nn.Module):
    """Counts the runs of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.runs = TinyGPT(), 0

    def forward(self, ids: Tensor) -> Tensor:
        self.runs += 1
        return self.inner(ids)


def runs_of_a_step(model: Any, optimizer: Any, n: int, seed: int) -> int:
    before = model.runs
    next_word(model, sentences(n, seed=seed)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.runs - before


@pytest.mark.parametrize("mode", MODES)
def test_single_records_are_rehearsed_once(mode: str) -> None:
    model, optimizer = private(drawn(Counted), mode, 1.0, expected_batch_size=1.0)
    assert runs_of_a_step(model, optimizer, 1, seed=0) > 1
    assert [runs_of_a_step(model, optimizer, 1, seed) for seed in (1, 2, 3)] == [1, 1, 1]
    assert runs_of_a_step(model, optimizer, 3, seed=4) > 1, "several records have not been seen before"
    assert [runs_of_a_step(model, optimizer, n, seed=5 + n) for n in (2, 1, 5)] == [1, 1, 1]


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h - h.mean(0) * (len(h) > 1))


@pytest.mark.parametrize("mode", MODES)
def test_what_mixes_records_is_found_at_the_first_batch_of_several(mode: str) -> None:
    model, optimizer = private(Centred(), mode, 1.0)
    for _ in range(2):
        model(torch.randn(1, 4)).square().mean(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(PrivacyError, match="changes when another record"):
        model(torch.randn(3, 4))
