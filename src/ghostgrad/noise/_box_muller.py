"""Uniform words to Gaussians (Box and Muller 1958), in pages, so that a value never depends on how a draw was cut.

A page is 1024 bytes of keystream and becomes as many Gaussians as it holds words (256 of float32, 128 of float64):
the first half of its words are radii, the second half angles. Pages are always computed whole; then no value falls
into the scalar remainder of a vectorised loop, whose last bit may differ. numpy does the arithmetic because its sine,
cosine and logarithm are twice as fast here as torch's, and it starts no threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ghostgrad.noise._keystream import PAGE_BYTES, SLACK_BYTES, Keystream

# The scratch of one chunk (words, radii, angles, values) stays in a core's second-level cache.
_CHUNK_PAGES = 128

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class _Precision:
    integer: str
    half_range: float  # a signed word lies in [-half_range, half_range)


_PRECISIONS = {np.dtype(np.float32): _Precision("<i4", 2.0**31), np.dtype(np.float64): _Precision("<i8", 2.0**63)}


class _Chunk:
    """Scratch for ``pages`` pages, and the transform on it."""

    def __init__(self, pages: int, dtype: np.dtype[Any]) -> None:
        half = PAGE_BYTES // dtype.itemsize // 2
        self._half_range = dtype.type(_PRECISIONS[dtype].half_range)
        self.pages = pages
        self.raw = np.empty(pages * PAGE_BYTES + SLACK_BYTES, dtype=np.uint8)
        words = self.raw[:-SLACK_BYTES].view(_PRECISIONS[dtype].integer).reshape(pages, 2, half)
        self._radius_words, self._angle_words = words[:, 0], words[:, 1]
        self._radius, self._angle = np.empty((2, pages, half), dtype=dtype)
        self.values: Floats = np.empty((pages, 2, half), dtype=dtype)

    def transform(self, std: float) -> None:
        """``values = std * sqrt(-2 ln u) * (cos, sin)(angle)``.

        ``u = max(|w|, 1/2) / half_range`` for a signed word ``w``: uniform on (0, 1] rounded to nearest, never 0, and
        resolved to the last bit of the word where the Gaussian's tails are made (a float keeps small words exactly).
        """
        radius, angle, dtype = self._radius, self._angle, self._radius.dtype
        np.copyto(radius, self._radius_words, casting="unsafe")
        np.abs(radius, out=radius)
        np.maximum(radius, dtype.type(0.5), out=radius)
        np.multiply(radius, 1 / self._half_range, out=radius)
        np.log(radius, out=radius)
        np.multiply(radius, dtype.type(-2), out=radius)
        np.sqrt(radius, out=radius)
        np.multiply(radius, dtype.type(std), out=radius)
        np.copyto(angle, self._angle_words, casting="unsafe")
        np.multiply(angle, dtype.type(np.pi) / self._half_range, out=angle)
        np.cos(angle, out=self.values[:, 0])
        np.sin(angle, out=self.values[:, 1])
        np.multiply(self.values, radius[:, None], out=self.values)


def gaussian_chunks(
    streams: list[Keystream], *, std: float, dtype: np.dtype[Any], start: int, count: int
) -> Iterator[tuple[int, Floats]]:
    """Yield ``(position, values)`` covering elements ``start .. start + count`` of an endless Gaussian vector of
    ``std``.

    ``position`` counts from 0; ``values`` is scratch, overwritten by the next chunk. With several streams each value
    is the sum of one Gaussian a stream, divided by the square root of their number.
    """
    per_page = PAGE_BYTES // dtype.itemsize
    first, end = start // per_page, -(-(start + count) // per_page)
    chunk = _Chunk(min(_CHUNK_PAGES, end - first), dtype)
    for page in range(first, end, chunk.pages):
        if end - page < chunk.pages:
            chunk = _Chunk(end - page, dtype)
        values = _sum_of_streams(chunk, streams, page, std).reshape(-1)
        left = max(start - page * per_page, 0)
        right = min(start + count - page * per_page, values.size)
        yield page * per_page + left - start, values[left:right]


def _sum_of_streams(chunk: _Chunk, streams: list[Keystream], page: int, std: float) -> Floats:
    share = std / len(streams) ** 0.5
    total: Floats | None = None
    for stream in streams:
        stream.fill(chunk.raw, page)
        chunk.transform(share)
        if len(streams) > 1:
            total = chunk.values.copy() if total is None else np.add(total, chunk.values, out=total)
    return chunk.values if total is None else total
