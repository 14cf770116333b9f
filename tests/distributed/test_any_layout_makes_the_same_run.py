"""One seed, one run: one, two and three ranks, plain, wrapped or split, draw the same batches and noise and train the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from trainings import whole

from ghostgrad import PrivacyEngine
from ghostgrad.keys import RunKey

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
}
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-10}


def split(module: nn.Module, **options: Any) -> nn.Module:
    fully_shard(module[0], **options)
    return fully_shard(module, **options)


def by_columns(module: nn.Module) -> nn.Module:
    """Matrices along their second dimension, so that no rank's part of them is consecutive in the whole."""
    return split(module, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else None)


LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda module: module,
    "wrapped": DistributedDataParallel,
    "split": split,
    "split by columns": by_columns,
}


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)).to(dtype)


def run(layout: str, kind: str, dtype: torch.dtype) -> tuple[list[list[int]], list[torch.Tensor]]:
    """The records of each batch on this rank, and the parameters at the end."""
    torch.manual_seed(1)
    data = TensorDataset(torch.arange(48), torch.randn(48, 6, dtype=dtype), torch.randint(5, (48,)))
    module = LAYOUTS[layout](network(dtype))
    module, optimizer, loader = PrivacyEngine(seed=3).make_private(
        module=module, optimizer=OPTIMIZERS[kind](module.parameters()), data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=0.8, max_grad_norm=0.5,
    )  # fmt: skip
    drawn = []
    for which, x, y in loader:
        drawn.append(which.tolist())
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return drawn, [whole(p.detach()).clone() for p in module.parameters()]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_and_parameters_are_those_of_one_process(size: int) -> None:
    cases = [(layout, kind, dtype) for layout in LAYOUTS for kind in OPTIMIZERS for dtype in DTYPES]
    alone = {(kind, dtype): run("plain", kind, dtype) for kind in OPTIMIZERS for dtype in DTYPES}
    ranks = on_ranks(size, lambda rank: {case: run(*case) for case in cases})
    for case in cases:
        batches, parameters = alone[case[1:]]
        shares = [found[case][0] for found in ranks]
        assert {len(share) for share in shares} == {len(batches)}
        for step, batch in enumerate(batches):
            assert sorted(batch) == sorted(record for share in shares for record in share[step]), case
        for found in ranks:
            for p, expected in zip(found[case][1], parameters, strict=True):
                torch.testing.assert_close(p, expected, rtol=0, atol=DTYPES[case[2]], msg=str(case))


def noise(layout: str, dtype: torch.dtype, secure: bool) -> tuple[list[torch.Tensor], list[int]]:
    """The gradients of two steps without records, which are noise and nothing else, and how many values were drawn."""
    module = LAYOUTS[layout](network(dtype))
    engine = PrivacyEngine(secure_mode=secure)
    engine._key = RunKey.from_seed(7)  # which secure mode refuses from a user
    module, optimizer, _ = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.0), noise_multiplier=1.3, max_grad_norm=0.7,
        data_loader=DataLoader(TensorDataset(torch.zeros(20, 6)), batch_size=4),
    )  # fmt: skip
    drawn: list[int] = []
    original = optimizer.noise.add_all_

    def counting(parts: Any, **options: Any) -> None:
        drawn.append(sum(tensor.numel() for _, tensor in parts))
        original(parts, **options)

    optimizer.noise.add_all_ = counting
    found = []
    for _ in range(2):
        optimizer.step()
        found += [whole(p.grad).clone() for p in module.parameters()]
        optimizer.zero_grad()
    return found, drawn


@pytest.mark.parametrize(("size", "secure"), [(2, False), (3, False), (2, True)])
def test_noise_has_the_bits_of_one_process_and_no_rank_draws_what_it_does_not_hold(size: int, secure: bool) -> None:
    cases = [(layout, dtype) for layout in LAYOUTS for dtype in DTYPES]
    alone = {dtype: noise("plain", dtype, secure)[0] for dtype in DTYPES}
    ranks = on_ranks(size, lambda rank: {case: noise(*case, secure) for case in cases})
    total = sum(p.numel() for p in network(torch.float32).parameters())
    for layout, dtype in cases:
        for found, _ in (each[layout, dtype] for each in ranks):
            assert all(torch.equal(a, b) for a, b in zip(found, alone[dtype], strict=True)), layout
        drawn = [each[layout, dtype][1] for each in ranks]
        expected = total if "split" in layout else total * size
        assert [sum(step) for step in zip(*drawn, strict=True)] == [expected] * 2
