"""A convolution's weight: a matrix product with the windows of the input, unfolded only where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostgrad.gradients.explicit import Explicit
from ghostgrad.gradients.matmul import Matmul
from ghostgrad.gradients.use import Use, rows_where, wide

_CHUNK_ELEMENTS = 1 << 24
"""The most elements of an unfolded chunk: 64 MiB in float32."""


@dataclass(frozen=True)
class Geometry:
    """How a window walks: one number per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Convolution(Use):
    """The weight [o, i/groups, *kernel] of a convolution with zero padding.

    A transposed convolution is the adjoint of one: its weight's gradient is this with `x` and `dy` exchanged.

    Args:
        x: the input, [n * fold, i, *spatial]; `fold` images in a row belong to one record.
        dy: the gradient of the output, [n * fold, o, *positions].
        n: the number of records.
    """

    def __init__(self, x: Tensor, dy: Tensor, shape: torch.Size, geometry: Geometry, n: int) -> None:
        self.x, self.dy, self.shape, self.geometry, self._n = x, dy, shape, geometry, n

    @property
    def n(self) -> int:
        return self._n

    def _windows(self, x: Tensor) -> Tensor:
        """Every window of the input: [images, i, *positions, *kernel], a view of the padded input."""
        geometry = self.geometry
        pads = [side for pad in reversed(geometry.padding) for side in (pad, pad)]
        x = torch.nn.functional.pad(x, pads) if any(pads) else x
        kernel, positions = self.shape[2:], self.dy.shape[2:]
        for dim, (size, step, gap, count) in enumerate(
            zip(kernel, geometry.stride, geometry.dilation, positions, strict=True), start=2
        ):
            x = x.unfold(dim, (size - 1) * gap + 1, step)[..., ::gap].narrow(dim, 0, count)
        return x

    def _matmul_of(self, x: Tensor, dy: Tensor, n: int) -> Matmul:
        groups, spatial = self.geometry.groups, dy.dim() - 2
        fold = len(x) // n
        windows = self._windows(x)  # [(n f), (g c), *l, *k]
        windows = windows.reshape(n, fold, groups, -1, *windows.shape[2:])  # [n, f, g, c, *l, *k]
        positions = list(range(4, 4 + spatial))
        kernel = list(range(4 + spatial, 4 + 2 * spatial))
        x = windows.permute(0, 2, 1, *positions, 3, *kernel)  # [n, g, f, *l, c, *k]
        x = x.reshape(n, groups, -1, self.shape[1:].numel())
        dy = dy.reshape(n, fold, groups, dy.shape[1] // groups, -1)  # [n, f, g, o, l]
        dy = dy.permute(0, 2, 1, 4, 3).flatten(2, 3)
        return Matmul(x, dy, self.shape)

    def as_matmul(self) -> Matmul:
        """The same use with the input unfolded."""
        return self._matmul_of(self.x, self.dy, self.n)

    def _chunks(self) -> Sequence[Matmul]:
        """The same use in groups of records, each small enough to unfold."""
        fold = len(self.x) // self.n if self.n else 1
        window = self.shape[1:].numel() * self.dy.shape[2:].numel() * self.geometry.groups * fold
        step = max(1, min(_CHUNK_ELEMENTS // max(1, window), _CHUNK_ELEMENTS // max(1, self.shape.numel())))
        parts = zip(torch.split(self.x, step * fold), torch.split(self.dy, step * fold), strict=True)
        return [self._matmul_of(x, dy, len(x) // fold) for x, dy in parts]

    @property
    def route(self) -> str:
        positions = self.dy.shape[2:].numel() * (len(self.x) // max(1, self.n))
        i, o = self.shape[1:].numel(), self.shape[0] // self.geometry.groups
        return "gram" if positions * (i + o) < i * o else "materialise"

    def grad_samples(self) -> Tensor:
        return torch.cat([chunk.grad_samples() for chunk in self._chunks()])

    def sq_norms(self) -> Tensor:
        return torch.cat([chunk.sq_norms() for chunk in self._chunks()])

    def weighted_sum(self, factors: Tensor) -> Tensor:
        dy = wide(self.dy) * factors.repeat_interleave(len(self.dy) // self.n).view(-1, *[1] * (self.dy.dim() - 1))
        geometry, spatial = self.geometry, self.dy.dim() - 2
        if self._surplus():
            return self._matmul_of(self.x, dy, self.n).weighted_sum(torch.ones_like(factors))
        gradient: Tensor = torch.ops.aten.convolution_backward(
            dy, wide(self.x), dy.new_empty(self.shape), None, geometry.stride, geometry.padding, geometry.dilation,
            False, [0] * spatial, geometry.groups, [False, True, False],
        )[1]  # fmt: skip
        return gradient

    def _surplus(self) -> bool:
        """Whether the input holds more windows than there are outputs (a transposed convolution's output padding)."""
        sizes = zip(self.x.shape[2:], self.shape[2:], self.dy.shape[2:], strict=True)
        g = self.geometry
        return any(
            (length + 2 * pad - gap * (size - 1) - 1) // step + 1 != count
            for (length, size, count), step, pad, gap in zip(sizes, g.stride, g.padding, g.dilation, strict=True)
        )

    def only(self, records: Tensor) -> Convolution:
        fold = len(self.x) // self.n
        images = (records.unsqueeze(1) * fold + torch.arange(fold, device=records.device)).flatten()
        return Convolution(self.x[images], self.dy[images], self.shape, self.geometry, len(records))

    def keep_rows(self, mask: Tensor) -> Convolution:
        images = mask.repeat_interleave(len(self.x) // self.n)
        x, dy = rows_where(images, self.x), rows_where(images, self.dy)
        return Convolution(x, dy, self.shape, self.geometry, self.n)

    def compact(self) -> Use:
        """Keep the per-sample gradients instead where they are smaller than what they are made of."""
        held = (self.x.numel() + self.dy.numel()) // max(1, self.n)
        return Explicit(self.grad_samples()) if self.route == "materialise" and self.shape.numel() <= held else self
