"""Convolutions of one to three dimensions and their transposes, every stride, dilation, group and padding mode."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ghostgrad.gradients import Convolution, Explicit, Use
from ghostgrad.gradients.convolution import Geometry
from ghostgrad.gradients.use import wide
from ghostgrad.layers.call import Call
from ghostgrad.layers.registry import Rule, add_rule


def convolution(call: Call) -> dict[str, Use]:
    """Conv1d, Conv2d, Conv3d. Padding that is not zeros is laid around the input first, as the layer itself does."""
    conv: Any = call.module
    uses = _bias(call)
    if "weight" in call.parameters:
        x, dy = _images(call, call.input), _images(call, call.grad_output)
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = (0,) * len(conv.kernel_size)
        elif isinstance(padding, str):
            # "same" may pad unevenly, "valid" does not pad: both are what the layer worked out for itself.
            x = F.pad(x, conv._reversed_padding_repeated_twice)
            padding = (0,) * len(conv.kernel_size)
        geometry = Geometry(conv.stride, padding, conv.dilation, conv.groups)
        uses["weight"] = Convolution(x, dy, call.parameters["weight"].shape, geometry, call.rows.n)
    return uses


def transposed_convolution(call: Call) -> dict[str, Use]:
    """ConvTranspose1d, 2d, 3d: the adjoint of a convolution, so input and output gradient change places."""
    conv: Any = call.module
    uses = _bias(call)
    if "weight" in call.parameters:
        x, dy = _images(call, call.input), _images(call, call.grad_output)
        geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)
        uses["weight"] = Convolution(dy, x, call.parameters["weight"].shape, geometry, call.rows.n)
    return uses


def _images(call: Call, tensor: Tensor) -> Tensor:
    """[n * fold, channels, *spatial], checked; a convolution's own batch is always the first dimension."""
    call.rows.images(tensor, len(call.module.kernel_size) + 2)  # type: ignore[arg-type]
    return tensor


def _bias(call: Call) -> dict[str, Use]:
    if "bias" not in call.parameters:
        return {}
    images = wide(_images(call, call.grad_output)).flatten(2).sum(2)
    return {"bias": Explicit(call.rows.images(images).sum(1))}


add_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, rule=Rule("convolution", convolution, least=lambda module: None))
add_rule(
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    rule=Rule("transposed convolution", transposed_convolution, least=lambda module: None),
)  # fmt: skip
