"""Small layers: Bilinear, PReLU, and the transposed linear layer of GPT-2 that Hugging Face calls Conv1D."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ghostgrad.gradients import Explicit, Matmul, Use, wide
from ghostgrad.layers.call import Call, sum_to
from ghostgrad.layers.registry import Rule, add_rule, add_rule_by_name


def bilinear(call: Call) -> dict[str, Use]:
    """``y_o = a^T W_o b + c_o`` with a [n, ..., i], b [n, ..., j] and W [o, i, j]: two of the three meet in an outer product."""
    dy = call.rows.split(call.grad_output)
    uses: dict[str, Use] = {}
    if "weight" in call.parameters:
        shape = call.parameters["weight"].shape
        left, right = (call.rows.split(call.argument(i, f"input{i + 1}")) for i in (0, 1))
        a, b, dy_ = (side.reshape(call.rows.n, 1, -1, side.shape[-1]) for side in (left, right, dy))
        features, i, j = shape
        if i * j + features <= features * i + j:
            uses["weight"] = Matmul(_outer(a, b), dy_, shape)
        else:
            uses["weight"] = Matmul(b, _outer(dy_, a), shape)
    if "bias" in call.parameters:
        uses["bias"] = Explicit(sum_to(wide(dy), call.parameters["bias"].shape))
    return uses


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """[..., i] and [..., j] to [..., i * j]."""
    return (wide(a).unsqueeze(-1) * wide(b).unsqueeze(-2)).flatten(-2)


def prelu(call: Call) -> dict[str, Use]:
    """``y = x`` where positive, else ``w x``, with one ``w`` or one for each channel, dimension 1 (He et al. 2015, eq. 1)."""
    weight = call.parameters["weight"]
    shares = torch.where(call.input > 0, 0, wide(call.grad_output) * wide(call.input))
    rows = call.rows.split(shares)
    if weight.numel() == 1:
        return {"weight": Explicit(rows.flatten(1).sum(1, keepdim=True))}
    return {"weight": Explicit(rows.flatten(3).sum((1, 3)) if rows.dim() > 3 else rows.sum(1))}


def transposed_linear(call: Call) -> dict[str, Use]:
    """``y = x W + b`` with x [n, ..., i] and W [i, o]: a linear layer whose operands change places."""
    dy = call.rows.split(call.grad_output)
    uses: dict[str, Use] = {}
    if "weight" in call.parameters:
        x, n = call.rows.split(call.input), call.rows.n
        factors = dy.reshape(n, 1, -1, dy.shape[-1]), x.reshape(n, 1, -1, x.shape[-1])
        uses["weight"] = Matmul(*factors, call.parameters["weight"].shape)
    if "bias" in call.parameters:
        uses["bias"] = Explicit(sum_to(wide(dy), call.parameters["bias"].shape))
    return uses


def _prelu_least(module: nn.Module) -> int | None:
    layer: Any = module
    return 1 if layer.num_parameters == 1 else None


add_rule(nn.Bilinear, rule=Rule("bilinear", bilinear, least=lambda module: 2))
add_rule(nn.PReLU, rule=Rule("prelu", prelu, frozenset({"weight"}), least=_prelu_least))
add_rule_by_name(
    "transformers.pytorch_utils", "Conv1D", rule=Rule("transposed linear", transposed_linear, least=lambda module: 2)
)
