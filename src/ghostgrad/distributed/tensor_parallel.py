"""`parallelize_module` inside a private model: all ranks see the same records, and each holds a slice of some weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghostgrad.distributed.slices import cut_dim, is_split
from ghostgrad.distributed.topology import Ranks
from ghostgrad.errors import ConfigurationError, UnsupportedModuleError

_WAY_OUT = "Leave it whole, or split the model with fully_shard."


class TensorParallel(Ranks):
    """Ranks of which each has all records of every batch, and a slice of the weights.

    What it adds to a sum is the sum already. Norms are of slices, and are joined before anything is made of them.

    Args:
        module: the root module.

    Raises:
        ConfigurationError: a mesh that is not all ranks in one dimension, or slices of another kind of layer than linear ones.
    """

    shares_records = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for path, part in module.named_modules():
            for name, p in part._parameters.items():
                if p is not None and is_split(p):
                    _check(f"{path}.{name}" if path else name, part, p, self.size)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """They are the sums."""

    def join_norms(self, sq_norms: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Squared norms [n, parameters] of the whole parameters, from those of this rank's slices.

        Those of slices add up. A parameter that every rank has as a whole counts once: with the largest of their norms, should
        they differ by rounding. The result has the same bits on all ranks.
        """
        device = parameters[0].device
        mine = sq_norms.to(device).contiguous()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        by_rank = torch.stack(found)
        cut = torch.tensor([cut_dim(p) is not None for p in parameters], device=device)
        return torch.where(cut, by_rank.sum(0), by_rank.amax(0)).to(sq_norms.device)


def _check(name: str, module: nn.Module, parameter: Any, size: int) -> None:
    mesh, placements = parameter.device_mesh, parameter.placements
    if mesh.mesh.tolist() != list(range(size)):
        raise ConfigurationError(
            f"{name} lies on a mesh of shape {tuple(mesh.shape)} on {size} ranks; only a mesh of one dimension that all ranks "
            f"are in, in their order, is supported. {_WAY_OUT}"
        )
    linear = isinstance(module, nn.Linear) and module.forward.__func__ is nn.Linear.forward  # type: ignore[attr-defined]
    if not linear or not all(placement.is_shard() or placement.is_replicate() for placement in placements):
        raise ConfigurationError(
            f"{name} of a {type(module).__name__} is a DTensor with {placements}. Slices are supported of nn.Linear, by "
            f"ColwiseParallel and RowwiseParallel: with other layers the records' gradients are spread over the ranks in other "
            f"ways. {_WAY_OUT}"
        )


def on_this_rank(path: str, module: nn.Module, tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> Any:
    """What the slices of a linear layer's weights met on this rank: inputs and gradients of outputs, as local tensors.

    ``y = x W^T`` with rows of W on each rank meets all of x and the same features of y; with columns, the same features of x
    and all of y. The weight's gradient then is a slice of the whole one.

    Raises:
        UnsupportedModuleError: when they are not laid out like that.
    """
    weight = module._parameters.get("weight")
    cut = None if weight is None else cut_dim(weight)
    split_inputs, split_grads = cut == 1, cut == 0

    def take(tensor: Tensor | None, features_are_split: bool) -> Tensor | None:
        if tensor is None or not is_split(tensor):
            return tensor
        laid: Any = tensor
        (placement,) = laid.placements
        expected = placement.is_shard(tensor.dim() - 1) if features_are_split else placement.is_replicate()
        if not expected:
            raise UnsupportedModuleError(
                f"{path}: met a DTensor with {placement} where each rank should have "
                f"{'its own features' if features_are_split else 'all features'} of all records. Use ColwiseParallel and "
                f"RowwiseParallel with their own layouts inside the layer."
            )
        mine: Tensor = laid.to_local()
        return mine

    return [take(tensor, split_inputs) for tensor in tensors], [take(grad, split_grads) for grad in grads]
