"""Tensors inside whatever a model takes or returns: tuples, named tuples, lists, mappings, dataclasses, nested."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

_PLACE = torch.empty(0)
"""Stands where a tensor was taken out."""


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """A copy of ``tree`` with ``function`` applied to every tensor; what holds no tensors is kept as it is.

    >>> import torch
    >>> map_tensors(lambda t: t.shape[0], {"a": torch.zeros(2), "b": ("text", [torch.zeros(3)])})
    {'a': 2, 'b': ('text', [3])}
    """
    return _map(function, lambda node: isinstance(node, Tensor), tree)


def map_numbers(function: Callable[[list[Any]], Any], tree: Any, n: int) -> Any:
    """The same for every list of ``n`` numbers: the lengths of ``n`` records, say.

    >>> map_numbers(lambda lengths: lengths[1:], {"lengths": [3, 1], "size": (3, 1)}, 2)
    {'lengths': [1], 'size': (3, 1)}
    """

    def listed(node: Any) -> bool:
        return isinstance(node, list) and len(node) == n and all(type(item) in (int, float, bool) for item in node)

    return _map(function, listed, tree)


def _map(function: Callable[[Any], Any], chosen: Callable[[Any], bool], tree: Any) -> Any:
    if chosen(tree):
        return function(tree)
    kind = type(tree)
    if kind in _LEAVES:
        return tree
    # What arguments mostly are comes first: this runs several times in every call of a layer.
    if kind is tuple:
        return tuple([_map(function, chosen, item) for item in tree])
    if kind is dict:
        return {key: _map(function, chosen, value) for key, value in tree.items()}
    return _map_others(lambda node: _map(function, chosen, node), tree)


_LEAVES = {type(None), bool, int, float, str}


def _map_others(go_on: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, tuple):
        items = [go_on(item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, list):
        return type(tree)(go_on(item) for item in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return _map_dataclass(go_on, tree)
    if isinstance(tree, MutableMapping):
        new = copy.copy(tree)
        for key, value in tree.items():
            new[key] = go_on(value)
        return new
    if isinstance(tree, Mapping):
        return {key: go_on(value) for key, value in tree.items()}
    return tree


def _map_dataclass(go_on: Callable[[Any], Any], tree: Any) -> Any:
    new = copy.copy(tree)
    for entry in dataclasses.fields(tree):
        value = getattr(tree, entry.name, None)
        mapped = go_on(value)
        if mapped is not value:
            # A frozen dataclass refuses setattr on the copy too; one that is also a mapping must see its own setattr.
            frozen = tree.__dataclass_params__.frozen
            object.__setattr__(new, entry.name, mapped) if frozen else setattr(new, entry.name, mapped)
    return new


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor in ``tree``, in the order `map_tensors` visits them."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, tree)
    return found


def flatten(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors in ``tree``, and a function that puts others in their places. It does not keep the tensors alive.

    >>> import torch
    >>> found, rebuild = flatten({"a": torch.zeros(2), "b": [torch.ones(1), "text"]})
    >>> rebuild([t + 1 for t in found])
    {'a': tensor([1., 1.]), 'b': [tensor([2.]), 'text']}
    """
    found: list[Tensor] = []

    def take_out(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return _PLACE

    skeleton = map_tensors(take_out, tree)

    def rebuild(new: Sequence[Tensor]) -> Any:
        following = iter(new)
        return map_tensors(lambda place: next(following), skeleton)

    return found, rebuild
