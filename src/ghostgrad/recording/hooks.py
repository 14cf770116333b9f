"""Hooks that belong to the recorder and stay behind when the module is copied or saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _nothing(*args: Any) -> None:
    """What a hook becomes in a copy of the module: the copy is not recorded."""


class Hook:
    """A callable that a deep copy or a pickle of its module replaces by one that does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Callable[..., Any]]]:
        return Hook, (_nothing,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(_nothing)
