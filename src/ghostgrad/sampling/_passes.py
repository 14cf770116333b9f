"""The passes over a loader, as far as another process needs them to go on in the middle of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ghostgrad.errors import CheckpointError
from ghostgrad.random_states import check_global_states, from_text, global_states, set_global_states, to_text
from ghostgrad.sampling._deliveries import START, BatchSource, Place
from ghostgrad.sampling._plan import Plan
from ghostgrad.sampling.feed import Feed

MIXED = 0
"""The limit of a pass whose pieces were cut in more than one way."""


@dataclass
class Pass:
    """One pass, from when it begins until the consumer leaves it.

    Attributes:
        epoch: its number.
        limit: most records of a piece.
        random: the state of torch's default generator when it began, in hexadecimal: it seeds workers and samplers.
        generators: those of the generators that the user gave to the loader and its sampler.
        place: where it was resumed.
        resumed: whether it was begun in another process.
        fetch: the global random states before the piece that comes next was fetched by the process that handed it out first.
    """

    epoch: int
    limit: int | None
    random: str
    generators: list[str]
    place: Place = START
    resumed: bool = False
    fetch: dict[str, Any] | None = None


class Passes:
    """Which pass is under way, and which comes next. Shared by a loader and its loaders of smaller pieces.

    Args:
        source: where index lists come from.
        group: how many of them a logical batch has.
        generators: what the user gave to draw from.
    """

    def __init__(self, source: BatchSource, group: int, generators: Sequence[torch.Generator]) -> None:
        self.feed = Feed()
        self._source, self._group, self._generators = source, group, generators
        self._open: Pass | None = None
        self._resumes: Pass | None = None
        self._before_fetch: dict[str, Any] | None = None

    @classmethod
    def over(cls, plan: Plan, generator: torch.Generator | None) -> Passes:
        """Those of a plan; ``generator`` is the loader's."""
        own = getattr(getattr(plan.batch_sampler, "sampler", None), "generator", None)
        given = {id(g): g for g in (generator, own) if g is not None}
        return cls(plan.source, plan.accumulation_steps, list(given.values()))

    @contextmanager
    def beginning(self, limit: int | None) -> Iterator[Pass]:
        """Open a pass. Inside, the generators of one that is resumed are where they were when it began."""
        current = self._resumes
        if current is None:
            current = Pass(self._source.epoch, limit, to_text(torch.get_rng_state()), self._states())
            yield current
        else:
            now, states = torch.get_rng_state(), self._states()
            torch.set_rng_state(from_text(current.random))
            self._set(current.generators)
            try:
                yield current
            finally:
                torch.set_rng_state(now)
                self._set(states)
            if limit != current.limit:
                current.limit = limit if current.place == START else MIXED
        self._open, self._resumes = current, None

    def begin(self, start: Place) -> Iterator[list[int]]:
        """The index lists of the pass from logical batch ``start.step`` on."""
        return self._source.begin(start.step * self._group)[1]

    def fetch(self, fetched: Iterator[Any], current: Pass, *, here: bool) -> Any:
        """The next piece. Fetched again in this process, its random changes are those of the first time."""
        states, current.fetch = current.fetch, None
        if not here:
            return next(fetched)
        now = global_states(cuda=False)
        if states is None:
            self._before_fetch = now
            return next(fetched)
        self._before_fetch = states
        set_global_states(states)
        try:
            return next(fetched)
        finally:
            set_global_states(now)

    def ended(self, current: Pass) -> None:
        """The consumer left the pass."""
        if self._open is current:
            self._open = None

    def finish(self, steps: int) -> None:
        """Begin a new pass where all ``steps`` logical batches of the one to be resumed were handed out."""
        if self._resumes is not None and self._resumes.place.step >= steps:
            self._source.epoch, self._resumes = self._resumes.epoch + 1, None

    @property
    def completed(self) -> int:
        """Passes that are over, the one under way not included."""
        current = self._resumes or self._open
        return self._source.epoch if current is None else current.epoch

    def state_dict(self, *, consumed: bool, secrets: bool) -> dict[str, Any]:
        feed = self.feed.state_dict(consumed=consumed, secrets=secrets)
        current = self._resumes or self._open
        under_way = None
        if current is not None:
            under_way = {
                "epoch": current.epoch,
                "limit": current.limit,
                "random": current.random,
                "generators": current.generators,
                "place": feed["place"] if feed["epoch"] == current.epoch else list(START),
                "fetch": current.fetch if consumed or not self.feed.records else self._before_fetch,
            }
        return {
            "epoch": self._source.epoch if self._resumes is None else self._resumes.epoch + 1,
            "pass": under_way,
            "feed": feed,
            "generators": self._states(),
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise where `load_state_dict` would fail."""
        if len(state["generators"]) != len(self._generators):
            raise CheckpointError(
                f"{len(state['generators'])} generators drew the batches that the state knows, and {len(self._generators)} are "
                f"given to the loader here. Build the loader as in the run that was saved."
            )
        begun = [] if state["pass"] is None else state["pass"]["generators"]
        for states in (state["generators"], begun):
            for generator, text in zip(self._generators, states, strict=False):
                from_text(text, generator.device)
        if state["pass"] is not None:
            from_text(state["pass"]["random"])
            if state["pass"]["fetch"] is not None:
                check_global_states(state["pass"]["fetch"])

    def load_state_dict(self, state: Mapping[str, Any], *, draws_anew: bool) -> None:
        under_way = state["pass"]
        self._open = self._resumes = None
        self._source.epoch = state["epoch"]
        self.feed.load_state_dict(state["feed"])
        if draws_anew:
            self.feed.begin_again()
        if under_way is not None:
            place = Place(*under_way["place"])
            self._resumes = Pass(
                epoch=under_way["epoch"],
                limit=under_way["limit"],
                random=under_way["random"],
                generators=under_way["generators"],
                place=Place(place.step) if draws_anew else place,
                fetch=None if draws_anew else under_way["fetch"],
                resumed=True,
            )
            self._source.epoch = under_way["epoch"]
        self._set(state["generators"])

    def _states(self) -> list[str]:
        return [to_text(generator.get_state()) for generator in self._generators]

    def _set(self, states: Sequence[str]) -> None:
        for generator, state in zip(self._generators, states, strict=False):
            generator.set_state(from_text(state, generator.device))
