"""The public face of validation: check a module, fix a copy of it, see what changed."""

from __future__ import annotations

from typing import Literal, NoReturn, overload

from torch import nn
from torch.optim import Optimizer

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.validation.checks import faults
from ghostgrad.validation.faults import ModuleFault
from ghostgrad.validation.fixes import Change, Fixed, fix
from ghostgrad.validation.optimizers import remap_optimizer


class ModuleValidator:
    """Finds the layers that cannot be trained privately, and replaces those that have a standard replacement.

    What is checked looks at the modules only. A module that passes is not thereby proved private: the engine proves on
    the first batch that records do not mix.
    """

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[ModuleFault]:
        """The faults of ``module``; each says where it is, what was found and what to do.

        Args:
            module: what is to be trained; not touched.
            strict: raise if there is any fault.

        Returns:
            One error per fault, empty when there is none.

        Raises:
            UnsupportedModuleError: with every fault in its text, if ``strict`` and there is one.

        >>> [fault.path for fault in ModuleValidator.validate(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)))]
        ['1']
        """
        found = faults(module)
        if strict and found:
            _refuse(found)
        return found

    @classmethod
    def is_valid(cls, module: nn.Module) -> bool:
        """Whether `validate` finds nothing.

        >>> ModuleValidator.is_valid(nn.Linear(2, 4))
        True
        """
        return not faults(module)

    @overload
    @classmethod
    def fix(
        cls, module: nn.Module, *, optimizer: Optimizer | None = None, with_changes: Literal[False] = False
    ) -> nn.Module: ...
    @overload
    @classmethod
    def fix(cls, module: nn.Module, *, optimizer: Optimizer | None = None, with_changes: Literal[True]) -> Fixed: ...
    @classmethod
    def fix(
        cls, module: nn.Module, *, optimizer: Optimizer | None = None, with_changes: bool = False
    ) -> nn.Module | Fixed:
        """A copy of ``module`` with the layers that mix records replaced, see `ghostgrad.validation.fix`.

        The copy has parameters of its own: build the optimizer after this, or give one that exists.

        Args:
            module: not touched.
            optimizer: built for ``module``; moved to the copy, with its groups and state.
            with_changes: return a `Fixed`, with ``module`` and the list of ``changes``. Default False.

        Raises:
            ConfigurationError: the optimizer holds other parameters than the module's; nothing was changed.

        >>> fixed = ModuleValidator.fix(nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8)), with_changes=True)
        >>> print(fixed.module[1].num_groups, *fixed.changes)
        1 1: BatchNorm1d(8) -> GroupNorm(1, 8)
        """
        fixed = fix(module, optimizer)
        return fixed if with_changes else fixed.module

    @classmethod
    def fix_and_validate(cls, module: nn.Module, *, optimizer: Optimizer | None = None) -> nn.Module:
        """`fix`, then `validate` strictly; an ``optimizer`` is moved when that passed.

        Raises:
            UnsupportedModuleError: for faults that have no standard replacement.
        """
        fixed = fix(module).module
        cls.validate(fixed, strict=True)
        if optimizer is not None:
            remap_optimizer(optimizer, module, fixed)
        return fixed

    @classmethod
    def changes(cls, module: nn.Module) -> list[Change]:
        """What `fix` replaces in ``module``; empty for a module that it would leave as it is, so also for a fixed one.

        >>> print(*ModuleValidator.changes(nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64))))
        1: BatchNorm2d(64) -> GroupNorm(16, 64)
        """
        return fix(module).changes

    @classmethod
    def remap_optimizer(cls, optimizer: Optimizer, old_module: nn.Module, new_module: nn.Module) -> Optimizer:
        """Move an optimizer that was built before `fix`, see `ghostgrad.validation.remap_optimizer`."""
        return remap_optimizer(optimizer, old_module, new_module)


def get_compatible_module(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that passes `ModuleValidator.validate`.

    Raises:
        UnsupportedModuleError: for faults that have no standard replacement.

    >>> type(get_compatible_module(nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8)))[1]).__name__
    'GroupNorm'
    """
    return ModuleValidator.fix_and_validate(module)


def _refuse(found: list[ModuleFault]) -> NoReturn:
    lines = "\n".join(f"  - {fault}" for fault in found)
    raise UnsupportedModuleError(f"{len(found)} fault(s) stand in the way of private training:\n{lines}") from found[0]
