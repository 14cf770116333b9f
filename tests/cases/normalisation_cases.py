"""Norm layers: affine and not, every number of dimensions, parts frozen."""

from __future__ import annotations

from typing import Any

from layer_case import Case, frozen, randn
from torch import nn


def after_linear(norm: nn.Module, features: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(features, features), norm, nn.Tanh())


def after_conv(dims: int, norm: nn.Module) -> nn.Module:
    kinds: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    return nn.Sequential(kinds[dims](2, 4, 2, bias=False), norm, nn.Tanh())


SHAPES = {1: (2, 5), 2: (2, 4, 3), 3: (2, 3, 3, 4)}
INSTANCE: dict[int, Any] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

CASES = [
    Case("layernorm-2d", lambda: after_linear(nn.LayerNorm(4)), randn(4)),
    Case("layernorm-root", lambda: nn.LayerNorm(4), randn(4)),
    Case("layernorm-3d", lambda: after_linear(nn.LayerNorm(4)), randn(3, 4)),
    Case("layernorm-two-dimensions", lambda: after_linear(nn.LayerNorm((3, 4))), randn(3, 4)),
    Case("layernorm-two-of-four", lambda: after_linear(nn.LayerNorm((3, 4), eps=1e-2)), randn(2, 3, 4)),
    Case("layernorm-no-bias", lambda: after_linear(nn.LayerNorm(4, bias=False)), randn(3, 4)),
    Case("layernorm-not-affine", lambda: after_linear(nn.LayerNorm(4, elementwise_affine=False)), randn(3, 4)),
    Case("layernorm-bias-frozen", frozen(lambda: nn.LayerNorm(4), "bias"), randn(3, 4)),
    Case("layernorm-weight-frozen", frozen(lambda: nn.LayerNorm(4), "weight"), randn(3, 4)),
    Case("rmsnorm-2d", lambda: after_linear(nn.RMSNorm(4)), randn(4)),
    Case("rmsnorm-3d-eps", lambda: after_linear(nn.RMSNorm(4, eps=1e-2)), randn(3, 4)),
    Case("rmsnorm-two-dimensions", lambda: after_linear(nn.RMSNorm((3, 4))), randn(3, 4)),
    Case("rmsnorm-not-affine", lambda: after_linear(nn.RMSNorm(4, elementwise_affine=False)), randn(3, 4)),
    Case("groupnorm-2d", lambda: after_linear(nn.GroupNorm(2, 4)), randn(4)),
    *(
        Case(f"groupnorm-{dims + 2}d", lambda dims=dims: after_conv(dims, nn.GroupNorm(2, 4, eps=1e-3)), randn(*shape))
        for dims, shape in SHAPES.items()
    ),
    Case("groupnorm-one-group", lambda: after_conv(2, nn.GroupNorm(1, 4)), randn(*SHAPES[2])),
    Case("groupnorm-not-affine", lambda: after_conv(2, nn.GroupNorm(4, 4, affine=False)), randn(*SHAPES[2])),
    Case("groupnorm-weight-frozen", frozen(lambda: nn.GroupNorm(2, 4), "weight"), randn(4, 3)),
    *(
        Case(f"instancenorm{dims}d", lambda dims=dims: after_conv(dims, INSTANCE[dims](4, affine=True)), randn(*shape))
        for dims, shape in SHAPES.items()
    ),
    Case("instancenorm2d-not-affine", lambda: after_conv(2, nn.InstanceNorm2d(4)), randn(*SHAPES[2])),
    Case("instancenorm1d-bias-frozen", frozen(lambda: nn.InstanceNorm1d(4, affine=True), "bias"), randn(4, 3)),
]
