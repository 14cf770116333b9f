"""Does ``collate_fn`` pad records to the longest of their batch? Then how long a record is reaches the rows of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ghostgrad._generators import draws_put_back
from ghostgrad.errors import ConfigurationError
from ghostgrad.sampling._batches import fetch, fetches_several_at_once, numeric_arrays

_TRIED = 16
"""Records of a batch that are collated alone. That all of them are as long as the longest says that lengths are fixed, or
cut to one at which nearly all records end."""

_ROUNDS = 16
"""So often padding is looked for in every batch. Then what was padded has no influence, as boxes that only a loss reads, and it
is looked for ever more rarely."""

_KEPT = 4
"""So many of them are handed on, the shortest: most of what they become is padding."""


_Pairs = Mapping[Any, tuple[Tensor, Tensor]]
"""By place in the batch: a tensor of it, records first, and what a record is alone."""


@dataclass(frozen=True)
class Padding:
    """A record that would be shorter in a batch of its own.

    Attributes:
        record: its place in the batch.
        sizes: the size of each dimension that was padded, and what it is without the other records.
        left: whether what was added comes before the record.
    """

    record: int
    sizes: Mapping[int, int]
    left: bool


class PaddingSearch:
    """Looks for padded records in the batches of a loader, wherever one has a shape in which none was missed before.

    Records are fetched in the main process, as for an empty batch; the global random states stay as they were.

    Args:
        dataset: where they are fetched from.
        collate_fn: the user's. Torch's own does not pad, but what a dataset fetches at once may come padded.

    >>> from torch.nn.utils.rnn import pad_sequence
    >>> records = [torch.arange(1, 4), torch.arange(1, 6)]
    >>> search = PaddingSearch(records, lambda batch: pad_sequence(batch, batch_first=True))
    >>> search.among(pad_sequence(records, batch_first=True), [0, 1])()
    [Padding(record=0, sizes={5: 3}, left=False)]
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._collate_fn = dataset, collate_fn
        self._pads = collate_fn is not default_collate or fetches_several_at_once(dataset)
        self._unpadded: set[tuple[tuple[int, ...], ...]] = set()
        self._rounds = 0

    def among(self, batch: Any, indices: Sequence[int]) -> Callable[[], Sequence[Padding]]:
        """Looks when it is called, in the tensors that the batch holds now: loops take their batches apart.

        Returns:
            The shortest of the records with these indices that were padded.

        Raises:
            ConfigurationError: then, if a record cannot be fetched or collated by itself.
        """
        if not self._pads or len(indices) < 2:
            return tuple
        # Looked for once, though a batch may go through the model several times.
        return cache(partial(self._look, numeric_arrays(batch), indices))

    def _look(self, arrays: Mapping[Any, Any], indices: Sequence[int]) -> Sequence[Padding]:
        n, tensors = len(indices), _as_tensors(arrays)
        shapes = tuple(tuple(size for dim, size in enumerate(t.shape) if dim != _rows(t, n)) for t in tensors.values())
        if shapes in self._unpadded:
            return ()
        self._rounds += 1
        if self._rounds > _ROUNDS and self._rounds & (self._rounds - 1):
            return ()
        with torch.random.fork_rng(devices=[]), draws_put_back():
            pairs = [_pairs(tensors, self._alone(index), n) for index in indices[:_TRIED]]
        grow = {name for of_record in pairs for name, size, less in _sizes(of_record) if size > less}
        padded = [found for i, each in enumerate(pairs) if (found := _compare(each, grow, i)) is not None]
        if not padded:
            self._unpadded.add(shapes)
        return sorted(padded, key=lambda padding: sum(padding.sizes.values()))[:_KEPT]

    def _alone(self, index: int) -> dict[Any, Tensor]:
        """What a record is collated to when the batch is two of it: some functions squeeze a batch of one."""
        try:
            one = fetch(self._dataset, [index])
            # Copies, as some functions take their records apart, and the dataset may hold them.
            copies = [*copy.deepcopy(one), *copy.deepcopy(one)] if isinstance(one, list) else None
            two = fetch(self._dataset, [index] * 2) if copies is None else copies
            return _as_tensors(numeric_arrays(self._collate_fn(two)))
        except Exception as error:
            raise ConfigurationError(
                f"a record alone could not be fetched in the main process and given to collate_fn ({type(error).__name__}: "
                f"{error}), so whether records are padded to the longest of their batch is not known. Let the dataset open its "
                f"files when it is first read, and collate_fn take any number of records; or use torch's own collate_fn on "
                f"records of one size."
            ) from error


def _as_tensors(arrays: Mapping[Any, Any]) -> dict[Any, Tensor]:
    return {place: array if isinstance(array, Tensor) else torch.tensor(array) for place, array in arrays.items()}


def _rows(tensor: Tensor, n: int) -> int | None:
    """The dimension that holds the records."""
    return next((dim for dim, size in enumerate(tensor.shape[:2]) if size == n), None)


def _pairs(batch: Mapping[Any, Tensor], alone: Mapping[Any, Tensor], n: int) -> _Pairs:
    """What a batch holds, records first, beside what a record is alone."""
    pairs = {}
    for place, tensor in batch.items():
        short = alone.get(place)
        if short is None or short.dim() != tensor.dim():
            continue
        rows, own_rows = _rows(tensor, n), _rows(short, 2)
        if rows is not None and own_rows is not None:
            pairs[place] = tensor.movedim(rows, 0), short.select(own_rows, 0)
    return pairs


def _sizes(pairs: _Pairs) -> Iterator[tuple[Any, int, int]]:
    """Each dimension, with its size in the batch and alone."""
    for place, (lead, own) in pairs.items():
        for dim, (size, less) in enumerate(zip(lead.shape[1:], own.shape, strict=True)):
            yield (place, dim), size, less


def _compare(of_record: _Pairs, grow: Collection[Any], record: int) -> Padding | None:
    """A row of the batch that is as long as a record alone, if that was padded: its own, wherever the function put it.

    Args:
        grow: the dimensions that were padded for some record.
    """
    sizes: dict[int, int] = {}
    for name, size, less in _sizes(of_record):
        if size < less:
            return None  # sizes that are drawn
        if name in grow:  # of two that are as long in the batch, both may be cut to the longer one
            sizes[size] = max(less, sizes.get(size, 0))
    sizes = {size: less for size, less in sizes.items() if less < size}
    pairs = of_record.values()
    if not sizes or not all(own.numel() for _, own in pairs):
        return None
    found = []
    for left in (False, True):
        same = torch.stack([_same(lead, own, left=left) for lead, own in pairs]).amin(0)
        constant = torch.stack([_constant_beyond(lead, own, left=left) for lead, own in pairs]).all(0)
        same[record] += 1e-9  # where several are as good, its own place
        # Much the same is enough: words may be masked at random, positions counted on in the padding.
        likeness = torch.where(constant | (same >= 0.5), same + constant, -1.0)
        place = int(likeness.argmax())
        found.append((float(likeness[place]), Padding(place, sizes, left)))
    best, padding = max(found, key=lambda each: each[0])
    return padding if best >= 0 else None


def _same(rows: Tensor, own: Tensor, *, left: bool) -> Tensor:
    """How much of each row [n, ...] is what a record is alone."""
    equal = cut_to(rows, (len(rows), *own.shape), left=left) == own
    return equal.reshape(len(rows), -1).double().mean(1)


def _constant_beyond(rows: Tensor, own: Tensor, *, left: bool) -> Tensor:
    """Whether all that each row has more is one value: padding."""
    beyond = torch.ones(rows.shape[1:], dtype=torch.bool)
    cut_to(beyond, own.shape, left=left).fill_(False)
    values = rows[:, beyond]
    return (values == values[:, :1]).all(1)


def cut_to(tensor: Tensor, shape: Sequence[int], *, left: bool) -> Tensor:
    """``tensor`` without what is beyond ``shape``, at the end of each dimension or, ``left``, at its beginning.

    >>> cut_to(torch.arange(5), [3], left=True)
    tensor([2, 3, 4])
    """
    for dim, size in enumerate(shape):
        tensor = tensor.narrow(dim, tensor.shape[dim] - size if left else 0, size)
    return tensor
