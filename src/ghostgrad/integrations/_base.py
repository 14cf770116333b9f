"""Classes of packages that may not be installed."""

from __future__ import annotations

import importlib
import importlib.util
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
        raise MissingDependencyError(f"{needed_by} needs {package}: pip install {package.split('.')[0]}") from error


def base_class(package: str, name: str, needed_by: str) -> Any:
    """The class ``package.name``; without the package, a class that says so when an object of it is made."""
    if importlib.util.find_spec(package.split(".")[0]) is not None:
        return getattr(importlib.import_module(package), name)

    class Missing:
        def __new__(cls, *positional: Any, **named: Any) -> Any:
            return require(package, needed_by)

    return Missing
