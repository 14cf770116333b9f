"""From index lists to pieces, and from a torch iterator back to the pieces in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from torch.utils.data import BatchSampler, Sampler


@dataclass(frozen=True)
class Delivery:
    """One physical piece: its records, and where it stands in its logical batch."""

    indices: list[int] = field(repr=False)  # drawn indices are secret
    opens: bool
    last: bool


class BatchSource(Protocol):
    """Index lists, pass by pass."""

    def begin(self) -> tuple[int, Iterator[list[int]]]:
        """The number of a new pass and its index lists."""

    def first_record(self) -> int:
        """One index that may come."""


class OwnBatches:
    """The user's own batches, with their passes counted."""

    def __init__(self, batch_sampler: BatchSampler, first_record: int) -> None:
        self.batch_sampler = batch_sampler
        self.epoch = 0
        self._first_record = first_record

    def begin(self) -> tuple[int, Iterator[list[int]]]:
        epoch = self.epoch
        self.epoch += 1
        return epoch, iter(self.batch_sampler)

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

    def pieces(self, batch: list[int], limit: int | None) -> list[list[int]]:
        """The share, in pieces of at most ``limit`` records; an empty batch is one empty piece, so no batch is lost.

        >>> Share(1, 2).pieces([10, 11, 12, 13, 14], 1)
        [[11], [13], []]
        """
        mine, longest = batch[self.rank :: self.size], -(-len(batch) // self.size)
        if limit is None:
            return [mine]
        return [mine[start : start + limit] for start in range(0, max(longest, 1), limit)]


def deliveries(
    batches: Iterator[list[int]], group: int, limit: int | None, share: Share = Share()
) -> Iterator[Delivery]:
    """Join every ``group`` index lists to one logical batch and cut this rank's share of each list to pieces.

    The last group of a pass may be shorter.
    """
    while parts := list(islice(batches, group)):
        pieces = [piece for part in parts for piece in share.pieces(part, limit)]
        for number, piece in enumerate(pieces):
            yield Delivery(piece, opens=number == 0, last=number == len(pieces) - 1)


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
