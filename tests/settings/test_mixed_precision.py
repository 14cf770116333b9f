"""Autocast in bfloat16 and float16, and models in bfloat16: the step of the single-record loop, norms and sums in float32."""

from __future__ import annotations

import pytest
import torch
from single_record import Gradients, bound_that_clips_some, expected_gradient, norm
from small_models import MODES, RECORDS, TinyGPT, drawn, next_word, private, sentences
from torch import Tensor, nn

LOW = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""A few units in the last place, relative to the whole: the batch's kernels round in another order than a record's."""


def autocast_losses(model: nn.Module, ids: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype):
        logits = model(ids)[:, :-1]
    assert logits.dtype == dtype
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def loop(dtype: torch.dtype) -> list[Gradients]:
    """Each record alone through plain autograd under the same autocast."""
    each = []
    for i in range(RECORDS):
        model = drawn(TinyGPT, torch.float32)
        (loss,) = autocast_losses(model, sentences()[i : i + 1], dtype)
        loss.backward()
        each.append({name: p.grad.double() for name, p in model.named_parameters()})
    return each


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_autocast_gives_the_step_of_the_loop_under_the_same_autocast(mode, dtype):
    each = loop(dtype)
    bound = bound_that_clips_some(each)
    expected = expected_gradient(each, bound, expected_batch_size=RECORDS)
    model, optimizer = private(drawn(TinyGPT, torch.float32), mode, bound)
    autocast_losses(model, sentences(), dtype).mean().backward()
    optimizer.step()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad.dtype == torch.float32 for grad in found.values())
    assert norm({name: found[name].double() - grad for name, grad in expected.items()}) < ROUNDING[dtype] * norm(
        expected
    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_what_a_record_adds_under_autocast_is_no_longer_than_the_bound(mode, dtype):
    for i in range(RECORDS):
        model, optimizer = private(drawn(TinyGPT, torch.float32), mode, 0.01, expected_batch_size=1)
        autocast_losses(model, sentences()[i : i + 1], dtype).mean().backward()
        optimizer.step()
        added = norm({name: p.grad for name, p in model.named_parameters()})
        assert 0.99 * 0.01 < added <= 0.01 * (1 + 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_in_bfloat16_gives_the_step_of_its_own_loop(mode):
    each = []
    for i in range(RECORDS):
        alone = drawn(TinyGPT, torch.bfloat16)
        (loss,) = next_word(alone, sentences()[i : i + 1])
        loss.backward()
        each.append({name: p.grad.double() for name, p in alone.named_parameters()})
    bound = bound_that_clips_some(each)
    expected = expected_gradient(each, bound, expected_batch_size=RECORDS)
    model, optimizer = private(drawn(TinyGPT, torch.bfloat16), mode, bound)
    next_word(model, sentences()).mean().backward()
    optimizer.step()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad.dtype == torch.bfloat16 for grad in found.values())
    assert norm({name: found[name].double() - grad for name, grad in expected.items()}) < 4e-2 * norm(expected)


@pytest.mark.parametrize("mode", MODES)
def test_many_parts_of_a_batch_in_bfloat16_add_up_in_full(mode):
    """Added up in bfloat16, a sum of 600 equal parts stalls at three quarters of itself."""
    model, optimizer = private(nn.Linear(2, 1).bfloat16(), mode, 1.0, expected_batch_size=600)
    for _ in range(600):
        model(torch.ones(1, 2, dtype=torch.bfloat16)).float().sum(1).mean().backward()
    optimizer.step()
    assert norm({name: p.grad for name, p in model.named_parameters()}) == pytest.approx(1.0, rel=1e-2)
