"""Noisy counts are of the logical batch, wherever its records are; and a report is the same on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import Monitor, PrivacyEngine
from ghostgrad.errors import PrivacyError


def train(*, watched: bool = True) -> tuple[list[list[float]], list[torch.Tensor], str]:
    """The noisy counts of each step, the last gradients, and the report."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 4, dtype=torch.float64), torch.arange(40) % 3)
    module, engine = nn.Linear(4, 3).double(), PrivacyEngine(seed=5)
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    monitor = Monitor(engine, private_share=0.3 if watched else None)
    counts: list[Any] = []
    for x, y in loader:
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        counts += [monitor.counts.tolist()] if watched else []
        gradients = [p.grad.clone() for p in module.parameters()]
        optimizer.zero_grad()
    return counts, gradients, engine.report(deltas=[1e-3]).to_json()


def test_counts_and_gradients_on_two_ranks_are_those_of_one_process() -> None:
    counts, gradients, report = train()
    for found_counts, found_gradients, found_report in on_ranks(2, lambda rank: train()):
        assert found_counts == counts
        torch.testing.assert_close(found_gradients, gradients, rtol=1e-10, atol=1e-12)
        assert found_report == report.replace('"ranks": 1', '"ranks": 2')


def test_a_monitor_on_one_rank_only_is_refused_on_all() -> None:
    def run(rank: int) -> str:
        with pytest.raises(PrivacyError, match="what a Monitor counts") as refusal:
            train(watched=rank == 0)
        return str(refusal.value)

    first, second = on_ranks(2, run)
    assert first == second
