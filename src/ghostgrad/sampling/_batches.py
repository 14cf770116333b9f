"""Collated batches: do their tensors have one row a record, and what does a batch of no records look like?"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from ghostgrad._generators import draws_put_back
from ghostgrad.errors import ConfigurationError

_ATOMS = (str, bytes, bytearray, int, float, complex, bool, type(None), type)
_ARRAYS = (torch.Tensor, np.ndarray)


def _children(node: Any) -> Iterable[tuple[Any, Any]]:
    """With their names. In a list of another length they have others: it has one entry a record."""
    if isinstance(node, Mapping):
        return node.items()
    if isinstance(node, Sequence):
        return [((i, len(node)), child) for i, child in enumerate(node)]
    return vars(node).items() if hasattr(node, "__dict__") else ()


def _placed_nodes(batch: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Arrays and containers of a batch and where they are, outermost and leftmost first, each object once."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), batch)]
    while waiting:
        place, node = waiting.pop()
        if isinstance(node, _ATOMS) or id(node) in seen:
            continue
        seen.add(id(node))
        yield place, node
        if not isinstance(node, _ARRAYS):
            waiting.extend(reversed([((*place, name), child) for name, child in _children(node)]))


def _nodes(batch: Any) -> Iterator[Any]:
    return (node for _, node in _placed_nodes(batch))


def numeric_arrays(batch: Any) -> dict[tuple[Any, ...], Any]:
    """The dense tensors of a batch, and its arrays of numbers, by where they are in it."""
    return {place: node for place, node in _placed_nodes(batch) if _is_dense(node)}


def _is_dense(node: Any) -> bool:
    if isinstance(node, torch.Tensor):
        return node.layout is torch.strided and not node.is_nested
    return isinstance(node, np.ndarray) and node.dtype.kind in "biufc"


def _holds_arrays(batch: Any) -> bool:
    return any(isinstance(node, _ARRAYS) for node in _nodes(batch))


def _has_one_entry_a_record(batch: Any, records: int) -> bool:
    for node in _nodes(batch):
        if isinstance(node, _ARRAYS):
            if records in tuple(node.shape[:2]):
                return True
        elif isinstance(node, Sequence) and len(node) == records:
            return True
    return False


def check_rows(batch: Any, records: int) -> None:
    """Refuse a batch in which no tensor, array or list has one entry for each of its records.

    The batch dimension may be the first or the second. Batches without tensors pass. The message names no sizes: the
    number of records drawn is a secret.
    """
    if _has_one_entry_a_record(batch, records) or not _holds_arrays(batch):
        return
    raise ConfigurationError(
        f"collate_fn returned a {type(batch).__name__} in which no tensor has one row for each record that was drawn "
        "(in its first or second dimension). Records that are packed, merged or dropped cannot be clipped one by one; "
        "return one row a record, padded where lengths differ."
    )


class EmptyBatch:
    """Builds what ``collate_fn`` would return for no records, from what it returns for 2 and for 3 copies of one
    record.

    What grows from 2 to 3 is the batch: tensors are cut to zero rows in that dimension, lists that grew are emptied,
    and everything else stays. No value of a tensor is kept that belongs to a record. The template is made in the main
    process when it is first needed, leaving the global random states as they were.

    Args:
        dataset: where the one record is fetched from.
        collate_fn: the user's.
        index: which record.

    >>> from torch.utils.data import default_collate
    >>> EmptyBatch([{"x": 1.0, "name": "a"}], default_collate, 0)()
    {'x': tensor([], dtype=torch.float64), 'name': []}
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any], index: int) -> None:
        self._dataset = dataset
        self._collate_fn = collate_fn
        self._index = index
        self._template: Any = None
        self._built = False

    def __call__(self) -> Any:
        """A new empty batch; raises ``ConfigurationError`` where the collated type does not show its rows."""
        if not self._built:
            self._template = self._build()
            self._built = True
        return _emptied(self._template, self._template)

    def _build(self) -> Any:
        with torch.random.fork_rng(devices=[]), draws_put_back():
            # Each copy is fetched for itself: some collate functions take their records apart.
            two, three = (self._collate_fn(fetch(self._dataset, [self._index] * copies)) for copies in (2, 3))
        template = _emptied(two, three)
        if _holds_arrays(two) and not _has_one_entry_a_record(template, 0):
            raise ConfigurationError(
                f"an empty batch was drawn, and collate_fn returns a {type(two).__name__} whose rows cannot be found: "
                "nothing in it grows with the number of records. Return tensors with one row a record in tuples, "
                "dicts or dataclasses."
            )
        return template


def fetch(dataset: Any, indices: list[int]) -> Any:
    """Records as a worker fetches them: a list, or whatever a dataset makes of several at once."""
    if getattr(dataset, "__getitems__", None):
        return dataset.__getitems__(indices)
    return [dataset[index] for index in indices]


def fetches_several_at_once(dataset: Any) -> bool:
    """Whether records may be others beside others: a subset only hands on what it is asked for."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return getattr(dataset, "__getitems__", None) is not None


def _emptied(two: Any, three: Any) -> Any:
    """``two`` without its rows; for a template itself (``two is three``), a fresh copy of the containers."""
    if type(two) is not type(three):
        raise ConfigurationError(
            f"an empty batch was drawn, and collate_fn returned a {type(two).__name__} for two copies of a record and "
            f"a {type(three).__name__} for three; return the same structure for every batch."
        )
    if isinstance(two, _ARRAYS):
        return _emptied_array(two, three)
    if isinstance(two, _ATOMS):
        return two
    if isinstance(two, Mapping):
        return _emptied_mapping(two, three)
    if isinstance(two, Sequence):
        return _emptied_sequence(two, three)
    return _emptied_object(two, three)


def _emptied_array(two: Any, three: Any) -> Any:
    shape = list(two.shape)
    for dim, (size, size_of_three) in enumerate(zip(two.shape, three.shape, strict=False)):
        if size != size_of_three and size * 3 == size_of_three * 2:
            shape[dim] = 0
            return two.new_empty(shape) if isinstance(two, torch.Tensor) else np.empty(shape, two.dtype)
    return two


def _emptied_mapping(two: Mapping[Any, Any], three: Mapping[Any, Any]) -> Any:
    entries = {key: _emptied(value, three[key]) for key, value in two.items() if key in three}
    if not isinstance(two, MutableMapping):
        return type(two)(entries)  # type: ignore[call-arg]
    batch = copy.copy(two)
    for key in list(batch):
        if key in entries:
            batch[key] = entries[key]
        else:
            del batch[key]  # keyed by record
    return batch


def _emptied_sequence(two: Sequence[Any], three: Sequence[Any]) -> Any:
    entries = [] if len(two) != len(three) else [_emptied(a, b) for a, b in zip(two, three, strict=True)]
    if hasattr(two, "_fields") and entries:
        return type(two)(*entries)
    return type(two)(entries)  # type: ignore[call-arg]


def _emptied_object(two: Any, three: Any) -> Any:
    if not _holds_arrays(two):
        return two
    names = [field.name for field in dataclasses.fields(two)] if dataclasses.is_dataclass(two) else list(vars(two))
    batch = copy.copy(two)
    for name in names:
        object.__setattr__(batch, name, _emptied(getattr(two, name), getattr(three, name)))
    return batch
