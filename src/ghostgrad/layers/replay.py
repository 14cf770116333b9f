"""What a call drew, drawn again and handed to its records one by one.

The forward keeps the state of the generators and nothing else. When the gradients of single records are wanted, the call is run
once more on the whole batch from that state, and the results of every operator that draws are kept: the batch's own dropout
masks, noise, choices. In the run on one record the same operators, met in the same order, get that record's part of them.
Which operators draw is what torch says of its own (`torch.Tag.nondeterministic_seeded`); they are met below autograd and `vmap`,
so it makes no difference by which function or class they were called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ghostgrad.layers.randomness import Randomness, RandomState
from ghostgrad.tree import tensors


class NotReplayableError(RuntimeError):
    """The random numbers of a call cannot be told apart by record."""


class Draw(NamedTuple):
    """What one operator drew for the whole batch."""

    operator: str
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Drawn:
    """What a call drew for its batch, in order.

    Attributes:
        draws: what each operator drew.
        n: the records of the batch.
        randomness: the random state that the call started from.
    """

    draws: Sequence[Draw]
    n: int
    randomness: Randomness

    @classmethod
    def again(cls, run: Callable[[], object], n: int, randomness: Randomness) -> Drawn:
        """By running the call once more on its whole batch.

        Raises:
            NotReplayableError: when it draws other numbers than the first time, or by an operator that does not show them.
        """
        kind = randomness.device.type
        precision = torch.autocast(kind, dtype=randomness.autocast, enabled=randomness.autocast is not None)
        with randomness.again(), torch.enable_grad(), precision, _Noting() as noting:
            run()
            ended = randomness.ended()
        if not ended:
            raise NotReplayableError("run again on the same batch from the same random state, it draws other numbers")
        return cls(noting.draws, n, randomness)

    def by_turns(self) -> Drawn:
        """As of a batch that drew for one record after the other: draws alike in a row are joined into one of all records."""
        joined: list[Draw] = []
        for (operator, _), alike in groupby(self.draws, lambda draw: (draw.operator, [v.shape for v in draw.values])):
            draws = list(alike)
            each, rest = divmod(len(draws), self.n)
            if rest or not each:
                joined.extend(draws)
                continue
            for k in range(each):
                columns = zip(*(draw.values for draw in draws[k::each]), strict=True)
                joined.append(Draw(operator, tuple(torch.stack(column) for column in columns)))
        return replace(self, draws=joined)

    @contextmanager
    def replayed(self, record: int | None = None) -> Iterator[None]:
        """Inside, every operator that draws gets what was drawn for the records that are run: all, under `vmap`, or one.

        Raises:
            NotReplayableError: when other numbers are drawn inside than the batch drew.
        """
        with self.randomness.again(), _Replay(self, record) as replay:
            yield
        replay.finish()


class _Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what is drawn inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[Draw] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _draws(func, args, kwargs or {}):
            name = _name(func)
            if "attention" in name:  # a fused kernel: its backward draws the mask again, for the batch it was made for
                raise NotReplayableError(
                    f"its attention drops out inside one kernel ({name}), where a record's mask cannot be had. Compute the "
                    f"attention by explicit products (attn_implementation='eager'), or set its dropout to 0"
                )
            # Copies: what comes next may scale the mask in place.
            self.draws.append(Draw(name, tuple(result.clone() for result in _results(func, args, kwargs or {}, out))))
        return out


class _Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts what was drawn for the batch in the place of what is drawn inside."""

    def __init__(self, drawn: Drawn, record: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws, self._n, self._record = drawn.draws, drawn.n, record
        self._device = drawn.randomness.device
        self._met: dict[object, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _draws(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        draw = self._next(_name(func))
        out = func(*args, **(kwargs or {}))
        for result, value in zip(_results(func, args, kwargs or {}, out), draw.values, strict=True):
            result.copy_(self._part(value, result.shape))
        return out

    def _next(self, operator: str) -> Draw:
        """What the batch drew here. A checkpoint that is run again puts the random state back, and draws the same again."""
        here = RandomState.now(self._device).key()
        place = self._met.setdefault(here, len(self._met))
        draw = self._draws[place] if place < len(self._draws) else Draw("nothing", ())
        if draw.operator != operator:
            raise NotReplayableError(f"a record alone draws by {operator} where the batch drew by {draw.operator}")
        return draw

    def finish(self) -> None:
        if len(self._met) != len(self._draws):
            raise NotReplayableError(
                f"a record alone draws {len(self._met)} times where the batch drew {len(self._draws)} times"
            )

    def _part(self, value: Tensor, shape: torch.Size) -> Tensor:
        """What was drawn for the batch, in the shape in which it is wanted now."""
        stacked = self._record is None
        if stacked and value.shape == shape:
            return value  # `vmap` put the records into the operator's own batch
        alone = shape[1:] if stacked else shape
        if value.shape == (self._n, *alone):
            return value if stacked else value[self._record]  # drawn by turns
        if value.dim() == len(alone):
            differ = [dim for dim, (whole, part) in enumerate(zip(value.shape, alone, strict=True)) if whole != part]
            if not differ:
                return value.expand(shape)  # one draw for all records
            if len(differ) == 1 and value.shape[differ[0]] == self._n * alone[differ[0]]:
                split = (*value.shape[: differ[0]], self._n, *alone[differ[0] :])
                by_record = value.reshape(split).movedim(differ[0], 0)
                return by_record if stacked else by_record[self._record]
        raise NotReplayableError(
            f"a record alone draws numbers of shape {list(alone)} where its batch of {self._n} drew {list(value.shape)}"
        )


def _draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Attention kernels draw only where they drop something out."""
    return torch.Tag.nondeterministic_seeded in func.tags and _arguments(func, args, kwargs).get("dropout_p") != 0


def _name(func: Any) -> str:
    """Without the underscore of the form that works in place: `vmap` changes one into the other."""
    name: str = func._schema.name
    return name.rpartition("::")[2].rstrip("_")


def _results(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Tensor]:
    """The arguments that an operator wrote into, and what it made."""
    given = _arguments(func, args, kwargs)
    written = [
        given[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given
    ]
    return [*written, *(tensor for tensor in tensors(out) if not any(tensor is one for one in written))]


def _arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """By name, those that were left out at their defaults."""
    schema = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return {**defaults, **dict(zip((argument.name for argument in schema), args, strict=False)), **kwargs}
