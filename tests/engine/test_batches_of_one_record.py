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


class Remembers(nn.Module):
    """Keeps something of the records in a buffer: a moving average, or a count of what they are like."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("kept", torch.zeros(4, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.training:
            with torch.no_grad():
                self.kept.add_((h > 0).sum(0) if self.kept.dtype == torch.long else h.mean(0))
        return self.last(h - self.kept)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.long])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_remembers_records_is_refused(mode: str, dtype: torch.dtype, n: int) -> None:
    torch.manual_seed(0)
    model, _ = private(Remembers(dtype), mode, 1.0)
    with pytest.raises(PrivacyError):
        model(torch.randn(n, 4))
    assert not model.kept.any()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_remembers_on_itself_is_refused(mode: str, n: int) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(4, 2), torch.zeros(2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            found, self.last = h - self.last, h.detach().mean(0)
            return found

    model, _ = private(Last(), mode, 1.0)
    with pytest.raises(PrivacyError):
        model(torch.randn(n, 4))


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_counts_batches_is_trained_on_single_records(mode: str) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.batches += 1
            return self.inner(x)

    model, optimizer = private(Counts(), mode, 1.0)
    model(torch.randn(1, 4)).square().mean(1).mean().backward()
    optimizer.step()
    assert model.batches == 1
