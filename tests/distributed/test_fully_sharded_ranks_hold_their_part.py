"""FSDP2: sums leave a rank unit by unit, in single precision or wider, and everything is given back at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import PrivacyEngine
from ghostgrad.clipping import Clipper

RECORDS, BOUND = 24, 0.05
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
ALL_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)


def data(n: int = RECORDS) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(n, 6), torch.randint(5, (n,)))


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 5))


def split(**options: Any) -> nn.Module:
    module = network()
    for part in (module[0], module[2]):
        fully_shard(part, **options)
    return fully_shard(module, **options)


def private(module: nn.Module, *, rate: float = 1.0, **options: Any) -> tuple[Any, ...]:
    options = {"noise_multiplier": 0.0, "max_grad_norm": BOUND, **options}
    return PrivacyEngine(seed=0).make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), sample_rate=rate,
        data_loader=DataLoader(data(), batch_size=4), **options,
    )  # fmt: skip


def clipped_one_by_one() -> list[torch.Tensor]:
    """Weights and inputs rounded to bfloat16, one record at a time; norms and sum in double precision."""
    module = network()
    rounded = {name: p.detach().bfloat16().requires_grad_() for name, p in module.named_parameters()}
    sums = [torch.zeros(p.shape, dtype=torch.float64) for p in module.parameters()]
    for x, y in data():
        loss = F.cross_entropy(functional_call(module, rounded, x.bfloat16()[None]).float(), y[None])
        grads = [grad.double() for grad in torch.autograd.grad(loss, list(rounded.values()))]
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        for total, grad in zip(sums, grads, strict=True):
            total += grad * min(1.0, BOUND / float(norm))
    return sums


@pytest.mark.parametrize("policy", [BF16, ALL_BF16], ids=["float32 reduced", "bfloat16 reduced"])
def test_with_a_mixed_precision_policy_sums_are_single_precision(policy: MixedPrecisionPolicy) -> None:
    def run(rank: int) -> dict[str, list[torch.Tensor]]:
        found = {}
        for mode in ("ghost", "bk"):
            module, optimizer, loader = private(split(mp_policy=policy), grad_sample_mode=mode)
            x, y = next(iter(loader))
            F.cross_entropy(module(x).float(), y).backward()
            optimizer.step()
            found[mode] = [p.grad.full_tensor() * RECORDS for p in module.parameters()]
        return found

    expected = clipped_one_by_one()
    size = torch.cat([total.flatten() for total in expected]).norm()
    for found in on_ranks(2, run):
        for grads in found.values():
            gap = torch.cat([(grad - total).flatten() for grad, total in zip(grads, expected, strict=True)]).norm()
            assert gap < 0.02 * size
            assert all(grad.dtype == torch.float32 for grad in grads)
            flat = torch.cat([grad.flatten() for grad in grads])
            assert float((flat != flat.bfloat16().float()).float().mean()) > 0.9  # no sum went through bfloat16


def test_a_single_record_is_within_the_bound_in_mixed_precision() -> None:
    def run(rank: int) -> list[tuple[int, float]]:
        module, optimizer, loader = private(split(mp_policy=ALL_BF16), rate=1 / RECORDS, max_grad_norm=1e-3)
        found = []
        for x, y in loader:
            F.cross_entropy(module(x).float(), y).backward()
            optimizer.step()
            drawn = torch.tensor(len(x))
            dist.all_reduce(drawn)
            flat = torch.cat([p.grad.full_tensor().double().flatten() for p in module.parameters()])
            found.append((int(drawn), float(flat.norm())))
            optimizer.zero_grad()
        return found

    first, second = on_ranks(2, run)
    assert first == second
    assert all(norm == 0 for drawn, norm in first if not drawn)
    alone = [norm for drawn, norm in first if drawn == 1]
    assert len(alone) > 3
    assert all(0.98e-3 < norm <= 1e-3 for norm in alone)


@pytest.mark.parametrize("mode", ["ghost", "bk"])
def test_no_rank_sums_more_than_a_unit_at_a_time(mode: str) -> None:
    """Nor keeps more: what is scattered is one unit, and what is kept of it is this rank's part."""

    def run(rank: int) -> tuple[list[int], list[int], int, int]:
        module, optimizer, loader = private(split(), grad_sample_mode=mode)
        whole: list[int] = []
        add = Clipper._add

        def noting(clipper: Clipper, *args: Any) -> None:
            add(clipper, *args)
            whole.append(sum(part.numel() for part in clipper._sums.values()))

        Clipper._add = noting
        scattered: list[int] = []
        original = dist.reduce_scatter_single

        def counting(output: torch.Tensor, input: torch.Tensor, *args: Any, **options: Any) -> Any:
            scattered.append(input.numel())
            return original(output, input, *args, **options)

        dist.reduce_scatter_single = counting
        try:
            x, y = next(iter(loader))
            F.cross_entropy(module(x), y).backward()
        finally:
            dist.reduce_scatter_single, Clipper._add = original, add
        held = sum(part.numel() for part in optimizer.total._sums.values())
        return scattered, whole, held, sum(p.to_local().numel() for p in module.parameters())

    for scattered, whole, held, mine in on_ranks(2, run):
        # The largest unit, and with two passes the unit around it: the gradient has not gone through the root yet.
        assert max(whole) == (6 * 7 + 7) + (3 * 5 + 5 if mode == "ghost" else 0)
        # Rows are filled up to a multiple of the ranks: 8 x 6 + 8, 4 x 7 + 4 and 6 x 3 + 6 values.
        assert sorted(scattered) == [24, 32, 56]
        assert held == mine


def test_after_detach_the_model_trains_as_split_models_do() -> None:
    def run(rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        module = split()
        engine = PrivacyEngine(seed=0)
        original = torch.optim.SGD(module.parameters(), lr=0.1)
        module, optimizer, loader = engine.make_private(
            module=module, optimizer=original, data_loader=DataLoader(data(), batch_size=4), noise_multiplier=1.0,
            max_grad_norm=1.0,
        )  # fmt: skip
        assert "ghost" in str(engine.explain())
        assert "FSDPLinear" in str(engine.explain())
        x, y = next(iter(loader))
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        engine.detach()
        before = [p.full_tensor().detach().clone() for p in module.parameters()]
        x, y = data()[rank * 4 : rank * 4 + 4]
        F.cross_entropy(module(x), y).backward()
        return before, [p.grad.full_tensor() for p in module.parameters()]

    for before, grads in on_ranks(2, run):
        module = network()
        with torch.no_grad():
            for p, value in zip(module.parameters(), before, strict=True):
                p.copy_(value)
        x, y = data()[:8]
        F.cross_entropy(module(x), y).backward()
        for p, grad in zip(module.parameters(), grads, strict=True):
            torch.testing.assert_close(grad, p.grad)


def test_weights_of_a_backward_that_failed_are_not_used_in_the_next_step() -> None:
    """It failed between the two passes, in which the root's weights stay gathered; the step then moves the parameters."""

    def fail(grad: torch.Tensor) -> None:
        raise RuntimeError("a hook of the user's")

    def run(rank: int | None) -> list[torch.Tensor]:
        module = network() if rank is None else split(reshard_after_forward=False)
        module, optimizer, loader = private(module.double(), noise_multiplier=1.0, grad_sample_mode="ghost", rate=0.25)
        for step, (x, y) in enumerate(loader):
            x = x.double().requires_grad_()
            if step == 1:
                x.register_hook(fail)
                with pytest.raises(RuntimeError, match="a hook of the user's"):
                    F.cross_entropy(module(x), y).backward()
            else:
                F.cross_entropy(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.full_tensor() if rank is not None else p for p in module.parameters()]

    alone = [p.detach() for p in run(None)]
    for found in on_ranks(2, run):
        for p, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-10)
