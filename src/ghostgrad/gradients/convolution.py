"""A convolution's weight: a matrix product with the windows of the input, unfolded only where that pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostgrad.gradients import cost
from ghostgrad.gradients.explicit import Explicit
from ghostgrad.gradients.matmul import Matmul
from ghostgrad.gradients.use import Use, rows_where, sq_norms_of, wide

_CHUNK_ELEMENTS = 1 << 24
"""The most elements of an unfolded chunk, or of per-sample gradients that are not kept: 64 MiB in float32."""


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

    @property
    def _fold(self) -> int:
        return len(self.x) // max(1, self._n)

    # ------------------------------------------------------------------ the input's windows

    def _fitted(self) -> Convolution:
        """The same use with as many windows in the input as there are outputs.

        More are there under a transposed convolution's output padding.
        """
        g, kernel, counts = self.geometry, self.shape[2:], self.dy.shape[2:]
        sizes = zip(self.x.shape[2:], g.padding, g.dilation, kernel, g.stride, strict=True)
        found = [(length + 2 * pad - gap * (size - 1) - 1) // step + 1 for length, pad, gap, size, step in sizes]
        if found == list(counts):
            return self
        x = self._padded()
        for dim, (count, step, gap, size) in enumerate(zip(counts, g.stride, g.dilation, kernel, strict=True), start=2):
            x = x.narrow(dim, 0, (count - 1) * step + gap * (size - 1) + 1)
        return Convolution(
            x, self.dy, self.shape, Geometry(g.stride, (0,) * len(kernel), g.dilation, g.groups), self._n
        )

    def _padded(self) -> Tensor:
        pads = [side for pad in reversed(self.geometry.padding) for side in (pad, pad)]
        return torch.nn.functional.pad(self.x, pads) if any(pads) else self.x

    def _windows(self) -> Tensor:
        """Every window of the input: [images, i, *kernel, *positions], a view of the padded input."""
        x, geometry, spatial = self._padded(), self.geometry, self.dy.dim() - 2
        for dim, (size, step, gap, count) in enumerate(
            zip(self.shape[2:], geometry.stride, geometry.dilation, self.dy.shape[2:], strict=True), start=2
        ):
            x = x.unfold(dim, (size - 1) * gap + 1, step)[..., ::gap].narrow(dim, 0, count)
        # Positions last: what is copied when the windows are laid out then comes in runs.
        return x.permute(0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))

    def as_matmul(self) -> Matmul:
        """The same use with the input unfolded."""
        groups, fold, n = self.geometry.groups, self._fold, self._n
        i, o = self.shape[1:].numel(), self.shape[0] // groups
        sides = (self._windows(), i), (self.dy, o)
        x, dy = (side.reshape(n, fold, groups, width, -1).permute(0, 2, 1, 4, 3).flatten(2, 3) for side, width in sides)
        return Matmul(x, dy, self.shape)

    # ------------------------------------------------------------------ answers

    def _chunks(self, elements: int) -> Sequence[Convolution]:
        """The same use in groups of records, each with at most so many elements for ``elements`` of each record."""
        step, fold = max(1, _CHUNK_ELEMENTS // max(1, elements)), self._fold
        if step >= self._n:
            return [self]
        parts = zip(torch.split(self.x, step * fold), torch.split(self.dy, step * fold), strict=True)
        return [Convolution(x, dy, self.shape, self.geometry, len(x) // fold) for x, dy in parts]

    @property
    def route(self) -> str:
        positions = self.dy.shape[2:].numel() * self._fold
        i, o = self.shape[1:].numel(), self.shape[0] // self.geometry.groups
        if positions == 1:
            return "outer product"
        cheaper = cost.gram(positions, i, o) + cost.windows(positions, i) < cost.per_sample(positions, i, o)
        return "gram" if cheaper else "materialise"

    def grad_samples(self) -> Tensor:
        if not self._n or not self._one_call():
            return self.as_matmul().grad_samples()
        return self._fitted()._by_groups()

    def _one_call(self) -> bool:
        """Whether the framework's own convolution works out many weights in one call faster than windows can be copied.

        oneDNN does, in single precision, except where a window is a single number.
        """
        windowed = self.shape[2:].numel() > 1
        return (
            windowed
            and self.x.device.type == "cpu"
            and self.x.dtype != torch.float64
            and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        )

    def _by_groups(self) -> Tensor:
        """The records as groups of one convolution, whose images are what is folded into each record."""
        x, dy = (
            wide(side).reshape(self._n, self._fold, *side.shape[1:]).transpose(0, 1).flatten(1, 2)
            for side in (self.x, self.dy)
        )
        shape = torch.Size([self._n * self.shape[0], *self.shape[1:]])
        return _weight_gradient(x, dy, shape, self.geometry, self._n).view(self._n, *self.shape)

    def sq_norms(self) -> Tensor:
        if self.route == "materialise":
            chunks = self._chunks(self.shape.numel())
            return torch.cat([sq_norms_of(chunk.grad_samples()) for chunk in chunks])
        window = self.shape[1:].numel() * self.dy.shape[2:].numel() * self.geometry.groups * self._fold
        return torch.cat([chunk.as_matmul().sq_norms() for chunk in self._chunks(window)])

    def weighted_sum(self, factors: Tensor) -> Tensor:
        fitted = self._fitted()
        scale = factors if self._fold == 1 else factors.repeat_interleave(self._fold)
        dy = wide(fitted.dy) * scale.view(-1, *[1] * (self.dy.dim() - 1))
        return _weight_gradient(wide(fitted.x), dy, self.shape, fitted.geometry)

    def only(self, records: Tensor) -> Convolution:
        images = (records.unsqueeze(1) * self._fold + torch.arange(self._fold, device=records.device)).flatten()
        return Convolution(self.x[images], self.dy[images], self.shape, self.geometry, len(records))

    def keep_rows(self, mask: Tensor) -> Convolution:
        images = mask.repeat_interleave(self._fold)
        x, dy = rows_where(images, self.x), rows_where(images, self.dy)
        return Convolution(x, dy, self.shape, self.geometry, self._n)

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.x, self.dy

    def compact(self, room: int) -> Use:
        """Keep per-sample gradients where there is room: the weighted sum then needs no convolution of its own."""
        positions = self.dy.shape[2:].numel() * self._fold
        i, o = self.shape[1:].numel(), self.shape[0] // self.geometry.groups
        norm = cost.gram(positions, i, o) + cost.windows(positions, i)
        pays = positions > 1 and cost.STORE * i * o < norm
        fits = self._n * self.shape.numel() - self.held <= room
        return Explicit(self.grad_samples()) if pays and fits else self


def _weight_gradient(x: Tensor, dy: Tensor, shape: torch.Size, geometry: Geometry, times: int = 1) -> Tensor:
    """The framework's own backward of a convolution, with its groups so many ``times``."""
    gradient: Tensor = torch.ops.aten.convolution_backward(
        dy, x, dy.new_empty(shape), None, geometry.stride, geometry.padding, geometry.dilation,
        False, [0] * len(geometry.stride), geometry.groups * times, [False, True, False],
    )[1]  # fmt: skip
    return gradient
