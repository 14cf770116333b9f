"""Hooks that belong to the recorder and stay behind when the module is copied or saved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config as dynamo
from torch import nn


def _nothing(*args: Any) -> None:
    """What a hook becomes in a copy of the module: the copy is not recorded."""


class Hook:
    """A callable that a deep copy or a pickle of its module replaces by one that does nothing.

    `torch.compile` does not look into it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Callable[..., Any]]]:
        return Hook, (_nothing,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(_nothing)


def leave_uncompiled(also_now: bool) -> bool:
    """Let code that `torch.compile` was given run as it is, if it does not already; returns whether it did.

    Every module that owns parameters has hooks, so a forward that is recorded would be compiled in fractions, with guards to
    check and graphs to compile again for other sizes of the batch. It runs eagerly.
    """
    before = bool(dynamo.disable)
    dynamo.disable = before or also_now
    return before


def compile_again(left_uncompiled: bool) -> None:
    """Back to what `leave_uncompiled` returned."""
    dynamo.disable = left_uncompiled


def calls_under_way(module: nn.Module) -> int:
    """How many calls of a module this thread is in, one inside the other."""
    count, frame = 0, sys._getframe()
    while (outer := frame.f_back) is not None:
        frame = outer
        # By name: `torch.compile` makes other code objects of it, also under longer names.
        count += _CALL in frame.f_code.co_name and frame.f_locals.get("self") is module
    return count


_CALL = nn.Module.__call__.__name__
