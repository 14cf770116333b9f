"""`DistributedDataParallel` around a private model: kept, but without its own exchange of gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghostgrad.distributed.slices import cut_dim, local


def inner_module(module: nn.Module) -> nn.Module:
    """The user's own module, if it is wrapped."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def unsynchronised(module: nn.Module) -> Callable[[], None]:
    """Let a wrapper exchange nothing by itself, as under its ``no_sync``; returns what turns that back.

    Clipped sums are exchanged once a logical step. The wrapper's reducer would wait for weight gradients that autograd does
    not compute, and its broadcast of buffers for ranks that had no records.
    """
    if not isinstance(module, DistributedDataParallel):
        return lambda: None
    before = module.require_backward_grad_sync, module.require_forward_param_sync
    module.require_backward_grad_sync = module.require_forward_param_sync = False

    def turn_back() -> None:
        module.require_backward_grad_sync, module.require_forward_param_sync = before

    return turn_back


def facts_of(module: nn.Module) -> dict[str, object]:
    """What must be the same on all ranks of a model: names, shapes, and the sums of values and of their squares.

    Of a parameter that is split over the ranks, how it is split: together they hold one, whatever its values.
    """

    def fact(tensor: Tensor) -> object:
        shape, trains, cut = tuple(tensor.shape), tensor.requires_grad, cut_dim(tensor)
        if cut is not None:
            return shape, str(tensor.dtype), trains, f"cut along dimension {cut}"
        tensor = local(tensor.detach())
        flat = tensor.double().flatten() if not tensor.is_complex() else torch.view_as_real(tensor).flatten()
        sums = [float(flat.sum()), float(flat.square().sum())] if flat.numel() else []
        return shape, str(tensor.dtype), trains, repr(sums)

    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {f"the parameter or buffer {name}": fact(tensor) for name, tensor in tensors.items()}
