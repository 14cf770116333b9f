"""A model that is split over ranks is saved by torch's own means; each rank's `engine.state_dict` goes with it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset
from trainings import whole

from ghostgrad import ConfigurationError, PrivacyEngine


def split(module: nn.Module) -> None:
    fully_shard(module[0])
    fully_shard(module)


def sliced(module: nn.Module) -> None:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(module, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def private(lay_out: Callable[[nn.Module], None] = split, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 3), torch.arange(24) % 2)
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    lay_out(module)
    engine = PrivacyEngine()
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.Adam(module.parameters()), data_loader=DataLoader(data, batch_size=6),
        noise_multiplier=1.0, max_grad_norm=1.0, **options,
    )  # fmt: skip
    return {"engine": engine, "module": module, "optimizer": optimizer, "loader": loader}


def train(run: dict[str, Any], batches: Any, count: int) -> None:
    for _, (x, y) in zip(range(count), batches, strict=False):
        nn.functional.cross_entropy(run["module"](x), y).backward()
        run["optimizer"].step()
        run["optimizer"].zero_grad()


def parameters(run: dict[str, Any]) -> list[torch.Tensor]:
    return [whole(p.detach()).clone() for p in run["module"].parameters()]


@pytest.mark.parametrize("lay_out", [split, sliced])
@pytest.mark.parametrize(("parts", "before", "after"), [(1, 2, 2), (2, 1, 3)], ids=["between", "accumulated"])
def test_they_go_on_bit_for_bit(
    parts: int, before: int, after: int, lay_out: Callable[[nn.Module], None], tmp_path: Any
) -> None:
    """After a step, and in the middle of a logical batch: of its sum so far each rank has its own part."""

    def both(rank: int) -> Any:
        run = private(lay_out, accumulation_steps=parts)
        batches = iter(run["loader"])
        train(run, batches, before)
        file = io.BytesIO()
        torch.save(run["engine"].state_dict(), file)
        file.seek(0)
        module, optimizer = copy.deepcopy(run["module"].state_dict()), copy.deepcopy(run["optimizer"].state_dict())
        with pytest.raises(ConfigurationError, match=r"torch\.distributed\.checkpoint"):
            run["engine"].save_checkpoint(tmp_path / "whole", module=run["module"], optimizer=run["optimizer"])
        train(run, batches, after)
        again = private(lay_out, accumulation_steps=parts)
        again["module"].load_state_dict(module)
        again["optimizer"].load_state_dict(optimizer)
        again["engine"].load_state_dict(torch.load(file, weights_only=True))
        train(again, iter(again["loader"]), after)
        return parameters(run), parameters(again), run["engine"].steps, again["engine"].steps

    for first, second, steps, counted in on_ranks(2, both):
        assert all(map(torch.equal, first, second))
        assert steps == counted == 4 // parts
    assert not (tmp_path / "whole").exists()


@pytest.mark.filterwarnings("ignore")  # torch's own, on which of its collectives it has deprecated
def test_torch_distributed_checkpoint_carries_module_and_optimizer(tmp_path: Any) -> None:
    """It makes the optimizer's state by a step of zeros at rate 0, which is not released."""

    def both(rank: int) -> Any:
        run = private()
        batches = iter(run["loader"])
        train(run, batches, 2)
        module, optimizer = get_state_dict(run["module"], run["optimizer"])
        save({"module": module, "optimizer": optimizer}, checkpoint_id=tmp_path)
        state = run["engine"].state_dict()
        train(run, batches, 2)
        again = private()
        module, optimizer = get_state_dict(again["module"], again["optimizer"])
        made = again["engine"].steps, len(again["engine"].accountant), again["optimizer"].noise_step
        parts = {"module": module, "optimizer": optimizer}
        load(parts, checkpoint_id=tmp_path)
        set_state_dict(
            again["module"], again["optimizer"], model_state_dict=parts["module"], optim_state_dict=parts["optimizer"]
        )
        again["engine"].load_state_dict(state)
        train(again, iter(again["loader"]), 2)
        return parameters(run), parameters(again), made, again["engine"].steps

    for first, second, made, steps in on_ranks(2, both):
        assert made == (0, 0, 0)
        assert all(map(torch.equal, first, second))
        assert steps == 4
