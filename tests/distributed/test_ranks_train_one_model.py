"""One, two or three ranks: the same batches, the same noise, the same parameters, in every clipper."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from trainings import trained

from ghostgrad import PrivacyEngine

MODES = ["hooks", "ghost", "bk", "functorch"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wrapped": {"wrapped": True},
    "memory manager": {"physical": 2},
    "accumulation": {"accumulation_steps": 2},
    "both, wrapped": {"wrapped": True, "physical": 1, "accumulation_steps": 2},
    "adaptive": {"clipping": "adaptive"},
    "per layer": {"clipping": "per_layer"},
    "sum": {"loss_reduction": "sum"},
    "tiny batches": {"batch_size": 2},
}


def data(n: int = 40) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,)))


def model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def train(mode: str, *, wrapped: bool = False, **options: Any) -> tuple[dict[str, torch.Tensor], int, float]:
    """Parameters, steps and epsilon after a short training with noise."""
    module = inner = model()
    if wrapped and dist.is_initialized():
        module = DistributedDataParallel(inner)
    steps, epsilon = trained(module, data(), grad_sample_mode=mode, **options)
    return dict(inner.state_dict()), steps, epsilon


CASES = [
    *[("bk", name) for name in LAYOUTS],
    *[(mode, name) for mode in MODES for name in ("plain", "both, wrapped") if mode != "bk"],
]


@pytest.mark.parametrize(("size", "cases"), [(2, CASES), (3, [("bk", "tiny batches"), ("ghost", "both, wrapped")])])
def test_ranks_train_what_one_process_trains(size: int, cases: list[tuple[str, str]]) -> None:
    def run(rank: int | None) -> dict[tuple[str, str], Any]:
        return {(mode, name): train(mode, **LAYOUTS[name]) for mode, name in cases}

    alone = run(None)
    for found in on_ranks(size, run):
        for case, (parameters, steps, epsilon) in alone.items():
            assert found[case][1:] == (steps, epsilon), case
            for name, value in parameters.items():
                torch.testing.assert_close(found[case][0][name], value, rtol=0, atol=1e-10, msg=f"{case}: {name}")


def test_shares_of_a_draw_are_the_draw() -> None:
    def draws(rank: int | None) -> list[list[int]]:
        records = DataLoader(TensorDataset(torch.arange(50)), batch_size=5)
        module = nn.Linear(1, 1)
        _, _, loader = PrivacyEngine(seed=3).make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=records,
            noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip
        assert loader.sample_rate == 0.1
        return [batch[0].tolist() for _ in range(3) for batch in loader]

    whole, shares = draws(None), on_ranks(3, draws)
    assert len({len(share) for share in shares} | {len(whole)}) == 1
    assert any(not batch for share in shares for batch in share)
    for step, batch in enumerate(whole):
        assert sorted(batch) == sorted(record for share in shares for record in share[step])


def test_without_a_seed_ranks_have_one_key_that_no_other_run_has() -> None:
    def run(rank: int) -> list[torch.Tensor]:
        found = []
        for _ in range(2):
            module = model()
            module, optimizer, _ = PrivacyEngine().make_private(
                module=module, optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
                data_loader=DataLoader(data(), batch_size=8), noise_multiplier=1.0, max_grad_norm=1.0,
            )  # fmt: skip
            optimizer.step()
            found.append(module[0].weight.detach().clone())
        return found

    first, second = on_ranks(2, run)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])


def test_a_distributed_sampler_means_that_the_batch_size_counts_for_each_rank() -> None:
    def facts(rank: int) -> tuple[float, float, int]:
        records = data()
        module = model()
        _, optimizer, loader = PrivacyEngine(seed=0).make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(records, batch_size=4, sampler=DistributedSampler(records)),
        )  # fmt: skip
        return loader.sample_rate, optimizer.expected_batch_size, len(loader)

    assert on_ranks(2, facts) == [(8 / 40, 8.0, 5)] * 2


def test_a_rank_may_step_on_an_empty_share_without_running_the_model() -> None:
    """Also in the middle of accumulation: the number of draws is that of the rank that saw most."""

    def run(skip: bool) -> torch.Tensor:
        module = model()
        engine = PrivacyEngine(seed=11)
        module, optimizer, loader = engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.5), noise_multiplier=0.5, max_grad_norm=1.0,
            data_loader=DataLoader(data(), batch_size=2),
        )  # fmt: skip
        for x, y in loader:
            if len(x) or not skip:
                F.cross_entropy(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert engine.steps == len(loader)
        return module[0].weight.detach().clone()

    kept = on_ranks(2, lambda rank: run(skip=False))
    skipped = on_ranks(2, lambda rank: run(skip=True))
    for found in (*kept, *skipped):
        torch.testing.assert_close(found, kept[0], rtol=0, atol=1e-12)


def test_sums_are_exchanged_once_a_logical_step() -> None:
    def count(rank: int) -> tuple[int, int, int]:
        calls: list[int] = []
        original = dist.all_reduce

        def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            calls.append(tensor.numel())
            return original(tensor, *args, **options)

        dist.all_reduce = counting
        try:
            _, steps, _ = train("bk", wrapped=True, physical=1)
        finally:
            dist.all_reduce = original
        return len(calls), steps, max(calls)

    assert on_ranks(2, count) == [(5, 5, sum(p.numel() for p in model().parameters()))] * 2


def test_the_wrapper_comes_back_as_it_was() -> None:
    def run(rank: int) -> list[torch.Tensor]:
        wrapped = DistributedDataParallel(model())
        engine = PrivacyEngine(seed=0)
        original = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        module, optimizer, loader = engine.make_private(
            module=wrapped, optimizer=original, data_loader=DataLoader(data(), batch_size=8), noise_multiplier=1.0,
            max_grad_norm=1.0,
        )  # fmt: skip
        assert module is wrapped
        x, y = next(iter(loader))
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        engine.detach()
        x, y = data()[rank * 4 : rank * 4 + 4]  # plain again: every rank its own records, gradients averaged
        F.cross_entropy(wrapped(x), y).backward()
        original.step()
        return [p.grad.clone() for p in wrapped.parameters()]

    first, second = on_ranks(2, run)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_noise_of_the_common_sum_is_that_of_one_process() -> None:
    """Standard deviation sigma C once, not once for each rank; independent from step to step, the same on all ranks."""
    sigma, bound, rows = 0.8, 0.5, 2000

    def run(rank: int) -> torch.Tensor:
        module = nn.Linear(rows, 2)
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        module, optimizer, loader = PrivacyEngine(seed=13).make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.0), noise_multiplier=sigma,
            max_grad_norm=bound, data_loader=DataLoader(TensorDataset(torch.zeros(40, rows)), batch_size=8),
        )  # fmt: skip
        drawn = []
        for (x,) in loader:
            (module(x) * 0.0).mean().backward()
            optimizer.step()
            drawn.append(torch.cat([p.grad.flatten() for p in module.parameters()]).double() * 8 / (sigma * bound))
            optimizer.zero_grad()
        return torch.stack(drawn)

    first, second = on_ranks(2, run)
    assert torch.equal(first, second)
    tail = scipy.stats.chi2(first.numel())
    for scale, accepted in ((1.0, True), (0.95, False), (1.05, False), (2**0.5, False)):
        plausible = 5e-5 < float(tail.cdf(float((first * scale).square().sum()))) < 1 - 5e-5
        assert plausible == accepted
    between = torch.corrcoef(first) - torch.eye(len(first))
    assert between.abs().max() < 5 / first.shape[1] ** 0.5
