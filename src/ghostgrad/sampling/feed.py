"""What the consumer of a loader holds now."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Feed:
    """Facts about the piece of data that was handed out last, shared by a loader, its recorder and its optimizer.

    The loader writes it in the main process, just before the piece is yielded and in the order in which the consumer
    receives the pieces; what workers have fetched ahead does not show. ``records`` is a secret under Poisson sampling.

    Attributes:
        logical_batch: running number of the logical batch (the draw); never reused, also not in later epochs. -1 before
            the first.
        records: records in this piece; 0 for an empty one.
        last: this piece completes its logical batch. ``True`` before the first piece: no batch is open.
        epoch: running number of the pass over the loader; -1 before the first.
        step: number of the logical batch among those handed out in this pass; -1 before the first.
        delivered: number of pieces handed out so far, over all passes.
        empty_batches: logical batches that were handed out whole and empty, with their epoch, until a step was made for
            them. A loop that skips these would show that they were empty.

    >>> Feed().delivered
    0
    """

    logical_batch: int = -1
    records: int = field(default=0, repr=False)
    last: bool = True
    epoch: int = -1
    step: int = -1
    delivered: int = 0
    empty_batches: dict[int, int] = field(default_factory=dict, repr=False)
    _all_empty: bool = field(default=True, repr=False)
    _opened: int = field(default=0, repr=False)

    def open(self) -> int:
        """A number for a logical batch that begins."""
        self._opened += 1
        return self._opened - 1

    def deliver(self, logical_batch: int, *, records: int, last: bool, epoch: int) -> None:
        """Write down what the consumer is about to receive."""
        if epoch != self.epoch:
            self.step = 0
        elif logical_batch != self.logical_batch:
            self.step += 1
        self._all_empty = not records and (self._all_empty or logical_batch != self.logical_batch)
        self.logical_batch, self.records, self.last, self.epoch = logical_batch, records, last, epoch
        self.delivered += 1
        if last and self._all_empty:
            self.empty_batches[logical_batch] = epoch
