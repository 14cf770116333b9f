"""Several uses of one weight, made into one: a record's gradients add up *before* they are measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ghostgrad.gradients.convolution import Convolution
from ghostgrad.gradients.explicit import Explicit
from ghostgrad.gradients.lookup import Lookup
from ghostgrad.gradients.matmul import Matmul
from ghostgrad.gradients.use import Use, sq_norms_of, trusted, wide


def join(uses: Sequence[Use]) -> Use:
    """One use that stands for all of them; cross terms included."""
    if len(uses) == 1:
        return uses[0]
    uses = [use.as_matmul() if isinstance(use, Convolution) else use for use in uses]
    flat = [part for use in uses for part in (use.parts if isinstance(use, Joined) else [use])]
    parts: list[Use] = []
    matmuls = [use for use in flat if isinstance(use, Matmul)]
    # An attention that is called over itself and over something else splits its weight into blocks in two ways.
    parts.extend(
        Matmul.concatenate([use for use in matmuls if use.x.shape[1] == blocks])
        for blocks in sorted({use.x.shape[1] for use in matmuls})
    )
    if lookups := [use for use in flat if isinstance(use, Lookup)]:
        parts.append(Lookup.concatenate(lookups))
    if explicits := [use for use in flat if isinstance(use, Explicit)]:
        parts.append(Explicit.concatenate(explicits))
    return parts[0] if len(parts) == 1 else Joined(parts)


class Joined(Use):
    """Uses of one weight in different forms (a tied embedding and head): ``|a + b|^2 = |a|^2 + 2 a.b + |b|^2``."""

    def __init__(self, parts: Sequence[Use]) -> None:
        self.parts = list(parts)
        self.shape = parts[0].shape
        self.terms = sum(part.terms for part in parts)

    @property
    def n(self) -> int:
        return self.parts[0].n

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.operands)

    @property
    def route(self) -> str:
        return " + ".join(part.route for part in self.parts)

    def grad_samples(self) -> Tensor:
        return torch.stack([part.grad_samples() for part in self.parts]).sum(0)

    def sq_norms(self) -> Tensor:
        own = torch.stack([part.sq_norms() for part in self.parts]).sum(0)
        cross = torch.stack([_inner(a, b) for a, b in combinations(self.parts, 2)]).sum(0)
        return trusted((own + 2 * cross).clamp_(min=0), self.reach(), self.terms, self._exact_norms)

    def _exact_norms(self, records: Tensor) -> Tensor:
        return torch.cat([sq_norms_of(self.only(one).grad_samples()) for one in torch.split(records, 1)])

    def only(self, records: Tensor) -> Joined:
        return Joined([part.only(records) for part in self.parts])

    def reach(self) -> Tensor:
        return torch.stack([part.reach() for part in self.parts]).sum(0)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return torch.stack([part.weighted_sum(factors) for part in self.parts]).sum(0)

    def keep_rows(self, mask: Tensor) -> Joined:
        return Joined([part.keep_rows(mask) for part in self.parts])


def _inner(a: Use, b: Use) -> Tensor:
    """Each record's inner product of two gradients of one weight, [n]."""
    if isinstance(a, Matmul) and isinstance(b, Lookup) and a.x.shape[1] == 1:
        # <sum_s dy_s x_s^T, sum_t onehot(id_t) e_t^T> = sum_st dy_s[id_t] (x_s . e_t): a gather, no one-hots.
        x, dy = wide(a.x[:, 0]), wide(a.dy[:, 0])
        picked = dy.gather(2, b.ids.long().unsqueeze(1).expand(-1, dy.shape[1], -1))
        return (picked * (x @ wide(b.dy).mT)).sum((1, 2))
    return (a.grad_samples() * b.grad_samples()).flatten(1).sum(1)
