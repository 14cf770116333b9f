"""What autograd's nodes between a loss and the model say of what they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ghostgrad.recording.scalers import is_scaled

BOUNDARY = "BoundaryBackward"
MOST_NODES = 1_000_000
"""Further nodes are not looked at; a loss of so many is not taken for read."""
_SCALARS = ("_saved_alpha", "_saved_exponent", "_saved_other", "_saved_self")
"""Where a whole number is a number, and not a dimension or a size."""
_EXTENSION = "torch::autograd::CppNode"
_saved: dict[str, tuple[str, ...]] = {}


def nodes_of(loss: Tensor) -> Iterator[Any]:
    """The graph's nodes from the loss down to the boundaries of private models, these included; always in one order."""
    return below(loss.grad_fn)


def below(node: Any) -> Iterator[Any]:
    """The nodes from this one down, this one included."""
    seen: set[Any] = set()
    todo: list[Any] = [node]
    while todo and len(seen) < MOST_NODES:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node.name() != BOUNDARY:
            todo.extend(following for following, _ in node.next_functions)


def leading_to(boundaries: Sequence[Any], nodes: Sequence[Any]) -> list[Any]:
    """Those of the nodes that have a boundary behind them: the rest of a loss is not about records."""
    above: dict[Any, list[Any]] = {}
    for node in nodes:
        for following, _ in node.next_functions:
            above.setdefault(following, []).append(node)
    found: set[Any] = set()
    todo = list(boundaries)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(above.get(node, ()))
    return [node for node in nodes if node in found]


def is_opaque(node: Any) -> bool:
    """Whether autograd does not see what a node does: a function of the user's or an extension's own, or compiled code."""
    name: str = node.name()
    return name != BOUNDARY and (isinstance(node, BackwardCFunction) or name.startswith(_EXTENSION))


def shapes(node: Any) -> list[torch.Size]:
    """The shapes of what the node put out in the forward."""
    return [torch.Size(metadata.shape) for metadata in node._input_metadata]


def numbers(node: Any) -> list[float]:
    """The Python numbers that a node was made with."""
    if is_scaled(node):
        return []
    name = node.name()
    if name not in _saved:
        _saved[name] = tuple(a for a in dir(node) if a.startswith("_saved_") and not a.startswith("_saved_raw"))
    found = []
    for attribute in _saved[name]:
        value = getattr(node, attribute)
        if attribute in _SCALARS and isinstance(value, Tensor):
            value = float(value) if is_python_number(value) else None
        if isinstance(value, float) or (isinstance(value, int) and attribute in _SCALARS):
            found.append(float(value))
    return found


def is_python_number(operand: Tensor) -> bool:
    """Whether an operand was written as a number: torch lets such a one widen no other scalar's type."""
    if operand.dim():
        return False
    narrow = (torch.float16, torch.bfloat16) if operand.is_floating_point() else (torch.int8, torch.uint8)
    return all(torch.result_type(operand, torch.zeros((), dtype=dtype)) == dtype for dtype in narrow)
