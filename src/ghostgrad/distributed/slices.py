"""Which part of a parameter this process holds, and where that part lies in the whole."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

_WHOLE = {Tensor, torch.nn.Parameter}


def is_split(tensor: Tensor) -> bool:
    """Whether it lies on a mesh of ranks (a `DTensor`), of which each may hold a part only."""
    # Known by its mesh, so that nothing of torch.distributed is imported for it. A look at the type is much faster.
    return type(tensor) not in _WHOLE and hasattr(tensor, "device_mesh")


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The part of it that is here: the tensor itself where it is not split.

    >>> whole = torch.zeros(3)
    >>> local(whole) is whole
    True
    """
    split: Any = tensor
    part: Tensor = split.to_local() if is_split(tensor) else tensor
    return part


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """``part``, this rank's own, as a tensor that is split as ``tensor`` is."""
    if not is_split(tensor):
        return part
    from torch.distributed.tensor import DTensor

    split: Any = tensor
    placed: Tensor = DTensor.from_local(
        part, split.device_mesh, split.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return placed


def cut_dim(tensor: Tensor) -> int | None:
    """The dimension along which a tensor is split over a mesh of one dimension; None where every rank holds all of it."""
    placements: Any = getattr(tensor, "placements", ())
    dims: list[int] = [placement.dim for placement in placements if placement.is_shard()]
    return dims[0] if dims else None


def runs(tensor: Tensor, part: Tensor) -> Iterator[tuple[int, Tensor]]:
    """This rank's ``part`` of a tensor as views that are consecutive in the whole, each with the row-major place it begins at.

    A part of a tensor that is split has to be contiguous.

    >>> [(offset, list(run.shape)) for offset, run in runs(torch.zeros(2, 3), torch.zeros(2, 3))]
    [(0, [2, 3])]
    """
    dim = cut_dim(tensor)
    if dim is None:
        yield 0, part
        return
    split: Any = tensor
    ahead, width, behind = prod(tensor.shape[:dim]), tensor.shape[dim], prod(tensor.shape[dim + 1 :])
    start = min(split.device_mesh.get_local_rank() * -(-width // split.device_mesh.size()), width)
    if not part.numel():
        return
    rows = part.view(ahead, part.shape[dim], behind)
    for i in range(ahead):
        yield (i * width + start) * behind, rows[i]
