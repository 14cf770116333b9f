"""A weight whose rows were looked up by id. The one-hot factor is never built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghostgrad.gradients.use import Use, rows_where, wide


class Lookup(Use):
    """``grad[n, id, :] = sum over t with ids[n, t] == id of dy[n, t, :]``.

    Args:
        ids: the rows looked up, [n, t], integers.
        dy: the gradient of what was looked up, [n, t, o]; zero where a row is not to learn (``padding_idx``).
        shape: the weight's shape [rows, o].
    """

    def __init__(self, ids: Tensor, dy: Tensor, shape: torch.Size) -> None:
        self.ids, self.dy, self.shape = ids, dy, shape
        self.terms = ids.shape[1]

    @property
    def n(self) -> int:
        return self.ids.shape[0]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.ids, self.dy

    @property
    def route(self) -> str:
        return "grouped ids"

    def grad_samples(self) -> Tensor:
        dy = wide(self.dy)
        grads = dy.new_zeros(self.n * self.shape[0], self.shape[1])
        grads.index_add_(0, self._record_ids().flatten(), dy.flatten(0, 1))
        return grads.reshape(self.n, *self.shape)

    def _record_ids(self) -> Tensor:
        """Ids that differ between records, [n, t]: record * rows + id."""
        return self.ids.long() + torch.arange(self.n, device=self.ids.device).unsqueeze(1) * self.shape[0]

    def sq_norms(self) -> Tensor:
        """Add up what meets in one (record, id), then square: near-linear in t, flat in the number of rows."""
        dy = wide(self.dy)
        met, place = torch.unique(self._record_ids(), return_inverse=True)
        sums = dy.new_zeros(len(met), dy.shape[-1]).index_add_(0, place.flatten(), dy.flatten(0, 1))
        return dy.new_zeros(self.n).index_add_(0, met // self.shape[0], sums.square().sum(1))

    def weighted_sum(self, factors: Tensor) -> Tensor:
        dy = wide(self.dy) * factors.view(-1, 1, 1)
        return dy.new_zeros(self.shape).index_add_(0, self.ids.flatten().long(), dy.flatten(0, 1))

    def only(self, records: Tensor) -> Lookup:
        return Lookup(self.ids[records], self.dy[records], self.shape)

    def reach(self) -> Tensor:
        reach: Tensor = torch.linalg.vector_norm(wide(self.dy), dim=-1).sum(1)
        return reach

    def keep_rows(self, mask: Tensor) -> Lookup:
        return Lookup(self.ids, rows_where(mask, self.dy), self.shape)

    @classmethod
    def concatenate(cls, uses: Sequence[Lookup]) -> Lookup:
        """Several uses of one weight as one, along t."""
        if len(uses) == 1:
            return uses[0]
        return cls(torch.cat([u.ids for u in uses], 1), torch.cat([wide(u.dy) for u in uses], 1), uses[0].shape)
