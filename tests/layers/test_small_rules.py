"""Bilinear, PReLU, and Hugging Face's Conv1D, known by its name: transformers is not imported by the library."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from layer_case import RECORDS, Case, frozen, randn
from private_step import MODES, step_by_hand, truth
from single_record import assert_same_gradients, expected_gradient
from torch import Tensor, nn

from ghostgrad.layers import find_rule


class Conv1D(nn.Module):
    """What transformers.pytorch_utils.Conv1D computes, written anew."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


def pair(left: int, right: int, *between: int) -> Any:
    return lambda: (*randn(*between, left)(), *randn(*between, right)())


CASES = [
    Case("bilinear", lambda: nn.Bilinear(3, 2, 4), pair(3, 2)),
    Case("bilinear-many-features", lambda: nn.Bilinear(3, 5, 2), pair(3, 5)),
    Case("bilinear-positions", lambda: nn.Bilinear(3, 2, 4), pair(3, 2, 5)),
    Case("bilinear-positions-many-features-no-bias", lambda: nn.Bilinear(3, 5, 2, bias=False), pair(3, 5, 2, 2)),
    Case("bilinear-weight-frozen", frozen(lambda: nn.Bilinear(3, 2, 4), "weight"), pair(3, 2, 2)),
    Case("bilinear-by-keyword", lambda: nn.Bilinear(3, 2, 4), pair(3, 2), run=lambda m, a, b: m(input1=a, input2=b)),
    Case("prelu-of-a-vector", lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(3)), randn(4)),
    Case("prelu-one-slope", lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()), randn(2, 4)),
    Case("prelu-sequence", lambda: nn.PReLU(3), randn(3, 5)),
    Case("prelu-images", lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.PReLU(3), nn.Conv2d(3, 1, 2)), randn(2, 4, 4)),
    Case("conv1d-of-transformers", lambda: nn.Sequential(Conv1D(5, 3), nn.Tanh(), Conv1D(2, 5)), randn(3)),
    Case("conv1d-of-transformers-sequence", lambda: nn.Sequential(Conv1D(5, 3), nn.Tanh(), Conv1D(2, 5)), randn(6, 3)),
    Case(
        "conv1d-of-transformers-frozen", frozen(lambda: nn.Sequential(Conv1D(4, 3), nn.Tanh()), "weight"), randn(6, 3)
    ),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_small_layer_is_clipped_as_in_the_single_record_loop(case: Case, mode: str) -> None:
    each, bound = truth(case)
    found = step_by_hand(case, mode, max_grad_norm=bound)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


def test_each_has_a_rule_of_its_own() -> None:
    names = [find_rule(module) for module in (nn.Bilinear(2, 2, 2), nn.PReLU(), Conv1D(2, 2))]
    assert [rule.name if rule else None for rule in names] == ["bilinear", "prelu", "transposed linear"]


def test_another_class_of_the_name_is_not_taken_for_it() -> None:
    other = types.new_class("Conv1D", (nn.Module,), exec_body=lambda body: body.update(forward=lambda self, x: 2 * x))
    assert find_rule(other()) is None
