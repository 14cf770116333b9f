"""What the validator reports: errors that can be raised or kept in a list."""

from __future__ import annotations

from ghostgrad.errors import UnsupportedModuleError


class ModuleFault(UnsupportedModuleError, ValueError):  # noqa: N818 (also kept in lists, not only raised)
    """One reason why a module cannot be trained privately as it is.

    Attributes:
        path: where the module is, as `named_modules` spells it; ``""`` is the module that was given.

    >>> str(ModuleFault("encoder.norm", "BatchNorm1d(8) mixes records", "replace it"))
    "module 'encoder.norm': BatchNorm1d(8) mixes records. To go on: replace it."
    """

    def __init__(self, path: str, found: str, remedy: str = "") -> None:
        self.path = path
        self.found = found
        self.remedy = remedy
        super().__init__(path, found, remedy)

    def __str__(self) -> str:
        where = f"module {self.path!r}" if self.path else "the module itself"
        remedy = f" To go on: {self.remedy}." if self.remedy else ""
        return f"{where}: {self.found}.{remedy}"


class ShouldReplaceModuleError(ModuleFault):
    """A layer that needs another one in its place; `ModuleValidator.fix` knows which where there is a standard one."""


class IllegalModuleConfigurationError(ModuleFault):
    """A layer that can be used, but not set up like this."""
