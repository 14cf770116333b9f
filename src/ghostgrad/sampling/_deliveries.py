"""From index lists to pieces, and from a torch iterator back to the pieces in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import NamedTuple, Protocol

from torch.utils.data import BatchSampler, Sampler

from ghostgrad.keys import RunKey


class Place(NamedTuple):
    """A place in a pass: behind ``step`` logical batches, and in the next behind ``part`` parts and ``records`` records."""

    step: int = 0
    part: int = 0
    records: int = 0


START = Place()


@dataclass(frozen=True)
class Delivery:
    """One physical piece: its records, and where it stands in its logical batch."""

    indices: list[int] = field(repr=False)  # drawn indices are secret
    opens: bool
    last: bool
    place: Place  # behind it


class BatchSource(Protocol):
    """Index lists, pass by pass."""

    epoch: int

    def begin(self, skip: int = 0) -> tuple[int, Iterator[list[int]]]:
        """The number of a new pass and its index lists, without the first ``skip`` of them."""

    def rekey(self, key: RunKey) -> None:
        """Draw from another key, where draws are made from one."""

    def first_record(self) -> int:
        """One index that may come."""


class OwnBatches:
    """The user's own batches, with their passes counted."""

    def __init__(self, batch_sampler: BatchSampler, first_record: int) -> None:
        self.batch_sampler = batch_sampler
        self.epoch = 0
        self._first_record = first_record

    def begin(self, skip: int = 0) -> tuple[int, Iterator[list[int]]]:
        epoch = self.epoch
        self.epoch += 1
        return epoch, islice(self.batch_sampler, skip, None)

    def rekey(self, key: RunKey) -> None:
        """The user's own generators draw."""

    def first_record(self) -> int:
        return self._first_record


@dataclass(frozen=True)
class Share:
    """One rank's share of every batch: every ``size``-th record of it, so shares may be empty.

    All ranks draw the same batches from one key; together their shares are one draw. Every rank has as many batches, and as
    many pieces of each as the rank with most records: ranks that gather weights together run the model equally often.
    """

    rank: int = 0
    size: int = 1

    def of(self, batch: list[int]) -> tuple[list[int], int]:
        """The share, and how many records the largest share has.

        >>> Share(1, 2).of([10, 11, 12, 13, 14])
        ([11, 13], 3)
        """
        return batch[self.rank :: self.size], -(-len(batch) // self.size)


Limit = int | Callable[[], int] | None
"""Most records of a piece; asked for each piece anew where it is a function; None for whole batches."""


def deliveries(
    batches: Iterator[list[int]], group: int, limit: Limit, share: Share = Share(), start: Place = START
) -> Iterator[Delivery]:
    """Join every ``group`` index lists to one logical batch and cut this rank's share of each list to pieces.

    The last group of a pass may be shorter. ``batches`` begin with logical batch ``start.step`` of the pass; what lies before
    ``start`` in it is left out.
    """
    for step in count(start.step):
        parts = list(islice(batches, group))
        if not parts:
            return
        within = start if step == start.step else Place(step)
        opens = not (within.part or within.records)
        for part in range(within.part, len(parts)):
            first = within.records if part == within.part else 0
            for records, behind, done in _cut(*share.of(parts[part]), limit, first):
                last = done and part == len(parts) - 1
                place = Place(step + 1) if last else Place(step, part + done, 0 if done else behind)
                yield Delivery(records, opens=opens, last=last, place=place)
                opens = False


def _cut(share: list[int], longest: int, limit: Limit, start: int) -> Iterator[tuple[list[int], int, bool]]:
    """Pieces from record ``start`` on, with the place behind each, and whether it is the end of the part.

    As many as the longest share has; an empty batch is one empty piece, so that no batch is lost.
    """
    end = max(longest, 1)
    while start < end:
        most = limit() if callable(limit) else limit
        stop = end if most is None else start + most
        yield share[start:stop], min(stop, len(share)), stop >= end
        start = stop


class IndexStream(Sampler[list[int]]):
    """One pass as torch's iterator sees it: the non-empty pieces only. Remembers every piece that it went past.

    torch may draw indices far ahead of the consumer, for its workers; ``pending`` then holds what the consumer has
    not yet received. It belongs to one pass, so leaving a pass early leaves nothing behind for the next.
    """

    def __init__(self, pieces: Iterable[Delivery]) -> None:
        self._pieces = iter(pieces)
        self.pending: deque[Delivery] = deque()
        self._untaken: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        while not self._untaken:
            if not self.look_ahead():
                raise StopIteration
        return self._untaken.popleft()

    def look_ahead(self) -> bool:
        """Draw one more piece, so that an empty one is found before torch is asked; ``False`` if there is none."""
        piece = next(self._pieces, None)
        if piece is None:
            return False
        self.pending.append(piece)
        if piece.indices:
            self._untaken.append(piece.indices)
        return True


class CurrentStream(Sampler[list[int]]):
    """What the loader gives torch as its index sampler: a fixed object that leads to the pass begun last.

    torch asks it once or twice for an iterator when a pass begins (twice with workers), and keeps it for persistent
    ones.
    """

    def __init__(self, length: int) -> None:
        self.stream = IndexStream(())
        self._length = length

    def __iter__(self) -> Iterator[list[int]]:
        return self.stream

    def __len__(self) -> int:
        return self._length
