"""What the consumer of a loader holds now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ghostgrad.sampling._deliveries import START, Place
from ghostgrad.sampling.padding import Padding


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
        step: number of the logical batch in its pass; -1 before the first.
        delivered: number of pieces handed out so far, over all passes.
        place: where the consumer is in the pass.
        empty_batches: logical batches that were handed out whole and empty, with their epoch, until a step was made for
            them. A loop that skips these would show that they were empty.
        padding: looks for records of this piece that were padded because of others.

    >>> Feed().delivered
    0
    """

    logical_batch: int = -1
    records: int = field(default=0, repr=False)
    last: bool = True
    epoch: int = -1
    step: int = -1
    delivered: int = 0
    place: Place = field(default=START, repr=False)
    empty_batches: dict[int, int] = field(default_factory=dict, repr=False)
    padding: Callable[[], Sequence[Padding]] = field(default=tuple, repr=False)
    _all_empty: bool = field(default=True, repr=False)
    _opened: int = field(default=0, repr=False)

    _before: Feed | None = field(default=None, repr=False)

    def deliver(
        self,
        logical_batch: int | None,
        *,
        records: int,
        last: bool,
        epoch: int,
        place: Place,
        padding: Callable[[], Sequence[Padding]] = tuple,
    ) -> int:
        """Write down what the consumer is about to receive; None for a logical batch that begins. Returns its number."""
        self._before = replace(self, empty_batches=dict(self.empty_batches), padding=tuple, _before=None)
        if logical_batch is None:
            logical_batch = self._opened
            self._opened += 1
        self._all_empty = not records and (self._all_empty or logical_batch != self.logical_batch)
        self.logical_batch, self.records, self.last, self.epoch = logical_batch, records, last, epoch
        self.place, self.step, self.padding = place, place.step - last, padding
        self.delivered += 1
        if last and self._all_empty:
            self.empty_batches[logical_batch] = epoch
        return logical_batch

    def state_dict(self, *, consumed: bool, secrets: bool) -> dict[str, Any]:
        """Plain values; without the piece that was handed out last, unless it was ``consumed``.

        Without ``secrets`` nothing in it depends on how many records were drawn: a logical batch that is coming in begins again.
        """
        held = self if consumed or self._before is None else self._before
        if not secrets:
            held = replace(held, delivered=0, empty_batches={}, _before=None)
            held.begin_again()
        return {
            "logical_batch": held.logical_batch,
            "records": held.records,
            "last": held.last,
            "epoch": held.epoch,
            "step": held.step,
            "place": list(held.place),
            "delivered": held.delivered,
            "empty_batches": [list(entry) for entry in held.empty_batches.items()],
            "all_empty": held._all_empty,
            "opened": held._opened,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned. The notes of empty batches are changed in place: others hold them."""
        for name in ("logical_batch", "records", "last", "epoch", "step", "delivered"):
            setattr(self, name, state[name])
        self.place = Place(*state["place"])
        self.empty_batches.clear()
        self.empty_batches.update(dict(state["empty_batches"]))
        self._all_empty, self._opened, self._before = state["all_empty"], state["opened"], None

    def begin_again(self) -> None:
        """The logical batch that is coming in will be drawn anew: nothing of it is held."""
        self.place, self.last, self.records, self._all_empty = Place(self.place.step), True, 0, False
        self.empty_batches.clear()
