"""`max_memory`: weights beyond it take a second backward. The step is the textbook's whatever the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from all_cases import ALL
from layer_case import RECORDS, Case
from private_step import step_by_hand, step_from_loader, truth
from single_record import assert_same_gradients, expected_gradient
from small_models import TinyGPT, drawn, private, sentences, step
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torch_tells import what_is_packed

from ghostgrad import ConfigurationError, PrivacyEngine

# torch says that an even kernel with padding="same" may copy the input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

BUDGETS = [0, 600, 3000, 10**9]
"""Bytes: nothing is kept, a layer or two, more of them, everything."""


@pytest.mark.parametrize("max_memory", BUDGETS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_step_is_the_textbook_step(case: Case, max_memory: int) -> None:
    each, bound = truth(case)
    for parts, loss_reduction in (((RECORDS,), "sum"), ((3, RECORDS - 3), "mean")):
        found = step_by_hand(
            case, "bk", max_grad_norm=bound, parts=parts, loss_reduction=loss_reduction, max_memory=max_memory
        )
        expected = expected_gradient(each, bound, expected_batch_size=RECORDS, loss_reduction=loss_reduction)
        assert_same_gradients(found, expected, relative=1e-9)


@pytest.mark.parametrize("max_memory", BUDGETS)
@pytest.mark.parametrize("physical", [None, 2])
@pytest.mark.parametrize("case", ALL[::7], ids=str)
def test_a_memory_manager_changes_nothing(case: Case, physical: int | None, max_memory: int) -> None:
    each, bound = truth(case)
    found = step_from_loader(case, "bk", max_grad_norm=bound, physical=physical, max_memory=max_memory)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


# ---------------------------------------------------------------------- what is kept

N, WIDTH = 8, 32
LINEAR = 4 * N * WIDTH
"""Bytes of the output gradients of one layer below; its inputs are in the graph."""
BIAS = 4 * N * WIDTH


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])


def trained(max_memory: int | None, mode: str = "bk") -> tuple[list[str], int]:
    """What was kept of each layer, first to last, and the multiply-adds of a step."""
    engine, model = PrivacyEngine(seed=0), mlp()
    model, optimizer, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=N, noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode=mode, max_memory=max_memory,
    )  # fmt: skip

    def one() -> None:
        model(torch.randn(N, WIDTH)).square().mean(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    one()
    with FlopCounterMode(display=False) as counter:
        one()
    return [plan.kept for plan in engine.explain().modules], int(counter.get_total_flops())


@what_is_packed
@pytest.mark.parametrize("layers", range(5))
def test_the_layers_that_the_gradient_reaches_last_are_kept(layers: int) -> None:
    kept, _ = trained(layers * (LINEAR + BIAS))
    assert ["inputs and output gradients" in text for text in kept] == [True] * layers + [False] * (4 - layers)
    assert all("norms" in text for text in kept[layers:])


def test_what_is_kept_is_told_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    engine = PrivacyEngine(seed=0)
    model, _, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.1,
        expected_batch_size=4.0, noise_multiplier=1.0, max_grad_norm=1.0, max_memory=1 << 20,
    )  # fmt: skip
    model(torch.randn(4, 100, 8)).square().mean((1, 2)).mean().backward()
    assert [plan.kept for plan in engine.explain().modules if plan.path] == ["per-sample gradients"] * 2


def test_a_budget_costs_between_one_pass_and_two() -> None:
    flops = {budget: trained(budget)[1] for budget in (None, 10**9, 2 * (LINEAR + BIAS), 0)}
    assert flops[None] == flops[10**9] < flops[2 * (LINEAR + BIAS)] < flops[0]


def test_a_weight_with_several_uses_is_kept_for_its_cross_terms() -> None:
    model, optimizer = private(drawn(TinyGPT), "bk", 1.0, max_memory=0)
    twin, other = private(drawn(TinyGPT), "hooks", 1.0)
    assert_same_gradients(step(model, optimizer), step(twin, other), relative=1e-9)


def test_steps_on_empty_batches_and_after_an_error_go_on() -> None:
    model, optimizer = private(drawn(TinyGPT), "bk", 1.0, max_memory=500, lr=0.0)
    expected = step(model, optimizer)
    step(model, optimizer, sentences(0))
    handle = model.blocks[0].register_full_backward_hook(_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, optimizer)
    handle.remove()
    optimizer.zero_grad()
    assert_same_gradients(step(model, optimizer), expected, relative=1e-12)


def _fails(*_: Any) -> None:
    raise RuntimeError("out of memory")


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("max_memory", [-1, 1.5, True, "auto"])
def test_what_is_no_number_of_bytes_is_refused(max_memory: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_memory"):
        private(mlp(), "bk", 1.0, max_memory=max_memory)


@pytest.mark.parametrize("mode", ["ghost", "hooks", "functorch"])
def test_a_budget_in_a_mode_that_keeps_nothing_or_everything_is_refused(mode: str) -> None:
    model = mlp()
    with pytest.raises(ConfigurationError, match=f"max_memory=1000 with grad_sample_mode='{mode}'"):
        private(model, mode, 1.0, max_memory=1000)
    assert not model._forward_pre_hooks


def test_it_is_taken_together_with_a_target() -> None:
    model = mlp()
    data = TensorDataset(torch.randn(64, WIDTH))
    model, optimizer, loader = PrivacyEngine(seed=0).make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=DataLoader(data, batch_size=8),
        target_epsilon=3.0, target_delta=1e-3, epochs=1, max_grad_norm=1.0, max_memory=0,
    )  # fmt: skip
    for (x,) in loader:
        model(x).square().mean(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
