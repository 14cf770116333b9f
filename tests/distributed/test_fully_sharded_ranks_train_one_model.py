"""FSDP2 on two and three ranks: the batches, the noise and the parameters of one process, in every clipper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from trainings import trained, whole

Model = Callable[[], nn.Module]


def data(n: int = 40) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randint(11, (n, 5)), torch.randint(3, (n,)))


class Block(nn.Module):
    """A residual block that may be recomputed in the backward."""

    def __init__(self, width: int, reentrant: bool | None) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, 5), nn.Linear(5, width)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None or not torch.is_grad_enabled():
            return x + self.body(x)
        return x + checkpoint(self.body, x, use_reentrant=self.reentrant)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(F.gelu(self.inner(self.norm(x))))


class Network(nn.Module):
    """Embedding, two blocks, and a head that is used twice, or is the embedding's own weight."""

    def __init__(
        self, *, tied: bool = False, token: bool = False, reentrant: bool | None = None, around: bool | None = None
    ) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 7)) if token else None
        self.tokens = nn.Embedding(11, 7)
        self.blocks = nn.ModuleList(Block(7, reentrant) for _ in range(2))
        self.mix = nn.Linear(7, 7)
        self.head = nn.Linear(7, 11 if tied else 3, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight
        self.around = around

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x) if self.around is None else checkpoint(block, x, use_reentrant=self.around)
        x = self.mix(torch.tanh(self.mix(x)))
        return self.head(x.mean(1))[:, :3].clone()


def network(**options: Any) -> nn.Module:
    torch.manual_seed(2)
    module = Network(**options).double()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2.0)
    return module


def split(
    module: nn.Module,
    *,
    parts: bool = True,
    root: bool = True,
    grouped: bool = False,
    left_whole: bool = False,
    **options: Any,
) -> None:
    if left_whole:
        options["ignored_params"] = {module.mix.weight, module.tokens.weight}
    if grouped:
        fully_shard([*module.blocks], **options)
    elif parts:
        for block in module.blocks:
            fully_shard(block, **options)
    if parts:
        fully_shard(module.mix, **options)
    if root:
        fully_shard(module, **options)


def train(
    *,
    model: dict[str, Any] | None = None,
    sharding: dict[str, Any] | None = None,
    prepare: Callable[[nn.Module], None] = lambda module: None,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], int, float]:
    """Parameters, steps and epsilon after a short training with noise; split where there are ranks."""
    module = network(**(model or {}))
    prepare(module)
    if dist.is_initialized():
        split(module, **(sharding or {}))
    steps, epsilon = trained(module, data(), **options)
    return {name: whole(p) for name, p in module.state_dict().items()}, steps, epsilon


def freeze(module: nn.Module) -> None:
    module.tokens.requires_grad_(False)
    module.blocks[0].inner.bias.requires_grad_(False)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


CASES: dict[str, dict[str, Any]] = {
    "auto": {},
    **{mode: {"grad_sample_mode": mode} for mode in ("bk", "hooks", "functorch")},
    "momentum": {"optimizer": momentum, "epochs": 2},
    "weights kept after the forward": {"sharding": {"reshard_after_forward": False}},
    "weights let go after the forward": {"sharding": {"reshard_after_forward": True}},
    "the root alone": {"sharding": {"parts": False}},
    "some weights left whole": {
        "sharding": {"left_whole": True},
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, foreach=False),
    },
    "several parts in one unit": {"sharding": {"grouped": True}, "epochs": 2},
    "parts alone": {"sharding": {"root": False}},
    "tied": {"model": {"tied": True}},
    "tied, one pass": {"model": {"tied": True}, "grad_sample_mode": "bk"},
    "a token of the root's": {"model": {"token": True}},
    "a token of the root's, one pass, tiny batches": {
        "model": {"token": True},
        "grad_sample_mode": "bk",
        "batch_size": 2,
        "sharding": {"reshard_after_forward": True},
    },
    "a token of the root's, pieces": {
        "model": {"token": True},
        "physical": 2,
        "sharding": {"reshard_after_forward": False},
    },
    "frozen": {"prepare": freeze},
    "memory manager": {"physical": 2, "epochs": 2},
    "accumulation": {"accumulation_steps": 2},
    "both": {"accumulation_steps": 2, "physical": 1, "grad_sample_mode": "bk"},
    "tiny batches": {"batch_size": 2},
    "tiny batches, one pass": {"batch_size": 2, "grad_sample_mode": "bk"},
    "adaptive": {"clipping": "adaptive"},
    "per layer": {"clipping": "per_layer"},
    "sum": {"loss_reduction": "sum"},
    "recomputed inside": {"model": {"reentrant": False}},
    "recomputed inside, re-entrant": {"model": {"reentrant": True}, "grad_sample_mode": "bk"},
    "recomputed around": {"model": {"around": False}},
    "recomputed around, re-entrant": {"model": {"around": True}, "grad_sample_mode": "bk"},
}


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        *[(2, list(CASES)[part::3]) for part in range(3)],
        (3, ["auto", "bk", "tiny batches", "both", "a token of the root's, one pass, tiny batches"]),
    ],
)
def test_split_ranks_train_what_one_process_trains(size: int, cases: list[str]) -> None:
    def run(rank: int | None) -> dict[str, Any]:
        return {name: train(**CASES[name]) for name in cases}

    alone = run(None)
    for found in on_ranks(size, run):
        for name in cases:
            parameters, steps, epsilon = alone[name]
            assert found[name][1:] == (steps, epsilon), name
            assert found[name][0].keys() == parameters.keys()
            for key, value in parameters.items():
                torch.testing.assert_close(found[name][0][key], value, rtol=0, atol=1e-10, msg=f"{name}: {key}")
