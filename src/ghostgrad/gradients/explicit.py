"""A use whose per-sample gradients are held as they are: biases, norm scales, and whatever has no cheaper form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghostgrad.gradients.use import Use, rows_where, wide


class Explicit(Use):
    """Per-sample gradients ``[n, *p]``, materialised."""

    def __init__(self, grads: Tensor) -> None:
        self._grads = wide(grads)
        self.shape = grads.shape[1:]

    @property
    def n(self) -> int:
        return self._grads.shape[0]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return (self._grads,)

    def grad_samples(self) -> Tensor:
        return self._grads

    def only(self, records: Tensor) -> Explicit:
        return Explicit(self._grads[records])

    def keep_rows(self, mask: Tensor) -> Explicit:
        return Explicit(rows_where(mask, self._grads))

    @property
    def kind(self) -> object:
        if type(self) is not Explicit:
            return None  # it may answer otherwise than its operands say
        return Explicit, self._grads.shape, self._grads.dtype, self._grads.device

    @classmethod
    def beside(cls, uses: Sequence[Explicit]) -> Explicit:
        return Explicit(torch.cat([use._grads for use in uses]))

    def weighted_sums(self, factors: Tensor) -> Tensor:
        grads = self._grads.reshape(*factors.shape, self.shape.numel())
        return (factors.to(grads.dtype).unsqueeze(1) @ grads).reshape(len(factors), *self.shape)

    @classmethod
    def concatenate(cls, uses: Sequence[Explicit]) -> Explicit:
        """Several uses of one weight as one: the gradients of a record add up."""
        return cls(torch.stack([use._grads for use in uses]).sum(0)) if len(uses) > 1 else uses[0]
