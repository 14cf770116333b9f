"""Where the records are in each module's tensors, from what changes when one record more goes through the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghostgrad.layers import Places

Kind = tuple[tuple[int, ...], tuple[int, ...]]
"""The numbers of dimensions of a call's input tensors, and of its floating-point outputs."""

Found = dict[int, int | None]
_NOWHERE = Places()


@dataclass
class Known:
    """What is known of the calls of each module.

    A size that happens to be the number of records, or a multiple of it, says nothing: in some batch every size is. What
    counts is which dimension of a tensor grows with the batch.

    Attributes:
        by_content: the modules of which the rows did not grow as the batch did: what is in the records chooses them (tokens
            that are sent to experts).
    """

    by_content: set[str] = field(default_factory=set)
    _places: dict[tuple[str, Kind], Places] = field(default_factory=dict)

    def of(self, path: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Places, bool]:
        """Of a call like this one, and whether that is settled: two batches have shown it, or no two could be compared.

        Where not, the next batch may have them elsewhere: the module was not called yet, or its rows are chosen by content.
        """
        known = self._places.get((path, _kind(inputs, outputs)), _NOWHERE)
        return known, not self._places or (known is not _NOWHERE and len(known.outputs) == len(outputs))

    def learn(self, path: str, call: _Call, larger: _Call) -> None:
        """From a call in a batch of n records and the same call in a batch of m."""
        if call.kind != larger.kind:
            return
        sizes = call.n, larger.n
        if any(_grew_by_itself(*shapes, *sizes) for shapes in zip(call.outputs, larger.outputs, strict=True)):
            self.by_content.add(path)
        found = [
            {i: dim for i, shapes in enumerate(zip(small, large, strict=True)) for dim in _grown(*shapes, *sizes)}
            for small, large in ((call.inputs, larger.inputs), (call.outputs, larger.outputs))
        ]
        if (path, call.kind) in self._places:  # calls of one kind that differ leave open what they differ in
            before = self._places[path, call.kind]
            found = [_common(one, other) for one, other in zip(found, (before.inputs, before.outputs), strict=True)]
        by_rank = _by_rank(call.kind, *found)
        self._places[path, call.kind] = Places(found[0], found[1], by_rank)


@dataclass(frozen=True)
class _Call:
    """The shapes of one call."""

    n: int
    inputs: tuple[torch.Size, ...]
    outputs: tuple[torch.Size, ...]

    @property
    def kind(self) -> Kind:
        return tuple(map(len, self.inputs)), tuple(map(len, self.outputs))


class Observed:
    """The calls of a larger batch, and which of them the batch itself has come to."""

    def __init__(self) -> None:
        self._calls: dict[str, list[_Call]] = defaultdict(list)
        self._met: dict[str, int] = defaultdict(int)

    def note(self, path: str, n: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """One call in the larger batch."""
        self._calls[path].append(_call(n, inputs, outputs))

    def teach(self, known: Known, path: str, n: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """The next call of a module in the batch itself: hold it against the one in the larger batch."""
        place, calls = self._met[path], self._calls[path]
        self._met[path] += 1
        if place < len(calls):
            known.learn(path, _call(n, inputs, outputs), calls[place])


def _call(n: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> _Call:
    return _Call(n, tuple(t.shape for t in inputs), tuple(t.shape for t in outputs))


def _kind(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Kind:
    return tuple([t.dim() for t in inputs]), tuple([t.dim() for t in outputs])


def _grown(small: torch.Size, large: torch.Size, n: int, m: int) -> tuple[int | None, ...]:
    """The dimension that grew with the batch, or None if nothing grew; nothing where that cannot be said."""
    differ = _different(small, large)
    if not differ:
        return (None,)
    (first, *others) = differ
    return (first,) if not others and small[first] * m == large[first] * n else ()


def _grew_by_itself(small: torch.Size, large: torch.Size, n: int, m: int) -> bool:
    """Whether one dimension grew, and otherwise than the batch."""
    return len(_different(small, large)) == 1 and not _grown(small, large, n, m)


def _different(small: torch.Size, large: torch.Size) -> list[int]:
    return [dim for dim, sizes in enumerate(zip(small, large, strict=True)) if sizes[0] != sizes[1]]


def _common(one: Mapping[int, int | None], other: Mapping[int, int | None]) -> Found:
    return {i: dim for i, dim in one.items() if i in other and other[i] == dim}


def _by_rank(kind: Kind, inputs: Found, outputs: Found) -> Found:
    """For each number of dimensions, where the tensors that hold records hold them, if they agree and all are known."""
    dims: dict[int, set[int | None]] = defaultdict(set)
    unknown = set()
    for ranks, found in zip(kind, (inputs, outputs), strict=True):
        for i, rank in enumerate(ranks):
            if i in found:
                dims[rank].add(found[i])
            else:
                unknown.add(rank)
    held = {rank: (seen - {None}) or {None} for rank, seen in dims.items() if rank not in unknown}
    return {rank: next(iter(seen)) for rank, seen in held.items() if len(seen) == 1}
