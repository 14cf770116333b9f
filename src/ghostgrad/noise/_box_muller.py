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


@dataclass(frozen=True)
class Draw:
    """A part of one endless Gaussian vector: what is added to ``target``.

    Attributes:
        streams: one, or several whose Gaussians are added and divided by the square root of their number.
        target: flat, contiguous, on the CPU.
        start: position of its first element in the vector.
    """

    streams: Sequence[Keystream]
    target: Tensor
    start: int = 0


@dataclass(frozen=True)
class _Piece:
    """So many pages of a draw, and which of their values are added to what."""

    streams: Sequence[Keystream]
    first_page: int
    pages: int
    left: int
    target: Tensor


def add_gaussians(draws: Iterable[Draw], *, std: float, dtype: torch.dtype) -> None:
    """Add Gaussians of ``std`` to the targets of ``draws``, all of one dtype and with as many streams.

    Small draws share the scratch memory: one call of the transform serves many of them.
    """
    scratch = _Scratch(dtype)
    waiting: list[_Piece] = []
    pages = 0
    for piece in (piece for draw in draws for piece in _pieces(draw, dtype)):
        if pages + piece.pages > _SCRATCH_PAGES:
            scratch.add(waiting, std)
            waiting, pages = [], 0
        waiting.append(piece)
        pages += piece.pages
    if waiting:
        scratch.add(waiting, std)


def _pieces(draw: Draw, dtype: torch.dtype) -> Iterator[_Piece]:
    per_page = PAGE_BYTES // dtype.itemsize
    end = draw.start + draw.target.numel()
    for first in range(draw.start // per_page, -(-end // per_page), _SCRATCH_PAGES):
        last = min(first + _SCRATCH_PAGES, -(-end // per_page))
        left, right = max(draw.start, first * per_page), min(end, last * per_page)
        target = draw.target[left - draw.start : right - draw.start]
        yield _Piece(draw.streams, first, last - first, left - first * per_page, target)


class _Scratch:
    """Memory for some pages, and the transform in it.

    It is numpy's: log, sin and cos of float32 take half of torch's time, and a value does not depend on where in an array it
    stands, as masked vectors have no scalar remainder.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        pages, half = _SCRATCH_PAGES, PAGE_BYTES // dtype.itemsize // 2
        self._precision = _PRECISIONS[dtype]
        floats = torch.empty(0, dtype=dtype).numpy().dtype
        self._raw = np.empty(pages * PAGE_BYTES + SLACK_BYTES, dtype=np.uint8)
        self._words = self._raw[:-SLACK_BYTES].view(self._precision.word).reshape(pages, 2, half)
        self._radius, self._angle, self._turned = (np.empty((pages, half), floats) for _ in range(3))
        self._values = np.empty((pages, 2, half), floats)

    def add(self, pieces: Sequence[_Piece], std: float) -> None:
        """Draw the pieces, which fit into the scratch, and add each to its target."""
        values = self._sum_of_streams(pieces, std).view(-1)
        at = 0
        for piece in pieces:
            start = at * PAGE_BYTES // values.element_size() + piece.left
            piece.target.add_(values[start : start + piece.target.numel()])
            at += piece.pages

    def _sum_of_streams(self, pieces: Sequence[_Piece], std: float) -> Tensor:
        terms = len(pieces[0].streams)
        pages = sum(piece.pages for piece in pieces)
        total: Tensor | None = None
        for lane in range(terms):
            at = 0
            for piece in pieces:
                stop = (at + piece.pages) * PAGE_BYTES + SLACK_BYTES
                piece.streams[lane].fill(self._raw[at * PAGE_BYTES : stop], piece.first_page)
                at += piece.pages
            values = self._transform(pages, std / terms**0.5)
            if terms > 1:
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
