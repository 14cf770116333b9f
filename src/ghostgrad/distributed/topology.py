"""One process, or the ranks of a process group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ghostgrad.errors import ConfigurationError
from ghostgrad.keys import RunKey

Fact = TypeVar("Fact")


class Topology(ABC):
    """The processes that train one model together, each on its share of every logical batch.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        shares_records: whether each takes records of its own, and sums are those of all of them together.
    """

    rank: int = 0
    size: int = 1
    shares_records: bool = True

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error inside, on any rank, is told to the ranks that are at `agree`, so that none waits for another."""
        yield

    @abstractmethod
    def agree(self, facts: Mapping[str, object]) -> None:
        """Compare facts that must be the same on all ranks.

        Raises:
            ConfigurationError: on every rank: they differ, or a rank failed before it came here.
        """

    @abstractmethod
    def share_key(self, key: RunKey) -> RunKey:
        """One key for all: that of rank 0."""

    @abstractmethod
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the ranks."""

    @abstractmethod
    def any_of(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """For each flag, whether it is up on any rank; exchanged on ``device``."""

    @abstractmethod
    def collect(self, fact: Fact) -> list[Fact]:
        """The fact of each rank, by rank."""

    @abstractmethod
    def bring(self, fact: Fact) -> list[Fact]:
        """The fact of each rank, by rank, on rank 0; nothing elsewhere. For what is large."""


class Alone(Topology):
    """One process: nothing to exchange.

    >>> Alone().collect("here")
    ['here']
    """

    def agree(self, facts: Mapping[str, object]) -> None:
        """Nobody to disagree with."""

    def share_key(self, key: RunKey) -> RunKey:
        return key

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """They are the sums."""

    def any_of(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        return list(flags)

    def collect(self, fact: Fact) -> list[Fact]:
        return [fact]

    def bring(self, fact: Fact) -> list[Fact]:
        return [fact]


class Ranks(Topology):
    """The default process group of `torch.distributed`, on any backend.

    All ranks make the same calls in the same order. Sums are exchanged in one flat bucket for each type and device, once a
    logical step.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._gather({}, f"{type(error).__name__}: {error}")
            raise

    def agree(self, facts: Mapping[str, object]) -> None:
        found = self._gather(dict(facts), None)
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                raise ConfigurationError(f"rank {rank} could not go on, so no rank does. It said: {failure}")
        first = found[0][0]
        for rank, (other, _) in enumerate(found):
            names = [name for name in {**first, **other} if first.get(name, self) != other.get(name, self)]
            if names:
                raise ConfigurationError(
                    f"ranks 0 and {rank} of {self.size} do not train the same: {names[0]} differs"
                    f"{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}. Their sums would not belong to one model or "
                    f"one plan. Give every rank the same model, seed, data and arguments."
                )

    def _gather(self, facts: dict[str, object], failure: str | None) -> list[tuple[dict[str, object], str | None]]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (facts, failure))
        return found

    def share_key(self, key: RunKey) -> RunKey:
        shared: list[Any] = [key.secret]
        dist.broadcast_object_list(shared, src=0)
        return RunKey(shared[0], seeded=key.seeded)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            buckets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for bucket in buckets.values():
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def any_of(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        raised = torch.tensor(list(flags), dtype=torch.uint8, device=device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def collect(self, fact: Fact) -> list[Fact]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, fact)
        return found

    def bring(self, fact: Fact) -> list[Fact]:
        found: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(fact, found if self.rank == 0 else None)
        return found


def current() -> Topology:
    """The default process group, if it is initialised with more than one rank; else this process alone."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Ranks() if several else Alone()
