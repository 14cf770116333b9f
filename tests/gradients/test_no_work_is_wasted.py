"""Counted, not timed: the multiply-adds of a private step, and what is not multiplied at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ghostgrad import PrivacyEngine
from ghostgrad.gradients import Explicit, Matmul, cost

N, WIDTH = 8, 32
BIASES = 2 * N * 2 * WIDTH
"""Weighing and adding up the gradients of two biases."""


def flops(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def step_flops(model: nn.Module, x: torch.Tensor, mode: str | None, **options: Any) -> int:
    """Of the second step: the first batch is rehearsed."""
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if mode is not None:
        model, optimizer, _ = PrivacyEngine(seed=0).make_private(
            module=model, optimizer=optimizer, data_loader=None, sample_rate=0.5, expected_batch_size=N,
            noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode=mode, **options,
        )  # fmt: skip

    def step() -> None:
        model(x.clone()).square().flatten(1).mean(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return flops(step)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


@pytest.mark.parametrize("mode", ["bk", "ghost"])
def test_one_pass_over_rows_costs_what_the_plain_step_costs(mode):
    x = torch.randn(N, WIDTH)
    assert step_flops(mlp(), x, mode) == step_flops(mlp(), x, None) + BIASES


def test_two_passes_over_rows_add_only_the_gradients_of_inputs():
    x = torch.randn(N, WIDTH)
    between = 2 * N * WIDTH * WIDTH  # the second layer's input gradient; the first layer's is nobody's
    assert step_flops(mlp(), x, "bk", max_memory=0) == step_flops(mlp(), x, None) + BIASES + between


def test_the_second_backward_ends_where_the_rest_was_kept():
    x = torch.randn(N, WIDTH)
    first_layer = 2 * 4 * N * WIDTH  # bytes of the output gradient and of the bias' gradients
    assert step_flops(mlp(), x, "bk", max_memory=first_layer) == step_flops(mlp(), x, None) + BIASES


@pytest.mark.parametrize("t", [4, 16, 80])
def test_one_pass_over_sequences_adds_at_most_two_grams(t):
    x = torch.randn(N, t, WIDTH)
    plain, private = step_flops(mlp(), x, None), step_flops(mlp(), x, "bk")
    assert plain <= private <= plain + BIASES + 2 * 2 * N * t * t * (WIDTH + WIDTH)


def test_gradients_that_were_kept_are_not_multiplied_again():
    x, dy = torch.randn(N, 1, 64, 16), torch.randn(N, 1, 64, 8)
    use = Matmul(x, dy, torch.Size([8, 16])).compact(0)
    assert isinstance(use, Explicit)
    assert flops(use.sq_norms) == 0
    assert flops(lambda: use.weighted_sum(torch.ones(N))) <= 2 * N * 8 * 16


def test_a_gram_leaves_out_half_of_what_symmetry_gives():
    t = 512
    use = Matmul(torch.randn(2, 1, t, 16), torch.randn(2, 1, t, 16), torch.Size([16, 16]))
    assert flops(use._gram_norms) <= 0.6 * 2 * 2 * cost.gram(t, 16, 16)


def test_no_gradients_are_kept_where_there_is_no_room():
    use = Matmul(torch.randn(2, 1, 64, 64), torch.randn(2, 1, 64, 64), torch.Size([64, 64]))
    more = 2 * 64 * 64 - use.held
    assert more <= 0 or use.compact(more - 1) is use
    wide = Matmul(torch.randn(2, 1, 512, 512), torch.randn(2, 1, 512, 512), torch.Size([512, 512]))
    assert isinstance(wide.compact(1 << 20), Explicit)
    long = Matmul(torch.randn(2, 1, 200, 512), torch.randn(2, 1, 200, 512), torch.Size([512, 512]))
    assert long.compact(0) is long
    assert isinstance(long.compact(1 << 20), Explicit)
