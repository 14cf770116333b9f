"""`nn.MultiheadAttention` as it is: the attention is computed again, its projections are matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.gradients import Explicit, Matmul, Use, wide
from ghostgrad.layers.call import Call
from ghostgrad.layers.recompute import check_same, positions, recomputing, rows_first, working_dtype
from ghostgrad.layers.registry import Rule, add_rule

_OWN = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v")


@dataclass(frozen=True)
class _Projected:
    """One call, up to the attention. Letters: r rows (n * fold), t queries, s keys, e embedding.

    Attributes:
        inputs: query, key and value, [r, t, i], [r, s, k], [r, s, v].
        heads_in: what their projections put out, [r, t, e], [r, s, e], [r, s, e]; leaves.
        extra: ``bias_k`` and ``bias_v``, once for each row, [r, 1, e]; leaves. Empty without them.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    heads_in: tuple[Tensor, Tensor, Tensor]
    extra: tuple[Tensor, ...]


def attention(call: Call) -> dict[str, Use]:
    """``softmax(q k^T / sqrt(d) + mask) v`` in every head (Vaswani et al. 2017, equation 1), between four projections.

    The gradients of what the projections put out come from autograd over the whole batch: rows do not meet there.
    """
    module: Any = call.module
    first, *others = call.grad_outputs
    projected = _project(call)
    with recomputing(call):
        attended, weights = _attend(call, projected)
    if call.outputs is not None:
        _check(call, attended, weights)
    if first is None:
        dy = torch.zeros_like(attended)
    else:
        dy = rows_first(call, first, 0 if module.batch_first else 1).to(attended.dtype)
    outputs, grads = [attended], [dy @ module.out_proj.weight.detach().to(dy.dtype)]
    if weights is not None and others and others[0] is not None:
        outputs, grads = [*outputs, weights], [*grads, others[0].to(dy.dtype)]
    leaves = (*projected.heads_in, *projected.extra)
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)
    uses = {**_in_projection(call, projected.inputs, found[:3]), **_out_projection(call, attended.detach(), dy)}
    for name, grad in zip(("bias_k", "bias_v"), found[3:], strict=False):
        uses[name] = Explicit(_sum(call, grad)[:, None, None])
    return {name: uses[name] for name in call.parameters}


def _project(call: Call) -> _Projected:
    module: Any = call.module
    dim, dtype = 0 if module.batch_first else 1, working_dtype(call)
    names = enumerate(("query", "key", "value"))
    inputs = tuple(rows_first(call, _sequence(call, i, name), dim).to(dtype) for i, name in names)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.detach().chunk(3)
    else:
        weights = tuple(getattr(module, f"{letter}_proj_weight").detach() for letter in "qkv")
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.detach().to(dtype).chunk(3)
    heads_in = [F.linear(x, w.to(dtype), b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    extra = [
        b.detach().to(dtype).expand(len(inputs[0]), 1, -1).clone()
        for b in (module.bias_k, module.bias_v)
        if b is not None
    ]
    for leaf in (*heads_in, *extra):
        leaf.requires_grad_()
    return _Projected(inputs, tuple(heads_in), tuple(extra))  # type: ignore[arg-type]


def _sequence(call: Call, position: int, name: str) -> Tensor:
    sequence = call.argument(position, name)
    if not isinstance(sequence, Tensor) or sequence.dim() != 3 or sequence.is_nested:
        raise UnsupportedModuleError(
            f"{call.path}: {name} must be a tensor of three dimensions, and is {_describe(sequence)}. An input without a "
            f"batch dimension (or a nested one) cannot be attributed to records: give it the batch dimension."
        )
    return sequence


def _describe(value: Any) -> str:
    return (
        f"of shape {list(value.shape)}" if isinstance(value, Tensor) and not value.is_nested else type(value).__name__
    )


def _attend(call: Call, projected: _Projected) -> tuple[Tensor, Tensor | None]:
    """What the heads put out, side by side [r, t, e], and the attention weights in the form the call returns them."""
    module: Any = call.module
    dropout = 0.0 if call.randomness is None else module.dropout
    q, k, v = projected.heads_in
    if projected.extra:
        k, v = (torch.cat(pair, 1) for pair in zip((k, v), projected.extra, strict=True))
    if module.add_zero_attn:
        k, v = (F.pad(side, (0, 0, 0, 1)) for side in (k, v))
    q, k, v = (side.reshape(*side.shape[:2], module.num_heads, -1).transpose(1, 2) for side in (q, k, v))
    mask, causal = _mask(call, q, k)
    if not call.argument(4, "need_weights", True):
        # The same kernel as in the forward: it decides what a query gets that may look at nothing, and which numbers it draws.
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).transpose(1, 2).flatten(2), None
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    returned = weights.mean(1) if call.argument(6, "average_attn_weights", True) else weights
    return (weights @ v).transpose(1, 2).flatten(2), returned


def _mask(call: Call, q: Tensor, k: Tensor) -> tuple[Tensor | None, bool]:
    """What is added to the scores, [r, heads, t, s] or what broadcasts to it, and whether it is causal instead."""
    padding, mask = call.argument(3, "key_padding_mask"), call.argument(5, "attn_mask")
    if call.argument(7, "is_causal", False) and padding is None and not call.argument(4, "need_weights", True):
        return None, True
    parts = []
    if mask is not None:
        parts.append(_additive(mask if mask.dim() == 2 else mask.reshape(*q.shape[:2], *mask.shape[1:]), q))
    if padding is not None:
        parts.append(_additive(padding, q)[:, None, None])
    if not parts:
        return None, False
    total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return F.pad(total, (0, k.shape[2] - total.shape[-1])), False  # bias_k and zeros are always looked at


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(mask, -torch.inf)
    return mask.to(like.dtype)


def _check(call: Call, attended: Tensor, weights: Tensor | None) -> None:
    module: Any = call.module
    assert call.outputs is not None
    bias = module.out_proj.bias
    out = F.linear(
        attended, module.out_proj.weight.to(attended.dtype), None if bias is None else bias.to(attended.dtype)
    )
    recomputed = [out.movedim(0, 0 if module.batch_first else 1), *([] if weights is None else [weights])]
    check_same(call, recomputed, call.outputs)


def _in_projection(call: Call, inputs: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor, ...]) -> dict[str, Use]:
    uses: dict[str, Use] = {"in_proj_bias": Explicit(torch.cat([_sum(call, grad) for grad in grads], 1))}
    x, dy = [positions(call, side) for side in inputs], [positions(call, grad) for grad in grads]
    for letter, factor, grad in zip("qkv", x, dy, strict=True):
        name = f"{letter}_proj_weight"
        if name in call.parameters:
            uses[name] = Matmul(factor, grad, call.parameters[name].shape)
    if "in_proj_weight" in call.parameters:
        shape = call.parameters["in_proj_weight"].shape
        if _same(*inputs):
            uses["in_proj_weight"] = Matmul(x[0], torch.cat(dy, 3), shape)
        else:  # three blocks of rows that do not meet; zeros make them equally long
            longest = max(side.shape[2] for side in x)
            blocks = [
                torch.cat([F.pad(side, (0, 0, 0, longest - side.shape[2])) for side in sides], 1) for sides in (x, dy)
            ]
            uses["in_proj_weight"] = Matmul(blocks[0], blocks[1], shape)
    return uses


def _same(first: Tensor, *others: Tensor) -> bool:
    """Whether these are one tensor: self-attention, whose three projections are one matrix product."""

    def place(tensor: Tensor) -> tuple[object, ...]:
        return tensor.data_ptr(), tensor.shape, tensor.stride()

    return all(place(first) == place(other) for other in others)


def _out_projection(call: Call, attended: Tensor, dy: Tensor) -> dict[str, Use]:
    weight: Tensor = call.module.out_proj.weight  # type: ignore[union-attr, assignment]
    return {
        "out_proj.weight": Matmul(positions(call, attended), positions(call, dy), weight.shape),
        "out_proj.bias": Explicit(_sum(call, dy)),
    }


def _sum(call: Call, rows: Tensor) -> Tensor:
    """[r, t, e] summed over each record's positions: [n, e]."""
    return wide(positions(call, rows)).sum((1, 2))


def _claims(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Also the output projection's: its weights are used here, without a call of it."""
    own = {name: p for name in _OWN if (p := module._parameters.get(name)) is not None}
    out: Any = module.out_proj
    return own | {f"out_proj.{name}": p for name, p in out._parameters.items() if p is not None}


def _draws(module: nn.Module) -> bool:
    return module.training and bool(module.dropout)


def _led(call: Call, grad: Tensor, index: int) -> Tensor:
    return rows_first(call, grad, 0 if index or call.module.batch_first else 1)


add_rule(
    nn.MultiheadAttention,
    rule=Rule("attention", attention, frozenset(_OWN), claims=_claims, led=_led, compares=True, draws=_draws),
)
