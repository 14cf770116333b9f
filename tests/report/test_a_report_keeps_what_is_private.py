"""A default report of the same training on other records is the same, byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, PrivacyEngine

Train = Callable[..., PrivacyEngine]


class Pooled(nn.Module):
    """Sequences of any length, padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = x.abs().sum(2, keepdim=True) > 0
        return self.outer((torch.tanh(self.inner(x)) * mask).sum(1) / mask.sum(1).clamp(min=1))


def padded(records: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return nn.utils.rnn.pad_sequence([x for x, _ in records], batch_first=True), torch.tensor([y for _, y in records])


def trained_on_sequences(longest: int, mode: str) -> tuple[Any, PrivacyEngine]:
    """One record of the dataset is ``longest`` long, the others 2."""
    generator = torch.Generator().manual_seed(0)
    records = [(torch.randn(longest if i == 5 else 2, 64, generator=generator), i % 2) for i in range(12)]
    torch.manual_seed(1)
    module, engine = Pooled(), PrivacyEngine(seed=4)
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), grad_sample_mode=mode,
        data_loader=DataLoader(records, batch_size=4, collate_fn=padded), noise_multiplier=1.0, max_grad_norm=1.0,
        sample_rate=1.0,
    )  # fmt: skip
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=12, optimizer=optimizer) as pieces:
        for _ in range(2):
            for x, y in pieces:
                F.cross_entropy(module(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
    return engine.explain(), engine


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk", "functorch"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("changed", [1e6, float("nan")])
def test_another_record_leaves_the_report_as_it_is(train: Train, mode: str, clipping: str, changed: float) -> None:
    texts = []
    for value in (0.0, changed):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(40, 4, generator=generator)
        x[7] = value
        data = TensorDataset(x, torch.arange(40) % 3)
        engine = train(steps=5, engine=PrivacyEngine(seed=1), data=data, grad_sample_mode=mode, clipping=clipping)
        texts.append(engine.report().to_json())
    assert texts[0] == texts[1]


def test_one_record_more_leaves_the_report_as_it_is() -> None:
    """Rate and batch size are public and stay; sizes of batches, pieces and empty draws are others."""
    texts, pieces = [], []
    for n in (40, 41):
        torch.manual_seed(0)
        data, module, engine = (
            TensorDataset(torch.randn(n, 4), torch.arange(n) % 3),
            nn.Linear(4, 3),
            PrivacyEngine(seed=3),
        )
        module, optimizer, loader = engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=2.0, max_grad_norm=1.0,
            data_loader=DataLoader(data, batch_size=2), sample_rate=0.05, expected_batch_size=2.0,
        )  # fmt: skip
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=1, optimizer=optimizer) as parts:
            for _ in range(3):
                for x, y in parts:
                    F.cross_entropy(module(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        texts.append(engine.report().to_json())
        pieces.append(loader.feed.delivered)
    assert pieces[0] != pieces[1]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("mode", ["ghost", "bk"])
def test_a_longer_record_takes_another_route_but_leaves_the_report(mode: str) -> None:
    (short, one), (long, other) = trained_on_sequences(2, mode), trained_on_sequences(60, mode)
    assert str(short) != str(long), "the routes tell the lengths, which is why they are left out"
    assert one.report().to_json() == other.report().to_json()
    assert one.report(not_private=True).to_json() != other.report(not_private=True).to_json()


def test_what_is_private_stands_under_a_warning_where_it_was_asked_for(train: Train) -> None:
    x = torch.randn(40, 4)
    x[3] = torch.inf
    engine = train(data=TensorDataset(x, torch.arange(40) % 3), sample_rate=1.0, steps=1)
    assert engine.not_finite == 1
    default, asked = engine.report(), engine.report(not_private=True)
    assert default.data["not_private"] is None
    assert "outer product" not in default.to_json()
    assert asked.data["not_private"]["not_finite_records"] == 1
    assert "outer product" in asked.to_json()
    for text in (asked.to_markdown(), asked.to_html()):
        assert text.index("Not private: do not publish") < text.index("do not publish a report that holds them")
    private = {"holds", "findings", "not_private"}
    assert {k: v for k, v in asked.data.items() if k not in private} == {
        k: v for k, v in default.data.items() if k not in private
    }


def test_a_report_releases_nothing_and_changes_nothing(train: Train) -> None:
    engine = train(engine=PrivacyEngine(seed=2))
    before, state = engine.accountant.state_dict(), torch.get_rng_state()
    first = engine.report().to_json()
    assert engine.report().to_json() == first
    assert engine.accountant.state_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
