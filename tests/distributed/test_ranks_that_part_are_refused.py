"""Ranks that take different steps are noticed in the step itself, on every rank, before anything is released."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import PrivacyEngine, PrivacyError
from ghostgrad.distributed import local


def skip_a_batch(optimizer: Any, module: nn.Module, step: int) -> bool:
    return step == 1


def another_bound(optimizer: Any, module: nn.Module, step: int) -> bool:
    optimizer.max_grad_norm = 100.0
    return False


def another_noise(optimizer: Any, module: nn.Module, step: int) -> bool:
    optimizer.noise_multiplier = 0.1
    return False


def another_learning_rate(optimizer: Any, module: nn.Module, step: int) -> bool:
    optimizer.param_groups[0]["lr"] = 1.0
    return False


def freeze_a_layer(optimizer: Any, module: nn.Module, step: int) -> bool:
    module[0].requires_grad_(False)
    return False


def accumulate(optimizer: Any, module: nn.Module, step: int) -> bool:
    return False


def run(rank: int, difference: Any, *, split: bool = False) -> tuple[str, int]:
    """What the first step that is refused says on this rank, and how many steps were made."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if split:
        fully_shard(module)
    data = TensorDataset(torch.randn(60, 4), torch.randint(3, (60,)))
    engine = PrivacyEngine(seed=0)
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=DataLoader(data, batch_size=20),
    )  # fmt: skip
    for step, (x, y) in enumerate(loader):
        if rank and difference(optimizer, module, step):
            continue
        F.cross_entropy(module(x), y).backward()
        if rank and difference is accumulate and step == 0:
            continue
        before = [p.detach().clone() for p in module.parameters()]
        try:
            optimizer.step()
        except PrivacyError as error:
            assert all(torch.equal(local(p), local(old)) for p, old in zip(module.parameters(), before, strict=True))
            assert len(engine.accountant) == engine.steps
            return str(error), engine.steps
        optimizer.zero_grad()
    return "nothing", engine.steps


@pytest.mark.parametrize(
    ("difference", "named", "steps"),
    [
        (skip_a_batch, "the draws since the last step", 1),
        (another_bound, "max_grad_norm", 0),
        (another_noise, "noise_multiplier", 0),
        (another_learning_rate, "an option of a param_group", 0),
        (freeze_a_layer, "which parameters are trainable", 0),
        (accumulate, "the draws since the last step", 0),
    ],
)
def test_every_rank_raises_before_it_steps(difference: Any, named: str, steps: int) -> None:
    for said, made in on_ranks(2, lambda rank: run(rank, difference)):
        assert named in said
        assert made == steps


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        (another_bound, "max_grad_norm"),
        (another_noise, "noise_multiplier"),
        (another_learning_rate, "an option of a param_group"),
    ],
)
def test_split_ranks_raise_before_they_step(difference: Any, named: str) -> None:
    """Those that go through the model together; where one stays away the others raise at the time-out."""
    for said, made in on_ranks(2, lambda rank: run(rank, difference, split=True)):
        assert named in said
        assert made == 0


@pytest.mark.parametrize(("leave", "timeout"), [(lambda: os._exit(0), 30.0), (lambda: time.sleep(5.0), 2.0)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_when_a_rank_dies_or_stops_the_others_raise_within_the_time_out(
    wrapped: bool, leave: Callable[[], None], timeout: float
) -> None:
    def lonely(rank: int) -> tuple[float, int, int]:
        torch.manual_seed(0)
        module: nn.Module = nn.Linear(3, 2)
        engine = PrivacyEngine()
        module, optimizer, loader = engine.make_private(
            module=DistributedDataParallel(module) if wrapped else module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(TensorDataset(torch.randn(24, 3), torch.arange(24) % 2), batch_size=6),
        )  # fmt: skip
        for x, y in loader:
            if rank and engine.steps == 2:
                leave()
                return 0.0, 0, 0
            before, began = [p.clone() for p in module.parameters()], time.monotonic()
            F.cross_entropy(module(x), y, reduction="sum").div(max(1, len(x))).backward()
            try:
                optimizer.step()
            except RuntimeError:
                assert all(map(torch.equal, before, module.parameters()))
                return time.monotonic() - began, engine.steps, len(engine.accountant)
            optimizer.zero_grad()
        return -1.0, -1, -1

    waited, steps, counted = on_ranks(2, lonely, timeout=timeout)[0]
    assert 0 <= waited < timeout + 2
    assert steps == 2 <= counted
