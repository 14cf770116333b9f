"""Classes of packages that may not be installed."""

from __future__ import annotations

import importlib
from typing import Any

from ghostgrad.errors import MissingDependencyError


def require(package: str, needed_by: str) -> Any:
    """The package, imported.

    Raises:
        MissingDependencyError: naming what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{needed_by} needs {package}, which could not be imported ({error}): pip install 'ghostgrad[trainers]'"
        ) from error


def base_class(package: str, name: str, needed_by: str) -> Any:
    """The class ``package.name``; without the package, a class that says so when an object of it is made."""
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError:
        pass  # said when it is needed, so that what imports this module for another reason goes on

    class Missing:
        def __new__(cls, *positional: Any, **named: Any) -> Any:
            return require(package, needed_by)

    return Missing
