"""Linear layers: one matrix product, whatever dimensions lie between the record and the features."""

from __future__ import annotations

from torch import nn

from ghostgrad.gradients import Explicit, Matmul, Use
from ghostgrad.layers.call import Call, sum_to
from ghostgrad.layers.registry import Rule, add_rule


def linear(call: Call) -> dict[str, Use]:
    """``y = x W^T + b`` with x [n, ..., i] and W [o, i]."""
    n, dy = call.rows.n, call.rows.lead(call.grad_output)
    dy = dy.reshape(n, 1, -1, dy.shape[-1])
    uses: dict[str, Use] = {}
    if "weight" in call.parameters:
        x = call.rows.lead(call.input)
        uses["weight"] = Matmul(x.reshape(n, 1, -1, x.shape[-1]), dy, call.parameters["weight"].shape)
    if "bias" in call.parameters:
        uses["bias"] = Explicit(sum_to(dy, call.parameters["bias"].shape))
    return uses


add_rule(nn.Linear, rule=Rule("linear", linear, least=lambda module: 2, reads=lambda trained: "weight" in trained))
