"""FSDP2: ranks that do not train the same, ways of splitting that are not supported, and ranks that fail or die."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import ConfigurationError, GhostgradError, PrivacyEngine

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def network(width: int = 4, *, parts: bool = True, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
    if parts:
        fully_shard(module[0], **options)
    return fully_shard(module, **options)


def private(module: nn.Module, *, seed: int = 0, records: int = 20, lr: float = 0.1, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(records, 3), torch.randint(2, (records,)))
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    return PrivacyEngine(seed=seed).make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=lr),
        data_loader=DataLoader(data, batch_size=4), **options,
    )  # fmt: skip


def said(module: nn.Module, **options: Any) -> str:
    """What `make_private` says; it leaves the module as it was."""
    hooks = len(module._forward_hooks)
    with pytest.raises(ConfigurationError) as raised:
        private(module, **options)
    assert len(module._forward_hooks) == hooks
    return str(raised.value)


@pytest.mark.parametrize(
    ("model", "options", "named"),
    [
        ({}, {"seed": 1}, "seed"),
        ({}, {"records": 24}, "number of records"),
        ({}, {"lr": 0.2}, "an option or a parameter of the optimizer"),
        ({}, {"noise_multiplier": 2.0}, "noise_multiplier"),
        ({}, {"grad_sample_mode": "bk"}, "grad_sample_mode"),
        ({"width": 5}, {}, "the parameter or buffer 0.weight"),
        ({"parts": False}, {}, "what fully_shard was called on"),
        ({"mp_policy": BF16}, {}, "an option of fully_shard"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_every_rank_raises_and_names_what_differs(model: dict[str, Any], options: dict[str, Any], named: str) -> None:
    for message in on_ranks(2, lambda rank: said(network(**(model if rank else {})), **(options if rank else {}))):
        assert named in message
        assert "ranks 0 and 1" in message


def hybrid() -> nn.Module:
    return network(mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def tensor_parallel_inside() -> nn.Module:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    parallelize_module(module, mesh["tensor"], {"0": ColwiseParallel()})
    return fully_shard(module, mesh=mesh["data"])


def first_form() -> nn.Module:
    return FullyShardedDataParallel(nn.Linear(3, 2), use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (hybrid, {}, "mesh of shape"),
        (lambda: network(mesh=DeviceMesh("cpu", [1, 0])), {}, "in their order"),
        (tensor_parallel_inside, {}, "mesh of shape"),
        (first_form, {}, "FullyShardedDataParallel"),
        (lambda: network(offload_policy=CPUOffloadPolicy(pin_memory=False)), {}, "CPUOffloadPolicy"),
        (network, {"noise_generator": torch.Generator().manual_seed(0)}, "noise_generator"),
    ],
    ids=["hybrid", "other order", "tensor parallel inside", "first form", "offloaded", "generator"],
)
def test_what_cannot_be_split_is_refused_with_the_way_out(make: Any, options: dict[str, Any], reason: str) -> None:
    def run(rank: int) -> str:
        module = make()
        assert options or not PrivacyEngine.is_compatible(module)
        return said(module, **options)

    assert all(reason in message for message in on_ranks(2, run))


class Centred(nn.Module):
    """Subtracts the mean of the batch on one rank."""

    def __init__(self, centre: bool) -> None:
        super().__init__()
        self.inner, self.centre = nn.Linear(3, 2), centre

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return x - x.mean(0) if self.centre else x


def step(module: nn.Module, **options: Any) -> str:
    module, optimizer, loader = private(module, **options)
    for x, y in loader:
        try:
            F.cross_entropy(module(x), y).backward()
        except GhostgradError as error:
            return str(error)
        optimizer.step()
        optimizer.zero_grad()
    return "nothing"


def test_what_the_first_batch_shows_on_one_rank_stops_all() -> None:
    other, one = on_ranks(2, lambda rank: step(fully_shard(Centred(rank == 1))))
    assert "the output for a record changes" in one
    assert "rank 1 could not go on" in other
    assert "the output for a record changes" in other


class Folded(nn.Module):
    """A part of it, which weights are gathered for, sees the records' positions out of order, and only the whole can answer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)
        fully_shard(self.inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.stack([x, 2 * x]).flatten(0, 1)  # [2 * n, 3], not ordered by record
        return self.outer(self.inner(rows).view(2, len(x), 3).sum(0))


def test_a_module_that_answers_for_weights_that_are_gathered_inside_it_is_refused() -> None:
    for message in on_ranks(2, lambda rank: step(fully_shard(Folded()))):
        assert "inner.weight" in message
        assert "alone and not inside it" in message


@pytest.mark.parametrize("mode", ["ghost", "bk"])
def test_a_weight_used_outside_its_module_is_refused(mode: str) -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(self.inner(x)) * self.penalty()

        def penalty(self) -> torch.Tensor:
            return 1.0 + (self.outer.weight.square().sum() if self.reuse else 0.0)

    def run(rank: int) -> str:
        module = fully_shard(Reused(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        module.reuse = False
        module, _, loader = private(module, grad_sample_mode=mode)
        batches = iter(loader)
        x, y = next(batches)
        F.cross_entropy(module(x), y).backward()
        module.reuse = True  # after the first batch has been rehearsed
        x, y = next(batches)
        with pytest.raises(GhostgradError) as raised:
            F.cross_entropy(module(x), y).backward()
        return str(raised.value)

    for message in on_ranks(2, run):
        assert "outer.weight" in message


@pytest.mark.parametrize(("leave", "timeout"), [(lambda: os._exit(0), 30.0), (lambda: time.sleep(5.0), 2.0)])
def test_when_a_rank_dies_or_stops_the_others_raise_within_the_time_out(leave: Any, timeout: float) -> None:
    def run(rank: int) -> tuple[float, int]:
        module, optimizer, loader = private(network())
        for number, (x, y) in enumerate(loader):
            began = time.monotonic()
            if rank and number == 2:
                leave()
                return 0.0, number
            try:
                F.cross_entropy(module(x), y).backward()
                optimizer.step()
            except RuntimeError:
                return time.monotonic() - began, number
            optimizer.zero_grad()
        return -1.0, -1

    waited, number = on_ranks(2, run, timeout=timeout)[0]
    assert number == 2
    assert 0 <= waited < timeout + 2


def test_engine_check_says_to_check_before_splitting() -> None:
    def run(rank: int) -> str:
        with pytest.raises(ConfigurationError) as raised:
            PrivacyEngine().check(torch.randn(4, 3), lambda module, x: module(x).sum(1).mean(), module=network())
        return str(raised.value)

    assert all("fully_shard" in message for message in on_ranks(2, run))
