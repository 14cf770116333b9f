"""Whether a number in the first loss can be a constant: later batches are held to it, but the first has none before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ghostgrad.errors import PrivacyError
from ghostgrad.recording.loss_graph import is_python_number

_RELATIVE = 1e-6
_DIGITS = 3
_NAMED = (1.0, math.log(2), math.log(10), math.pi, math.sqrt(math.pi))
"""Constants that are written by name: nats to bits, the normaliser of a Gaussian."""


def check(term: Any, n: int, delivered: int) -> None:
    """Refuse a factor that is a count of the batch, or that nobody would write.

    Args:
        term: a mean or a sum over the batch, and what it is multiplied by (`loss_terms.Term`).
        n: the records that the loss is about.
        delivered: the records in the batch of which they are a part.

    Raises:
        PrivacyError: with the count that it is, or the factor.
    """
    factor = math.prod(term.written)
    if _same(abs(factor), 1.0) or not math.isfinite(factor):
        return
    if n < delivered:
        for count, name in ((delivered, "records"), (-(-delivered // n), "parts")):
            if _same(abs(factor) * count, 1.0):
                raise PrivacyError(
                    f"the loss of {n} of a batch's {delivered} records is divided by {count}, the number of the batch's "
                    f"{name}, which changes with each record that is there. Leave the division out: the private step divides "
                    f"by the expected batch size."
                )
    for elements, counted in _counts(term.inside):
        if _same(abs(factor) * counted, elements if term.is_mean else 1.0):
            raise PrivacyError(
                f"the loss is multiplied by {factor:g}, and a mask in it keeps {counted} of {elements} elements: divided by what "
                f"is counted in the batch, a record weighs more or less with the others that are there. Average within each "
                f"record, then over the records."
            )
    # Constants by themselves may multiply to more digits; whole numbers may be a ratio that was written as two.
    others = math.prod(number for number in term.written if number == round(number) or not _is_short(number))
    if not (_is_written_by_hand(factor) or _is_written_by_hand(others)):
        raise PrivacyError(
            f"the loss is multiplied by {factor!r}. If that was counted in the batch (elements over counted tokens, a share of "
            f"them), a record weighs more or less with the others that are there, and nothing shows it in the first batch. Use a "
            f"constant of at most {_DIGITS} digits, a whole number, a root of one, or one over such; or pass the loss as "
            f"criterion= to make_private, where it is taken apart and checked on values."
        )


def _is_written_by_hand(number: float) -> bool:
    """Whether it is a short decimal, a whole number, its root, or one over these two, times or over a constant with a name."""
    return any(_is_plain(abs(number) * named) or _is_plain(abs(number) / named) for named in _NAMED)


def _is_plain(size: float) -> bool:
    inverse = 1 / size if size else 0.0
    values = (size, inverse, size * size, inverse * inverse)
    return _is_short(size) or any(_same(value, round(value)) for value in values if 0.5 < value < 1e6)


def _is_short(number: float) -> bool:
    return _same(number, float(f"{number:.{_DIGITS - 1}e}"))


def _counts(inside: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """How many elements the masks in a loss have, and how many of them count."""
    for node in inside:
        name = node.name()
        if name.startswith("NllLoss"):
            target = node._saved_target
            yield target.numel(), int((target != _signed(node._saved_ignore_index)).sum())
        if name in ("MulBackward0", "WhereBackward0"):
            for attribute in ("_saved_self", "_saved_other", "_saved_condition"):
                mask = getattr(node, attribute, None)
                if isinstance(mask, Tensor) and not is_python_number(mask):
                    yield mask.numel(), int(mask.count_nonzero())


def _signed(index: int) -> int:
    """Negative numbers are handed out as if unsigned."""
    return index - 2**64 if index >= 2**63 else index


def _same(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=_RELATIVE)
