"""Convolutions and their transposes in one to three dimensions, with every option."""

from __future__ import annotations

from typing import Any

import torch
from layer_case import Case, frozen, randn
from torch import Tensor, nn

SPATIAL = {1: (6,), 2: (6, 5), 3: (4, 5, 4)}
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSES: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "pointwise": {"kernel_size": 1},
    "stride": {"stride": 2},
    "stride-padding": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 4},
    "depthwise-multiplied": {"groups": 4, "out_channels": 8, "padding": 1},
    "same": {"padding": "same"},
    "same-even-kernel": {"padding": "same", "kernel_size": 2},
    "same-even-kernel-dilated": {"padding": "same", "kernel_size": 2, "dilation": 3},
    "valid": {"padding": "valid"},
    "zeros-all-at-once": {"padding": 2, "stride": 2, "dilation": 2, "groups": 2},
    **{
        f"{mode}{'-all-at-once' if more else ''}": {"padding_mode": mode, "padding": 1, **more}
        for mode in ("reflect", "replicate", "circular")
        for more in ({}, {"stride": 2, "groups": 2})
    },
    "circular-same-even": {"padding_mode": "circular", "padding": "same", "kernel_size": 2},
    "reflect-same": {"padding_mode": "reflect", "padding": "same"},
}

TRANSPOSE_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "stride": {"stride": 2},
    "output-padding": {"stride": 2, "output_padding": 1},
    "dilation": {"dilation": 2},
    "dilated-output-padding": {"dilation": 2, "output_padding": 1, "padding": 1},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 4},
    "all-at-once": {"stride": 3, "padding": 1, "output_padding": 2, "groups": 2, "dilation": 2},
}


def convolution(kind: Any, **options: Any) -> nn.Module:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
    return nn.Sequential(kind(**options), nn.Tanh())


def every_option(kinds: dict[int, Any], options: dict[str, dict[str, Any]]) -> list[Case]:
    return [
        Case(f"{kind.__name__.lower()}-{name}", lambda kind=kind, chosen=chosen: convolution(kind, **chosen),
             randn(4, *SPATIAL[dims]))
        for dims, kind in kinds.items()
        for name, chosen in options.items()
    ]  # fmt: skip


class ToThisSize(nn.Module):
    """The output size is said in the call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(2, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(input=x, output_size=[8, 9]))


class FramesFolded(nn.Module):
    """Frames of a video folded behind the record: images [n * t, c, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.up(torch.tanh(self.layer(x.flatten(0, 1))))
        return torch.tanh(frames).unflatten(0, x.shape[:2])


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x.to(memory_format=torch.channels_last)))


def uneven() -> nn.Module:
    conv = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    return nn.Sequential(conv, nn.Tanh())


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip


CASES = [
    *every_option(CONVOLUTIONS, OPTIONS),
    *every_option(TRANSPOSES, TRANSPOSE_OPTIONS),
    Case("conv2d-uneven", uneven, randn(2, 6, 7)),
    Case("conv2d-root", lambda: nn.Conv2d(2, 3, 2), randn(2, 4, 4)),
    Case("conv2d-few-positions-gram", lambda: nn.Sequential(nn.Conv2d(6, 8, 3), nn.Tanh()), randn(6, 4, 3)),
    Case("conv2d-bias-frozen", frozen(lambda: convolution(nn.Conv2d), "bias"), randn(4, 5, 5)),
    Case("conv2d-weight-frozen", frozen(lambda: convolution(nn.Conv2d), "weight"), randn(4, 5, 5)),
    Case("convtranspose2d-weight-frozen", frozen(lambda: convolution(nn.ConvTranspose2d), "weight"), randn(4, 3, 3)),
    Case("convtranspose2d-to-this-size", ToThisSize, randn(2, 3, 4)),
    Case("conv2d-frames-folded", FramesFolded, randn(3, 2, 4, 3)),
    Case("conv2d-channels-last", ChannelsLast, randn(4, 5, 5)),
    Case("conv2d-small-network", small_network, randn(2, 6, 5)),
]
