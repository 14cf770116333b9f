"""A weight that acts as a matrix product: its gradient is a sum of outer products over positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghostgrad.gradients import cost
from ghostgrad.gradients.explicit import Explicit
from ghostgrad.gradients.use import Use, rows_where, sq_norms_of, sq_rows, trusted, wide

_CHUNK_ELEMENTS = 1 << 20
"""The most elements of a temporary: 4 MiB in float32, which stay in a processor's cache until they are summed."""

_GRAM_BLOCK = 64
"""The most rows of a Gram that are worked out at once. Smaller blocks leave out more of the half that symmetry gives, but are
slower to multiply."""


class Matmul(Use):
    """``grad[n, g, o, i] = sum_t dy[n, g, t, o] x[n, g, t, i]``, read as the weight's shape.

    Args:
        x: what the weight multiplied, [n, g, t, i]; g counts blocks of the weight that do not meet (grouped convolution).
        dy: the gradient of what came out, [n, g, t, o].
        shape: the weight's shape; must hold g * o * i elements in the order [g, o, i].
    """

    def __init__(self, x: Tensor, dy: Tensor, shape: torch.Size) -> None:
        self.x, self.dy, self.shape = x, dy, shape
        self.terms = x.shape[2]

    @property
    def n(self) -> int:
        return self.x.shape[0]

    def grad_samples(self) -> Tensor:
        grads = wide(self.dy).transpose(-1, -2) @ wide(self.x)
        return grads.reshape(self.n, *self.shape)

    def only(self, records: Tensor) -> Matmul:
        return Matmul(self.x[records], self.dy[records], self.shape)

    def reach(self) -> Tensor:
        x, dy = (torch.linalg.vector_norm(wide(side), dim=-1) for side in (self.x, self.dy))
        reach: Tensor = torch.linalg.vector_norm((x * dy).sum(2), dim=1)
        return reach

    def keep_rows(self, mask: Tensor) -> Matmul:
        return Matmul(rows_where(mask, self.x), rows_where(mask, self.dy), self.shape)

    @property
    def route(self) -> str:
        _, _, t, i = self.x.shape
        o = self.dy.shape[-1]
        if t == 1:
            return "outer product"
        return "gram" if cost.gram(t, i, o) < cost.per_sample(t, i, o) else "materialise"

    def sq_norms(self) -> Tensor:
        if self.route == "outer product":
            # A rank-one gradient: |dy x^T|^2 = |dy|^2 |x|^2.
            return (sq_rows(wide(self.x)) * sq_rows(wide(self.dy))).sum((1, 2))
        if self.route != "gram":
            return self._chunked_norms()
        sq_norms, reach = self._gram_norms()
        return trusted(sq_norms, reach, self.terms, lambda records: self.only(records)._chunked_norms())

    def _gram_norms(self) -> tuple[Tensor, Tensor]:
        """``|sum_t dy_t x_t^T|^2 = sum_ts (x_t . x_s)(dy_t . dy_s)``, one block of rows t at a time; and the reach.

        Both Grams are symmetric, so a block meets itself once and every later block twice.
        """
        x, dy, t = wide(self.x), wide(self.dy), self.x.shape[2]
        block = max(1, min(t, _GRAM_BLOCK, _CHUNK_ELEMENTS // max(1, self.n * self.x.shape[1] * t)))
        total, reach = x.new_zeros(self.n), x.new_zeros(x.shape[:2])
        for start in range(0, t, block):
            width = min(block, t - start)
            product = x[:, :, start : start + width] @ x[:, :, start:].mT
            product *= dy[:, :, start : start + width] @ dy[:, :, start:].mT
            itself = product[..., :width]
            total += 2 * product.sum((1, 2, 3)) - itself.sum((1, 2, 3))
            reach += itself.diagonal(dim1=-2, dim2=-1).sqrt().sum(-1)
        # A tiny negative from round-off becomes 0; NaN stays NaN.
        return total.clamp_(min=0), torch.linalg.vector_norm(reach, dim=1)

    def _chunked_norms(self) -> Tensor:
        step = max(1, _CHUNK_ELEMENTS // max(1, self.shape.numel()))
        parts = zip(torch.split(self.x, step), torch.split(self.dy, step), strict=True)
        return torch.cat([sq_norms_of(Matmul(x, dy, self.shape).grad_samples()) for x, dy in parts])

    def weighted_sum(self, factors: Tensor) -> Tensor:
        x, dy = wide(self.x), wide(self.dy)
        scale = factors.to(x.dtype).view(-1, 1, 1, 1)
        if x.shape[-1] < dy.shape[-1]:
            x = x * scale
        else:
            dy = dy * scale
        # [n, g, t, .] -> [g, n t, .]: one matrix product sums over records and positions.
        x, dy = (side.transpose(0, 1).flatten(1, 2) for side in (x, dy))
        return (dy.mT @ x).reshape(self.shape)

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.x, self.dy

    def compact(self, room: int) -> Use:
        """Keep per-sample gradients where there is room: the weighted sum then needs no matrix product of its own."""
        _, _, t, i = self.x.shape
        o = self.dy.shape[-1]
        if t == 1 or cost.STORE * i * o >= cost.gram(t, i, o):
            return self
        fits = self.n * self.shape.numel() - self.held <= room
        return Explicit(self.grad_samples()) if fits else self

    @property
    def kind(self) -> object:
        if type(self) is not Matmul:
            return None  # it may answer otherwise than its operands say
        x, dy = self.x, self.dy
        return Matmul, x.shape, dy.shape, x.dtype, dy.dtype, x.device, self.shape

    @classmethod
    def beside(cls, uses: Sequence[Matmul]) -> Matmul:
        return Matmul(torch.cat([use.x for use in uses]), torch.cat([use.dy for use in uses]), uses[0].shape)

    def weighted_sums(self, factors: Tensor) -> Tensor:
        x, dy = wide(self.x), wide(self.dy)
        dy = dy * factors.to(x.dtype).reshape(-1, 1, 1, 1)
        # [k n, g, t, .] -> [k, g, n t, .]: one matrix product for each weight, which sums over records and positions.
        x, dy = (side.reshape(*factors.shape, *side.shape[1:]).transpose(1, 2).flatten(2, 3) for side in (x, dy))
        return (dy.mT @ x).reshape(len(factors), *self.shape)

    @classmethod
    def concatenate(cls, uses: Sequence[Matmul]) -> Matmul:
        """Several uses of one weight as one, along t: the norm then holds the cross terms."""
        if len(uses) == 1:
            return uses[0]
        x, dy = (torch.cat([wide(getattr(use, side)) for use in uses], dim=2) for side in ("x", "dy"))
        return cls(x, dy, uses[0].shape)
