"""Fixed image features for private training: how strongly each place holds an edge of each direction and width.

Gabor filters of 8 directions and 3 widths, their magnitude, and the image at half size. The filters are constants, so
the features of one image depend on that image alone and cost no privacy; the network that learns from them starts at
edges in place of pixels, which is worth several points of accuracy at the same epsilon (Tramer and Boneh 2021,
"Differentially private learning needs better features", who use two such layers).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = 8
WIDTHS = ((7, 1), (11, 2), (19, 4))  # (filter size in pixels, width in octaves above the narrowest)
CHANNELS = 1 + DIRECTIONS * len(WIDTHS)


def gabor(size: int, width: int, angle: float) -> Tensor:
    """One complex Morlet filter ``[size, size]`` with zero sum (Bruna and Mallat 2013, section 2.1)."""
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = math.cos(angle) * x + math.sin(angle) * y
    across = -math.sin(angle) * x + math.cos(angle) * y
    window = torch.exp(-(along**2 + (across / 2) ** 2) / (2 * (0.8 * width) ** 2))
    wave = window * torch.exp(0.75j * math.pi / width * along)
    return (wave - window * wave.sum() / window.sum()) / window.sum()


@torch.no_grad()
def oriented_energy(images: Tensor) -> Tensor:
    """Images ``[n, 1, h, w]`` to ``[n, 25, h/2, w/2]``, each channel of each image at mean 0 and variance 1."""
    bank = []
    for size, width in WIDTHS:
        filters = torch.stack([gabor(size, width, math.pi * k / DIRECTIONS) for k in range(DIRECTIONS)])
        bank.append((size, torch.cat([filters.real, filters.imag]).unsqueeze(1).float()))
    return torch.cat([_features(some, bank) for some in images.split(500)])


def _features(images: Tensor, bank: list[tuple[int, Tensor]]) -> Tensor:
    maps = [F.avg_pool2d(images, 2)]
    for size, filters in bank:
        waves = F.conv2d(F.pad(images, (size // 2,) * 4, mode="reflect"), filters, stride=2)
        maps.append(torch.hypot(*waves.chunk(2, dim=1)))
    return F.instance_norm(torch.cat(maps, dim=1))
