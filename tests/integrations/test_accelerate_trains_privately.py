"""`prepare` hands private objects to an Accelerator; the loop is accelerate's."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")

from ghostgrad import BatchMemoryManager, PrivacyEngine  # noqa: E402
from ghostgrad.errors import ConfigurationError  # noqa: E402
from ghostgrad.integrations.accelerate import prepare  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what accelerate warns about


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def private(noise_multiplier: float = 1.0, batch_size: int = 8, **options: Any) -> tuple[Any, ...]:
    data = TensorDataset(torch.randn(48, 6), torch.randint(2, (48,)))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    engine = PrivacyEngine(seed=0)
    made = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), max_grad_norm=0.3,
        data_loader=DataLoader(data, batch_size=batch_size), noise_multiplier=noise_multiplier, **options,
    )  # fmt: skip
    return (engine, *made)


def textbook_update(model: nn.Module, x: Tensor, y: Tensor, size: float) -> list[Tensor]:
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        norm = float(sum(g.square().sum() for g in grads) ** 0.5)
        total = [t + g * min(1.0, 0.3 / norm) for t, g in zip(total, grads, strict=True)]
    return [t / size for t in total]


def test_every_step_is_the_textbook_step_of_its_own_batch() -> None:
    _, model, optimizer, loader = private(noise_multiplier=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
    for x, y in loader:
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        scheduler.step()
        for old, new, step in zip(
            before.parameters(), model.parameters(), textbook_update(before, x, y, 8.0), strict=True
        ):
            assert torch.allclose((old - new) / 0.5, step, atol=1e-6)


def test_steps_are_accounted_and_empty_batches_survive() -> None:
    engine, model, optimizer, loader = private(batch_size=1)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = prepare(accelerator, model, optimizer, loader)
    sizes = []
    for x, y in loader:
        sizes.append(len(x))
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    assert 0 in sizes
    assert engine.steps == len(sizes) == 48
    assert engine.get_epsilon(1e-3) > 0


def test_a_memory_manager_and_bfloat16_work_under_it() -> None:
    engine, model, optimizer, loader = private()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as pieces:
        model, wrapped, pieces = prepare(accelerator, model, optimizer, pieces)
        for x, y in pieces:
            assert len(x) <= 3
            accelerator.backward(F.cross_entropy(model(x), y))
            wrapped.step()
            wrapped.zero_grad()
    assert engine.steps == 6


def test_logical_batches_of_several_parts_step_when_they_are_complete() -> None:
    engine, model, optimizer, loader = private(accumulation_steps=3)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = prepare(accelerator, model, optimizer, loader)
    for x, y in loader:
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    assert engine.steps == 2


def test_preparing_a_private_loader_leaves_it_as_it_is() -> None:
    engine, model, optimizer, loader = private(noise_multiplier=0.0)
    accelerator = accelerate.Accelerator(cpu=True)
    model, wrapped, same = accelerator.prepare(model, optimizer, loader)
    assert same is loader
    assert accelerator.prepare(same) is loader
    for x, y in same:
        before = copy.deepcopy(model)
        wrapped.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        wrapped.step()
        for old, new, step in zip(
            before.parameters(), model.parameters(), textbook_update(before, x, y, 8.0), strict=True
        ):
            assert torch.allclose((old - new) / 0.5, step, atol=1e-6)
    assert engine.steps == 6


def test_objects_that_were_prepared_can_be_prepared_again() -> None:
    engine, *objects = private()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = prepare(accelerator, *prepare(accelerator, *objects))
    for x, y in loader:
        accelerator.backward(F.cross_entropy(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert engine.steps == 6


def _on_two_ranks(rank: int, folder: str) -> None:
    engine, *objects = private()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"
    )
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for hand_over in (lambda: accelerator.prepare(objects[2]), lambda: prepare(accelerator, *objects)):
        with pytest.raises(ConfigurationError, match=r"2 processes|num_processes=2"):
            hand_over()
    _, *shared = private()  # made on the ranks it shares each draw by itself, which prepare would share out again
    with pytest.raises(ConfigurationError, match=r"2 processes|num_processes=2"):
        prepare(accelerator, *shared)
    assert engine.steps == 0
    (Path(folder) / f"refused on {rank}").touch()
    torch.distributed.destroy_process_group()


def test_two_ranks_are_refused_whenever_they_come(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_on_two_ranks, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert {path.name for path in tmp_path.glob("refused*")} == {"refused on 0", "refused on 1"}


def test_loss_scaling_is_refused() -> None:
    _, *objects = private()
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    with pytest.raises(ConfigurationError, match="bf16"):
        prepare(accelerator, *objects)


def test_accumulation_that_divides_the_loss_is_refused() -> None:
    _, *objects = private()
    with pytest.raises(ConfigurationError, match="gradient_accumulation_steps=2"):
        prepare(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2), *objects)
