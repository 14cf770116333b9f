"""A record of a padded batch without its padding, taken out of the arguments of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostgrad.recording.rows import dim_of_records, holds_records
from ghostgrad.sampling import Padding, cut_to
from ghostgrad.tree import map_numbers, map_tensors, tensors


class Reading(NamedTuple):
    """How the arguments of a call may be meant, where sizes alone do not tell.

    Attributes:
        padded: which of the dimensions that are as long as what was padded; another one may have that size by chance.
        folded: whether records may also be in another dimension than those of the data, with several rows of each (masks).
    """

    padded: slice
    folded: bool


READINGS = [
    Reading(padded, folded) for folded in (False, True) for padded in (slice(None), slice(None, 1), slice(-1, None))
]
"""The first on which the model runs is taken."""


class Cut:
    """Takes one record out of the arguments of a call, without its padding.

    Attributes:
        record: its place there. A loop may have sorted the batch by length.
        shows: whether something of it was padded, with something that the record itself is not.
    """

    def __init__(self, padding: Padding, batch: Any, n: int, *, batch_first: bool) -> None:
        self.left, self._n, self._batch_first = padding.left, n, batch_first
        held = [tensor for tensor in tensors(batch) if holds_records(tensor, n, batch_first=batch_first)]
        led = [tensor.detach().movedim(dim_of_records(tensor, batch_first=batch_first), 0) for tensor in held]
        self._sizes = _arriving(padding, led)
        padded = [tensor for tensor in led if any(size in self._sizes for size in tensor.shape[1:])]
        self.record = self._place(padding, padded)
        self.shows = any(self._differs(tensor[self.record]) for tensor in padded)

    def apply(self, batch: Any, reading: Reading) -> Any:
        """The call's arguments with the record twice: some models squeeze a batch of one."""

        def choose(tensor: Tensor) -> Tensor:
            dim = self._dim(tensor, folded=reading.folded)
            if dim is not None:
                tensor = torch.cat([of_record(tensor, dim, self.record, self._n)] * 2, dim)
            return cut_to(tensor, self._shape(tensor.shape, dim, reading.padded), left=self.left)

        args, kwargs = map_tensors(choose, map_numbers(lambda numbers: [numbers[self.record]] * 2, batch, self._n))
        return tuple(self._shorter(each) for each in args), {name: self._shorter(each) for name, each in kwargs.items()}

    def _shorter(self, argument: Any) -> Any:
        """The longest length is passed as a number too, for outputs to be as long as that."""
        return self._sizes.get(argument, argument) if type(argument) is int else argument

    def _dim(self, tensor: Tensor, *, folded: bool) -> int | None:
        """Which dimension holds the records."""
        if holds_records(tensor, self._n, batch_first=self._batch_first):
            return dim_of_records(tensor, batch_first=self._batch_first)
        if not folded or not tensor.numel():
            return None
        return next((dim for dim in (0, 1) if dim < tensor.dim() and tensor.shape[dim] % self._n == 0), None)

    def _shape(self, sizes: Sequence[int], rows: int | None = None, which: slice = slice(None)) -> list[int]:
        padded = [dim for dim, size in enumerate(sizes) if size in self._sizes and dim != rows][which]
        return [self._sizes[size] if dim in padded else size for dim, size in enumerate(sizes)]

    def _place(self, padding: Padding, led: Sequence[Tensor]) -> int:
        """The record's own place, if it is as short there as it was, or else that of one which is."""
        short = torch.ones(self._n, dtype=torch.bool)
        for tensor in led:
            for dim, size in enumerate(tensor.shape):
                if dim and size in padding.sizes:
                    ends = _ends(tensor, dim, padding.sizes[size], left=self.left)
                    short &= ends | ~ends.any()  # what goes on in all records is positions, or noise
        return padding.record if bool(short[padding.record]) or not bool(short.any()) else int(short.nonzero()[0])

    def _differs(self, one: Tensor) -> bool:
        """Whether a record is something else than its padding."""
        kept = cut_to(one, self._shape(one.shape), left=self.left)
        return bool((kept != one.flatten()[0 if self.left else -1]).any())


def of_record(tensor: Tensor, dim: int, record: int, n: int) -> Tensor:
    """The rows of one of ``n`` records in a dimension that holds them.

    >>> of_record(torch.arange(6), 0, 1, 3)
    tensor([2, 3])
    """
    fold = tensor.shape[dim] // n
    return tensor.narrow(dim, record * fold, fold)


def _arriving(padding: Padding, led: Sequence[Tensor]) -> dict[int, int]:
    """The sizes as they are in the arguments: loops leave the last word out, which is to be predicted, or add one."""
    found: dict[int, int] = {}
    for size, less in padding.sizes.items():
        for more in (0, -1, 1):
            where = [(t, dim) for t in led for dim in range(1, t.dim()) if t.shape[dim] == size + more]
            if where and less + more and all(_continues_as_padded(t, dim, less, padding, more) for t, dim in where):
                found[size + more] = max(less + more, found.get(size + more, 0))
                break
    return {size: less for size, less in found.items() if less < size}


def _continues_as_padded(led: Tensor, dim: int, less: int, padding: Padding, more: int) -> bool:
    """Of a size that is another by one, whether it looks as if it came from what was padded."""
    return not more or bool(_ends(led, dim, less + max(more, 0), left=padding.left)[padding.record])


def _ends(led: Tensor, dim: int, less: int, *, left: bool) -> Tensor:
    """Which records [n] have the same everywhere beyond that size of a dimension."""
    beyond = cut_to(led.movedim(dim, 0), [led.shape[dim] - less], left=not left)
    return (beyond == beyond[:1]).movedim(1, 0).flatten(1).all(1).cpu()
