"""What a use of a weight can be asked. Index letters: n record, t position, i in, o out, p parameter shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the precision that norms and sums are taken in: float64 as it is, anything narrower as float32.

    A product of two bfloat16 numbers is exact in float32, and a sum of many stays a sum: in bfloat16 it stalls.
    """
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


class Use(ABC):
    """How one weight was used in one backward pass: all that is needed to know each record's gradient of it.

    Every form answers the three questions of clipping from `grad_samples`; a form overrides one where it knows a
    cheaper way to the same number. Answers are float32, or float64 for float64 operands.
    """

    shape: torch.Size
    """The shape of the weight, ``[*p]``."""

    @property
    @abstractmethod
    def n(self) -> int:
        """The number of records."""

    @abstractmethod
    def grad_samples(self) -> Tensor:
        """Each record's gradient, ``[n, *p]``."""

    @abstractmethod
    def keep_rows(self, mask: Tensor) -> Use:
        """This use with the records outside ``mask`` [n] replaced by zeros; not multiplied: 0 * inf is not 0."""

    @abstractmethod
    def only(self, records: Tensor) -> Use:
        """This use by the records with these indices [m] alone; n is then m."""

    terms: int = 1
    """How many terms each record's gradient is a sum of."""

    def reach(self) -> Tensor:
        """What each record's norm would be if none of its terms cancelled, [n]; never below the norm."""
        return self.sq_norms().sqrt()

    @property
    @abstractmethod
    def operands(self) -> tuple[Tensor, ...]:
        """The tensors this use keeps alive."""

    @property
    def held(self) -> int:
        """How many elements this use keeps alive."""
        return sum(tensor.numel() for tensor in self.operands)

    def sq_norms(self) -> Tensor:
        """Each record's squared gradient norm, [n]."""
        return sq_norms_of(self.grad_samples())

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """``sum_n factors[n] * grad_samples[n]``, ``[*p]``."""
        grads = self.grad_samples()
        return (factors.to(grads.dtype) @ grads.reshape(self.n, self.shape.numel())).reshape(self.shape)

    def compact(self, room: int) -> Use:
        """The form in which norm and weighted sum cost least together; the same numbers.

        Args:
            room: how many elements more than now it may keep alive; below 0 if it has to be so many fewer.
        """
        return self

    @property
    def kind(self) -> object:
        """Equal for uses that `beside` can join; None where it cannot."""
        return None

    @classmethod
    def beside(cls, uses: Sequence[Any]) -> Use:
        """k uses of one kind, by the same records, as one use by k times as many: those of the first weight, then of the next."""
        raise NotImplementedError

    def weighted_sums(self, factors: Tensor) -> Tensor:
        """Of uses that were joined so: `weighted_sum` of each with its own factors ``[k, n]``, ``[k, *p]``."""
        raise NotImplementedError

    @property
    def route(self) -> str:
        """How the norm of this use is found, in a word (for ``explain``)."""
        return "materialise"


_CANCELLED = 16
"""How far below its squared reach a squared norm may be, for each term, before round-off shows in it.

An expanded square (a Gram, a cross term) has an error of the order of ``eps * reach^2``: a record whose terms cancel would
get a norm that is too small, down to zero, and pass unclipped. Terms in random directions lose a factor ``terms``.
"""


def trusted(sq_norms: Tensor, reach: Tensor, terms: int, exact: Callable[[Tensor], Tensor]) -> Tensor:
    """Squared norms [n] from an expanded square, with ``exact(records)`` in place of those that cancellation spoiled.

    Args:
        reach: what the norms would be if nothing cancelled, [n].
        terms: how many terms a record's gradient is a sum of.
    """
    spoiled = sq_norms * (_CANCELLED * terms) < reach.square()
    if not bool(spoiled.any()):
        return sq_norms
    records = spoiled.nonzero().squeeze(1)
    return sq_norms.index_copy(0, records, exact(records))


_ROW = 4096
"""The longest row that is summed without intermediate sums: its round-off stays below that of its elements."""


def sq_rows(tensor: Tensor) -> Tensor:
    """The sum of squares over the last dimension, without writing the squares where rows are short."""
    if tensor.shape[-1] > _ROW:
        return tensor.square().sum(-1)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=-1)
    return norms.square()


def sq_norms_of(grads: Tensor) -> Tensor:
    """Squared norms [n] of per-sample gradients ``[n, *p]``."""
    if grads.dim() < 3:
        return sq_rows(grads.reshape(len(grads), grads.shape[1:].numel()))
    return sq_rows(grads.reshape(*grads.shape[:2], grads.shape[2:].numel())).sum(1)


def rows_where(mask: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` [n, ...] with the rows outside ``mask`` [n] set to zero."""
    return torch.where(mask.view(-1, *[1] * (tensor.dim() - 1)), tensor, torch.zeros((), dtype=tensor.dtype))
