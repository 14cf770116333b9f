"""Uniform words to Gaussians (Box and Muller 1958), in pages, so that a value never depends on how a draw was cut.

A page is 4096 bytes of keystream and becomes as many Gaussians as it holds words (1024 of float32, 512 of float64): the
first half of its words are radii, the second half angles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ghostgrad.keystream import PAGE_BYTES, SLACK_BYTES, Keystream

_SCRATCH_PAGES = 128
"""Pages that are transformed at once: enough to make what a call costs small, and few enough for a core's cache."""


@dataclass(frozen=True)
class _Precision:
    word: str
    half_range: float
    """A signed word lies in [-half_range, half_range)."""


_PRECISIONS = {torch.float32: _Precision("<i4", 2.0**31), torch.float64: _Precision("<i8", 2.0**63)}


@dataclass
class _Piece:
    """Targets that follow one another in the vector and fit into the scratch together."""

    start: int
    end: int
    targets: list[Tensor]


def add_gaussians(
    streams: Sequence[Keystream], parts: Iterable[tuple[int, Tensor]], *, std: float, dtype: torch.dtype
) -> None:
    """Add parts of one endless vector of Gaussians of ``std``.

    Parts that follow one another are drawn as one, and several share the scratch: a call of the transform serves many of them.

    Args:
        streams: one, or several whose Gaussians are added and divided by the square root of their number.
        parts: where in the vector a target begins, and the target: flat, contiguous, on the CPU, of ``dtype``.
    """
    scratch = _Scratch(dtype)
    waiting: list[_Piece] = []
    pages = 0
    for piece in _pieces(parts, scratch.per_page):
        more = len(scratch.pages_of(piece))
        if pages + more > _SCRATCH_PAGES:
            scratch.add(streams, waiting, std)
            waiting, pages = [], 0
        waiting.append(piece)
        pages += more
    if waiting:
        scratch.add(streams, waiting, std)


def _pieces(parts: Iterable[tuple[int, Tensor]], per_page: int) -> Iterator[_Piece]:
    longest = _SCRATCH_PAGES * per_page
    piece = None
    for start, target in _cut(parts, longest):
        if piece is None or start != piece.end or start % longest == 0:
            if piece is not None:
                yield piece
            piece = _Piece(start, start, [])
        piece.targets.append(target)
        piece.end += target.numel()
    if piece is not None:
        yield piece


def _cut(parts: Iterable[tuple[int, Tensor]], longest: int) -> Iterator[tuple[int, Tensor]]:
    """The parts, cut where the vector's blocks of the ``longest`` piece begin."""
    for start, target in parts:
        size, done = target.numel(), 0
        while done < size:
            now = min(size - done, longest - (start + done) % longest)
            yield start + done, target if now == size else target[done : done + now]
            done += now


class _Scratch:
    """Memory for some pages, and the transform in it.

    It is numpy's: log, sin and cos of float32 take half of torch's time, and a value does not depend on where in an array it
    stands, as masked vectors have no scalar remainder.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.per_page = PAGE_BYTES // dtype.itemsize
        pages, half = _SCRATCH_PAGES, self.per_page // 2
        self._precision = _PRECISIONS[dtype]
        floats = torch.empty(0, dtype=dtype).numpy().dtype
        self._raw = np.empty(pages * PAGE_BYTES + SLACK_BYTES, dtype=np.uint8)
        self._words = self._raw[:-SLACK_BYTES].view(self._precision.word).reshape(pages, 2, half)
        self._radius, self._angle, self._turned = (np.empty((pages, half), floats) for _ in range(3))
        self._values = np.empty((pages, 2, half), floats)

    def pages_of(self, piece: _Piece) -> range:
        """The pages of the vector that a piece lies in."""
        return range(piece.start // self.per_page, -(-piece.end // self.per_page))

    def add(self, streams: Sequence[Keystream], pieces: Sequence[_Piece], std: float) -> None:
        """Draw the pieces, which fit into the scratch, and add each to its targets."""
        values = self._sum_of_streams(streams, pieces, std).view(-1)
        at = 0
        for piece in pieces:
            pages = self.pages_of(piece)
            left = at * self.per_page + piece.start - pages.start * self.per_page
            drawn = values[left : left + piece.end - piece.start]
            torch._foreach_add_(piece.targets, torch.split(drawn, [target.numel() for target in piece.targets]))
            at += len(pages)

    def _sum_of_streams(self, streams: Sequence[Keystream], pieces: Sequence[_Piece], std: float) -> Tensor:
        total: Tensor | None = None
        for stream in streams:
            at = 0
            for pages in map(self.pages_of, pieces):
                stop = (at + len(pages)) * PAGE_BYTES + SLACK_BYTES
                stream.fill(self._raw[at * PAGE_BYTES : stop], pages.start)
                at += len(pages)
            values = self._transform(at, std / len(streams) ** 0.5)
            if len(streams) > 1:
                total = values.clone() if total is None else total.add_(values)
        return values if total is None else total

    def _transform(self, pages: int, std: float) -> Tensor:
        """``std * sqrt(-2 ln |u|) * (cos, sin)(angle)``, with ``u`` a signed word scaled to [-1, 1).

        ``|u|`` is uniform on (0, 1] rounded to nearest, never 0, and resolved to the last bit of the word where the
        Gaussian's tails are made (a float keeps small words exactly).
        """
        words, values, scale = self._words[:pages], self._values[:pages], 1 / self._precision.half_range
        radius, angle, turned = self._radius[:pages], self._angle[:pages], self._turned[:pages]
        radius[...] = words[:, 0]
        radius *= scale
        # -2 ln |u| = -ln u^2, whose square root is taken last; std comes after it, as its square may leave the range of floats.
        np.multiply(radius, radius, out=radius)
        np.maximum(radius, (scale / 2) ** 2, out=radius)
        np.negative(np.log(radius, out=radius), out=radius)
        np.sqrt(radius, out=radius)
        with np.errstate(over="ignore", under="ignore"):
            radius *= std
            angle[...] = words[:, 1]
            angle *= math.pi * scale
            np.multiply(np.cos(angle, out=turned), radius, out=values[:, 0])
            np.multiply(np.sin(angle, out=turned), radius, out=values[:, 1])
        return torch.from_numpy(values)
