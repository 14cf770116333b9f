"""The nearest module that can be trained privately: layers that mix records are replaced, all else stays."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from ghostgrad.validation.checks import describe, mixes_records
from ghostgrad.validation.optimizers import remap_optimizer

_MOST_GROUPS = 32
"""The default number of groups of Wu and He (2018), Group Normalization, section 4.1."""

_LEAST_CHANNELS = 4
"""Channels a group must have: over one channel and one position, the normalised value is always zero."""


@dataclass(frozen=True)
class Change:
    """One layer that was replaced.

    Attributes:
        path: where it is; a layer that is used in several places has its first one here.
        before: what was there, e.g. ``"BatchNorm2d(64)"``.
        after: what is there now, e.g. ``"GroupNorm(16, 64)"``.
    """

    path: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path or 'the module itself'}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class Fixed:
    """A fixed copy of a module, and what in it is different."""

    module: nn.Module
    changes: list[Change]


def fix(module: nn.Module, optimizer: Optimizer | None = None) -> Fixed:
    """A copy of ``module`` in which layers that mix records, as they are set now, are replaced.

    * BatchNorm1d/2d/3d and SyncBatchNorm, in train mode or without running statistics, become GroupNorm. It has the
      largest number of groups that divides the channels, is at most 32 and leaves 4 channels a group; BatchNorm1d,
      whose inputs often have one position only, gets one group.
    * InstanceNorm with running statistics becomes InstanceNorm without.

    The new layer takes over the old one's affine weights (the parameters themselves: ties, ``requires_grad``, dtype and
    device stay), ``eps`` and training flag. A layer in several places stays one layer. The given module is not touched.
    A BatchNorm in eval mode with running statistics is private as it is and stays. A subclass with a forward of its own
    that is seen to be a BatchNorm followed by its sub-modules (an activation, dropout) becomes GroupNorm followed by these;
    any other is left alone, because what else it computes would be lost, and the validator reports it.

    An ``optimizer`` that was built for the given module is moved to the copy (`remap_optimizer`): groups, options and state stay.

    GroupNorm computes something else than BatchNorm: expect to fine-tune a pre-trained model after this.

    Raises:
        ConfigurationError: the optimizer holds other parameters than the module's; nothing was changed.

    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    >>> print(*fix(model).changes)
    1: BatchNorm2d(16) -> GroupNorm(4, 16)
    """
    clone = copy.deepcopy(module)
    changes: list[Change] = []
    replaced: dict[nn.Module, nn.Module] = {}
    for path, part in list(clone.named_modules()):
        new = _replacement(part)
        if new is not None:
            replaced[part] = new
            changes.append(Change(path, describe(part), _described(new)))
    for parent in list(clone.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                setattr(parent, name, replaced[child])
    fixed = Fixed(replaced.get(clone, clone), changes)
    if optimizer is not None:
        remap_optimizer(optimizer, module, fixed.module)
    return fixed


def _described(new: nn.Module) -> str:
    if isinstance(new, nn.Sequential):
        return " + ".join(_described(part) for part in new)
    if isinstance(new, nn.GroupNorm):
        return f"GroupNorm({new.num_groups}, {new.num_channels})"
    return f"{describe(new)} without running statistics" if isinstance(new, _InstanceNorm) else type(new).__name__


def _replacement(module: nn.Module) -> nn.Module | None:
    """The layer to put in place of this one, or None where it can stay or nothing fits."""
    if is_parametrized(module):
        return None
    following: list[nn.Module] = []
    if not _standard_forward(module):
        if not _normalises_then_runs_its_children(module):
            return None
        following = list(module.children())
    new: nn.Module
    if isinstance(module, _BatchNorm) and mixes_records(module):
        channels = module.num_features
        groups = 1 if isinstance(module, nn.BatchNorm1d) else _groups(channels)
        new = nn.GroupNorm(groups, channels, eps=module.eps, affine=False)
    elif isinstance(module, _InstanceNorm) and module.track_running_stats:
        base = next(t for t in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d) if isinstance(module, t))
        new = base(module.num_features, eps=module.eps, affine=False, track_running_stats=False)
    else:
        return None
    new.affine = module.affine
    new.weight, new.bias = module.weight, module.bias
    new.train(module.training)
    return nn.Sequential(new, *following).train(module.training) if following else new


def _standard_forward(module: nn.Module) -> bool:
    """Whether the layer computes what torch's layer computes: nobody has put another `forward` in."""
    if "forward" in vars(module):
        return False
    return type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward, _InstanceNorm.forward)


@torch.no_grad()
def _normalises_then_runs_its_children(module: nn.Module) -> bool:
    """Whether a BatchNorm with a forward of its own is one followed by its sub-modules (an activation, dropout).

    Found by what it computes on random numbers in eval mode, not by its name.
    """
    dims = {nn.BatchNorm1d: 2, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
    rank = next((dims[t] for t in dims if isinstance(module, t)), None)
    if rank is None or module.running_mean is None or not list(module.children()):
        return False
    twin: Any = copy.deepcopy(module).eval()
    shape = (2, twin.num_features, *[3] * (rank - 2))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(twin.running_mean)
    expected = nn.functional.batch_norm(x, twin.running_mean, twin.running_var, twin.weight, twin.bias, eps=twin.eps)
    for child in twin.children():
        expected = child(expected)
    found = twin(x)
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def _groups(channels: int) -> int:
    most = min(_MOST_GROUPS, channels // _LEAST_CHANNELS)
    return next((groups for groups in range(most, 1, -1) if channels % groups == 0), 1)
