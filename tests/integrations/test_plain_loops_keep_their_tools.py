"""A plain torch loop keeps its tools: schedulers, hooks on the optimizer, averages of the weights, clipping, closures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, PrivacyEngine
from ghostgrad.errors import ConfigurationError, PrivacyError

RECORDS, BOUND, RATE = 32, 0.3, 0.5
Step = Callable[[nn.Module, Any, Tensor, Tensor], None]


def private(
    optimizer_type: Any = torch.optim.SGD, rate: float = RATE, noise_multiplier: float = 0.0, **options: Any
) -> tuple[Any, ...]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(RECORDS, 6), torch.randint(2, (RECORDS,)))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    engine = PrivacyEngine(seed=0)
    made = engine.make_private(
        module=model, optimizer=optimizer_type(model.parameters(), lr=rate), max_grad_norm=BOUND,
        data_loader=DataLoader(data, batch_size=8), noise_multiplier=noise_multiplier, **options,
    )  # fmt: skip
    return (engine, *made)


def plain_step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def textbook_update(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    model = copy.deepcopy(model)  # a copy is a plain model
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        norm = float(sum(g.square().sum() for g in grads) ** 0.5)
        total = [t + g * min(1.0, BOUND / norm) for t, g in zip(total, grads, strict=True)]
    return [t / 8 for t in total]


def assert_steps_are_the_textbook_ones(model: nn.Module, optimizer: Any, loader: Any, step: Step = plain_step) -> None:
    for x, y in loader:
        before, rate = copy.deepcopy(model), optimizer.param_groups[0]["lr"]
        step(model, optimizer, x, y)
        for old, new, update in zip(
            before.parameters(), model.parameters(), textbook_update(before, x, y), strict=True
        ):
            torch.testing.assert_close((old - new).detach(), update * rate, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "rates"),
    [
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1), [0.5, 0.5, 0.05, 0.05, 0.005]),
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)), [0.5, 0.25, 0.5 / 3, 0.125, 0.1]),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=5, cycle_momentum=False), None),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4), None),
        (lambda o: SWALR(o, swa_lr=0.1, anneal_epochs=2, anneal_strategy="linear"), None),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_schedulers_set_the_rate_of_each_step(build: Any, rates: list[float] | None) -> None:
    _, model, optimizer, loader = private()
    scheduler = build(optimizer)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    same = build(plain)
    seen = []

    def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        seen.append(optimizer.param_groups[0]["lr"])
        assert seen[-1] == pytest.approx(plain.param_groups[0]["lr"])
        plain_step(model, optimizer, x, y)
        plain.step()
        scheduler.step()
        same.step()

    assert_steps_are_the_textbook_ones(model, optimizer, loader, step)
    seen.append(optimizer.param_groups[0]["lr"])
    assert rates is None or seen == pytest.approx(rates)


def test_a_scheduler_that_watches_a_metric() -> None:
    _, model, optimizer, loader = private()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    assert_steps_are_the_textbook_ones(model, optimizer, loader)
    for metric in (1.0, 2.0):
        scheduler.step(metric)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("pieces", [None, 3])
def test_hooks_run_once_around_each_logical_step(pieces: int | None) -> None:
    engine, model, optimizer, loader = private(noise_multiplier=1.0)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda o, args, options: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, args, options: seen.append("after" if o is optimizer else "other"))
    if pieces is None:
        for x, y in loader:
            plain_step(model, optimizer, x, y)
    else:
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=pieces, optimizer=optimizer) as parts:
            for x, y in parts:
                plain_step(model, optimizer, x, y)
    assert engine.steps == 4
    assert seen == ["before", "after"] * 4


def test_a_hook_after_the_step_sees_the_gradient_that_was_released() -> None:
    _, model, optimizer, loader = private()
    released: list[Tensor] = []
    optimizer.register_step_post_hook(lambda o, args, options: released.append(model[0].weight.grad.clone()))
    x, y = next(batch for batch in loader if len(batch[0]))
    expected = textbook_update(model, x, y)[0]
    plain_step(model, optimizer, x, y)
    torch.testing.assert_close(released[0], expected, atol=1e-6, rtol=1e-4)


def test_a_hook_that_writes_gradients_is_refused() -> None:
    engine, model, optimizer, loader = private(noise_multiplier=1.0)

    def meddle(optimizer: Any, args: Any, options: Any) -> None:
        model[0].weight.grad = torch.ones_like(model[0].weight)

    optimizer.register_step_pre_hook(meddle)
    before = model[0].weight.clone()
    x, y = next(batch for batch in loader if len(batch[0]))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match="clipper did not produce"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert engine.steps == len(engine.accountant) == 0


def test_clipping_the_sum_before_the_step_changes_nothing() -> None:
    """There is no gradient yet: the sum without noise is not shown, and records were clipped one by one."""
    _, model, optimizer, loader = private()

    def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        F.cross_entropy(model(x), y).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1e-4) == 0
        optimizer.step()
        optimizer.zero_grad()

    assert_steps_are_the_textbook_ones(model, optimizer, loader, step)


@pytest.mark.parametrize("in_hook", [False, True])
def test_averages_of_the_weights_are_those_of_a_plain_loop(in_hook: bool) -> None:
    engine, model, optimizer, loader = private(noise_multiplier=1.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected = [p.detach().clone() for p in model.parameters()]
    if in_hook:
        optimizer.register_step_post_hook(lambda o, args, options: average.update_parameters(model))
    first = True
    for x, y in loader:
        plain_step(model, optimizer, x, y)
        if not in_hook:
            average.update_parameters(model)
        for mean, p in zip(expected, model.parameters(), strict=True):
            mean.copy_(p if first else 0.9 * mean + 0.1 * p)
        first = False
    for mean, p in zip(expected, average.module.parameters(), strict=True):
        torch.testing.assert_close(p, mean)
    assert engine.steps == 4
    # The average is a plain model: evaluating it, or training it, is no release.
    update_bn(loader, average)
    F.cross_entropy(average(x), y).backward()
    assert all(p.grad is not None for p in average.module.parameters())
    assert engine.steps == 4


def test_a_closure_is_evaluated_once_for_each_step() -> None:
    engine, model, optimizer, loader = private()
    calls = []

    def step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            calls.append(loss.detach())
            return loss

        assert torch.equal(optimizer.step(closure).detach(), calls[-1])

    assert_steps_are_the_textbook_ones(model, optimizer, loader, step)
    assert len(calls) == engine.steps == 4


def test_an_optimizer_that_evaluates_its_closure_several_times_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="LBFGS evaluates the loss several times"):
        private(torch.optim.LBFGS)


@pytest.mark.parametrize(
    "kind", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Rprop", "Adafactor"]
)
def test_optimizers_of_torch_step_on_the_clipped_mean(kind: str) -> None:
    optimizer_type = getattr(torch.optim, kind)
    _, model, optimizer, loader = private(optimizer_type, rate=0.01)
    twin = copy.deepcopy(model)
    plain = optimizer_type(twin.parameters(), lr=0.01)
    for x, y in loader:
        for p, update in zip(twin.parameters(), textbook_update(model, x, y), strict=True):
            p.grad = update
        plain_step(model, optimizer, x, y)
        plain.step()
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)
                q.copy_(p)
