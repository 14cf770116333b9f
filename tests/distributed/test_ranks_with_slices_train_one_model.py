"""Tensor parallel on two and three ranks: the norms of whole records, the noise and the parameters of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset
from trainings import trained, whole

from ghostgrad import ConfigurationError, GhostgradError, PrivacyEngine


class Network(nn.Module):
    """A whole embedding and norm, a feed-forward part, and a head whose three classes are cut unevenly by two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.inner, self.outer = nn.Linear(6, 12), nn.Linear(12, 6)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        x = x + self.outer(F.gelu(self.inner(self.norm(x))))
        return self.head(x.mean(1))


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(2)
    return Network().to(dtype)


def sliced(module: nn.Module, **plan: Any) -> nn.Module:
    plan = plan or {
        "inner": ColwiseParallel(),
        "outer": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(module, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def data() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randint(11, (40, 5)), torch.randint(3, (40,)))


def train(*, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[list[torch.Tensor], int, float]:
    module = network(dtype)
    if dist.is_initialized():
        sliced(module)
    steps, epsilon = trained(module, data(), **options)
    return [whole(p.detach()) for p in module.parameters()], steps, epsilon


CASES: dict[str, dict[str, Any]] = {
    **{mode: {"grad_sample_mode": mode} for mode in ("bk", "ghost", "hooks")},
    "momentum": {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)},
    "single precision": {"dtype": torch.float32},
    "memory manager": {"physical": 3, "accumulation_steps": 2},
    "tiny batches": {"batch_size": 2},
    "per layer": {"clipping": "per_layer"},
    "adaptive": {"clipping": "adaptive"},
}


@pytest.mark.parametrize(("size", "cases"), [(2, list(CASES)), (3, ["ghost", "momentum", "memory manager"])])
def test_ranks_with_slices_train_what_one_process_trains(size: int, cases: list[str]) -> None:
    def run(rank: int | None) -> dict[str, Any]:
        return {name: train(**CASES[name]) for name in cases}

    alone = run(None)
    for found in on_ranks(size, run):
        for name, (parameters, steps, epsilon) in alone.items():
            assert found[name][1:] == (steps, epsilon), name
            for p, expected in zip(found[name][0], parameters, strict=True):
                tolerance = 1e-6 if p.dtype == torch.float32 else 1e-10
                torch.testing.assert_close(p, expected, rtol=0, atol=tolerance, msg=name)


def noise(_: int | None) -> list[torch.Tensor]:
    module = sliced(network()) if dist.is_initialized() else network()
    module, optimizer, _ = PrivacyEngine(seed=7).make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.0), noise_multiplier=1.3, max_grad_norm=0.7,
        data_loader=DataLoader(data(), batch_size=4),
    )  # fmt: skip
    optimizer.step()
    return [whole(p.grad) for p in module.parameters()]


@pytest.mark.parametrize("size", [2, 3])
def test_noise_has_the_bits_of_one_process(size: int) -> None:
    alone = noise(None)
    for found in on_ranks(size, noise):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def refusal(module: nn.Module, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as raised:
        PrivacyEngine(seed=0).make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(data(), batch_size=4), **options,
        )  # fmt: skip
    return str(raised.value)


def two_dimensions() -> nn.Module:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    return parallelize_module(network(), mesh["tensor"], {"inner": ColwiseParallel()})


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (lambda: sliced(network(), norm=SequenceParallel()), {}, "norm.weight of a LayerNorm"),
        (lambda: sliced(network(), tokens=ColwiseParallel()), {}, "tokens.weight of a Embedding"),
        (lambda: sliced(network(), tokens=RowwiseParallel()), {}, "tokens.weight of a Embedding"),
        (lambda: sliced(network()), {"noise_generator": torch.Generator().manual_seed(0)}, "noise_generator"),
    ],
    ids=["sequence parallel", "embedding by columns", "embedding by rows", "generator"],
)
def test_other_slices_are_refused_on_every_rank(make: Any, options: dict[str, Any], reason: str) -> None:
    assert all(reason in message for message in on_ranks(2, lambda rank: refusal(make(), **options)))


def test_ranks_that_differ_are_refused() -> None:
    def run(rank: int) -> str:
        return refusal(sliced(network()), sample_rate=0.1 if rank else 0.2)

    assert all("sample_rate" in message or "number of records" in message for message in on_ranks(2, run))


def test_a_sliced_layer_without_a_rule_of_its_own_is_refused() -> None:
    def run(rank: int) -> str:
        module = sliced(network())
        module, _, loader = PrivacyEngine(seed=0).make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(data(), batch_size=8), grad_sample_mode="functorch",
        )  # fmt: skip
        x, y = next(iter(loader))
        with pytest.raises(GhostgradError) as raised:
            F.cross_entropy(module(x), y).backward()
        return str(raised.value)

    assert all("Leave this layer whole" in message for message in on_ranks(2, run))
