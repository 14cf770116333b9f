"""Where only biases train, inputs are neither needed nor kept: a private forward saves what a plain one saves."""

from __future__ import annotations

import pytest
import torch
from layer_case import RECORDS, Case, frozen, randn
from private_step import MODES, step_by_hand, truth
from single_record import assert_same_gradients, expected_gradient
from small_models import private
from torch import Tensor, nn


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))


CASES = [
    Case("rows", frozen(network, "weight"), randn(4)),
    Case("positions", frozen(network, "weight"), randn(5, 4)),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_is_the_textbook_step(case: Case, mode: str) -> None:
    each, bound = truth(case)
    found = step_by_hand(case, mode, max_grad_norm=bound)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


def saved(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward saves."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)  # held while addresses are compared
    assert out.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_input_is_kept_for_a_bias(case: Case) -> None:
    x = case.batch()[0].requires_grad_()
    plain = saved(case.model(), x)
    biases, weights = case.model(), case.model().requires_grad_()
    for model in (biases, weights):
        private(model, "bk", 1.0)
        model(x)  # rehearsed
    hidden = plain // 4
    assert saved(biases, x) < plain + hidden < saved(weights, x)
