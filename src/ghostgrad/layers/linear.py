"""Linear layers: one matrix product, whatever dimensions lie between the record and the features."""

from __future__ import annotations

from torch import nn

from ghostgrad.gradients import Explicit, Matmul, Use
from ghostgrad.layers.call import Call, sum_to
from ghostgrad.layers.registry import Rule, add_rule


def linear(call: Call) -> dict[str, Use]:
    """``y = x W^T + b`` with x [n, ..., i] and W [o, i]."""
    dy = call.rows.split(call.grad_output)
    uses: dict[str, Use] = {}
    if "weight" in call.parameters:
        weight = call.parameters["weight"]
        x = call.rows.split(call.input)
        n = call.rows.n
        uses["weight"] = Matmul(x.reshape(n, 1, -1, x.shape[-1]), dy.reshape(n, 1, -1, dy.shape[-1]), weight.shape)
    if "bias" in call.parameters:
        uses["bias"] = Explicit(sum_to(dy, call.parameters["bias"].shape))
    return uses


add_rule(nn.Linear, rule=Rule("linear", linear, least=lambda module: 2, reads=lambda trained: "weight" in trained))
