"""Letting an optimizer that was built for one module go on with its fixed copy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ghostgrad.errors import ConfigurationError


def remap_optimizer(optimizer: Optimizer, old_module: nn.Module, new_module: nn.Module) -> Optimizer:
    """Point ``optimizer`` at the parameters of ``new_module`` that are named as its parameters are in ``old_module``.

    The optimizer is changed in place, so learning-rate schedulers that hold it go on. Its groups keep their order and
    options, and each parameter its state (momentum and the like).

    Args:
        optimizer: built with parameters of ``old_module``.
        old_module: the module as it was.
        new_module: what `ModuleValidator.fix` made of it.

    Returns:
        The same optimizer.

    Raises:
        ConfigurationError: when a parameter is not one of ``old_module``, or has no counterpart of the same shape in
            ``new_module``; the optimizer is not touched then.

    >>> import torch
    >>> from ghostgrad.validation import ModuleValidator
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> fixed = ModuleValidator.fix(model)
    >>> remap_optimizer(optimizer, model, fixed).param_groups[0]["params"][0] is fixed[0].weight
    True
    """
    names = {p: name for name, p in old_module.named_parameters(remove_duplicate=False)}
    counterparts = dict(new_module.named_parameters(remove_duplicate=False))
    moves: dict[Tensor, nn.Parameter] = {}
    for number, group in enumerate(optimizer.param_groups):
        for index, old in enumerate(group["params"]):
            if old not in names:
                raise ConfigurationError(
                    f"optimizer.param_groups[{number}]['params'][{index}] (shape {tuple(old.shape)}) is not a "
                    f"parameter of old_module; give the module that the optimizer was built for."
                )
            moves[old] = _counterpart(names[old], old, counterparts)
    for group in optimizer.param_groups:
        group["params"] = [moves[p] for p in group["params"]]
    kept: dict[Tensor, Any] = {moves[p]: state for p, state in optimizer.state.items() if p in moves}
    optimizer.state.clear()
    optimizer.state.update(kept)
    return optimizer


def _counterpart(name: str, old: Tensor, counterparts: dict[str, nn.Parameter]) -> nn.Parameter:
    new = counterparts.get(name)
    if new is None or new.shape != old.shape:
        there = "no parameter of this name" if new is None else f"one of shape {tuple(new.shape)}"
        raise ConfigurationError(
            f"parameter {name!r} of old_module has shape {tuple(old.shape)}; new_module has {there}. Build a new "
            f"optimizer for new_module instead."
        )
    return new
