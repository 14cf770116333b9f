"""Norm layers: their scale and shift act elementwise on an input that was normalised within the record."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ghostgrad.gradients import Explicit, Use, wide
from ghostgrad.layers.call import Call, sum_to
from ghostgrad.layers.registry import Rule, add_rule


def layer_norm(call: Call) -> dict[str, Use]:
    """``y = normalise(x) * weight + bias`` over the last dimensions."""
    norm: Any = call.module
    return _scale_and_shift(call, lambda x: F.layer_norm(x, norm.normalized_shape, eps=norm.eps))


def rms_norm(call: Call) -> dict[str, Use]:
    """``y = x / rms(x) * weight`` over the last dimensions (Zhang and Sennrich 2019, equation 4)."""
    norm: Any = call.module
    return _scale_and_shift(call, lambda x: F.rms_norm(x, norm.normalized_shape, eps=norm.eps))


def _scale_and_shift(call: Call, normalise: Any) -> dict[str, Use]:
    dy = wide(call.rows.split(call.grad_output))
    uses: dict[str, Use] = {}
    if "weight" in call.parameters:
        x = wide(call.rows.split(normalise(call.input)))
        uses["weight"] = Explicit(sum_to(dy * x, call.parameters["weight"].shape))
    if "bias" in call.parameters:
        uses["bias"] = Explicit(sum_to(dy, call.parameters["bias"].shape))
    return uses


def group_norm(call: Call) -> dict[str, Use]:
    """Scale and shift per channel, [n, c, ...]."""
    norm: Any = call.module
    return _per_channel(call, F.group_norm(call.input, norm.num_groups, eps=norm.eps), None)


def instance_norm(call: Call) -> dict[str, Use]:
    """Scale and shift per channel, each channel of each record normalised by itself."""
    norm: Any = call.module
    dims = norm._get_no_batch_dim() + 1
    call.rows.images(call.input, dims)  # checked first: without a batch dimension channels would be normalised
    return _per_channel(call, F.instance_norm(call.input, eps=norm.eps), dims)


def _per_channel(call: Call, normalised: Tensor, dims: int | None) -> dict[str, Use]:
    def per_record(tensor: Tensor) -> Tensor:
        """[n * fold, c, ...] summed to [n, c]."""
        channels = call.rows.images(tensor, dims)
        return channels.flatten(3).sum((1, 3)) if channels.dim() > 3 else channels.sum(1)

    dy = wide(call.grad_output)
    uses: dict[str, Use] = {}
    if "weight" in call.parameters:
        uses["weight"] = Explicit(per_record(dy * wide(normalised)))
    if "bias" in call.parameters:
        uses["bias"] = Explicit(per_record(dy))
    return uses


def _instance_refuses(module: nn.Module) -> str | None:
    if module.track_running_stats:
        return "running statistics mix records; build it with track_running_stats=False, or use ModuleValidator.fix"
    return None


def _features(module: nn.Module) -> int:
    norm: Any = module
    return 1 + len(norm.normalized_shape)


add_rule(nn.LayerNorm, rule=Rule("layer norm", layer_norm, least=_features))
add_rule(nn.RMSNorm, rule=Rule("rms norm", rms_norm, least=_features))
add_rule(nn.GroupNorm, rule=Rule("group norm", group_norm, least=lambda norm: None))
add_rule(
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    rule=Rule("instance norm", instance_norm, refuses=_instance_refuses, least=lambda norm: None),
)  # fmt: skip
