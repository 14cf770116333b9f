"""Does ``collate_fn`` pad records to the longest of their batch? Then how long a record is reaches the rows of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ghostgrad._generators import draws_put_back
from ghostgrad.errors import ConfigurationError
from ghostgrad.sampling._batches import fetch, numeric_arrays, same_data

_TRIED = 16
"""Records of a batch that are collated alone. That all of them are as long as the longest says that lengths are fixed, or
cut to one at which nearly all records end."""

_KEPT = 4
"""So many of them are handed on, the shortest: most of what they become is padding."""


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

    Records are fetched in the main process, as for an empty batch; the global random states stay as they were. Of a
    dataset whose records are others each time that they are fetched (crops at random) nothing is found.

    Args:
        dataset: where they are fetched from.
        collate_fn: the user's. Torch's own does not pad.

    >>> from torch.nn.utils.rnn import pad_sequence
    >>> records = [torch.arange(1, 4), torch.arange(1, 6)]
    >>> search = PaddingSearch(records, lambda batch: pad_sequence(batch, batch_first=True))
    >>> search(pad_sequence(records, batch_first=True), [0, 1])
    [Padding(record=0, sizes={5: 3}, left=False)]
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._collate_fn = dataset, collate_fn
        self._unpadded: set[tuple[tuple[int, ...], ...]] = set()

    def __call__(self, batch: Any, indices: Sequence[int]) -> list[Padding]:
        """The shortest of the records with these indices that were padded.

        Raises:
            ConfigurationError: a record cannot be fetched or collated by itself.
        """
        n = len(indices)
        if self._collate_fn is default_collate or n < 2:
            return []
        tensors = numeric_arrays(batch)
        shapes = tuple(tuple(size for dim, size in enumerate(t.shape) if dim != _rows(t, n)) for t in tensors)
        if shapes in self._unpadded:
            return []
        with torch.random.fork_rng(devices=[]), draws_put_back():
            alone = [self._alone(index) for index in indices[:_TRIED]]
        found = (
            [] if None in alone else [_compare(tensors, own, i, n) for i, own in enumerate(alone) if own is not None]
        )
        padded = [padding for padding in found if padding is not None]
        if not padded:
            self._unpadded.add(shapes)
        return sorted(padded, key=lambda padding: sum(padding.sizes.values()))[:_KEPT]

    def _alone(self, index: int) -> list[Tensor] | None:
        """What a record is collated to when the batch is two of it: some functions squeeze a batch of one.

        None where the record is another each time.
        """
        try:
            record, again = fetch(self._dataset, [index, index])
            return numeric_arrays(self._collate_fn([record, again])) if same_data(record, again) else None
        except Exception as error:
            raise ConfigurationError(
                f"a record alone could not be fetched in the main process and given to collate_fn ({type(error).__name__}: "
                f"{error}), so whether records are padded to the longest of their batch is not known. Let the dataset open its "
                f"files when it is first read, and collate_fn take any number of records; or use torch's own collate_fn on "
                f"records of one size."
            ) from error


def _rows(tensor: Tensor, n: int) -> int | None:
    """The dimension that holds the records."""
    return next((dim for dim, size in enumerate(tensor.shape[:2]) if size == n), None)


def _compare(batch: Sequence[Tensor], alone: Sequence[Tensor], record: int, n: int) -> Padding | None:
    """What was added to a record, where it is otherwise much the same in its own batch of two (words may be masked at random)."""
    sizes: dict[int, int] = {}
    equal: dict[bool, list[float]] = {False: [], True: []}
    for tensor, short in zip(batch, alone, strict=False):
        rows, own_rows = _rows(tensor, n), _rows(short, 2)
        if rows is None or own_rows is None or tensor.dim() != short.dim():
            continue
        mine, own = tensor.select(rows, record), short.select(own_rows, 0)
        pairs = [(size, less) for size, less in zip(mine.shape, own.shape, strict=True) if size != less]
        if any(size < less or sizes.setdefault(size, less) != less for size, less in pairs):
            return None  # sizes that are drawn; or two that are padded to one, which cannot be told apart
        for left in equal if pairs and own.numel() else ():
            equal[left].append(float((cut_to(mine, own.shape, left=left) == own).double().mean()))
    same = {left: sum(shares) / len(shares) if shares else 0.0 for left, shares in equal.items()}
    return Padding(record, sizes, left=same[True] > same[False]) if max(same.values()) >= 0.5 else None


def cut_to(tensor: Tensor, shape: Sequence[int], *, left: bool) -> Tensor:
    """``tensor`` without what is beyond ``shape``, at the end of each dimension or, ``left``, at its beginning.

    >>> cut_to(torch.arange(5), [3], left=True)
    tensor([2, 3, 4])
    """
    for dim, size in enumerate(shape):
        tensor = tensor.narrow(dim, tensor.shape[dim] - size if left else 0, size)
    return tensor
