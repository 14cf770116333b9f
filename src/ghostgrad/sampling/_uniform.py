"""Draws for sampling, made of uniform 64-bit words of a keystream: the words are the only source of chance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

from ghostgrad.keystream import PAGE_BYTES, SLACK_BYTES, Keystream

Words = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

_WORDS_A_PAGE = PAGE_BYTES // 8


class Uniform:
    """Reads a keystream from its first page on; every call begins with a fresh page.

    >>> from ghostgrad.keys import RunKey
    >>> from ghostgrad.keystream import keystream_type
    >>> draws = Uniform(keystream_type(cryptographic=False)(RunKey.from_seed(0).derive("sampling", 0, 0)))
    >>> 0 <= draws.binomial(10, 0.5) <= 10, sorted(draws.subset(5, 5).tolist())
    (True, [0, 1, 2, 3, 4])
    """

    def __init__(self, stream: Keystream) -> None:
        self._stream, self._page = stream, 0

    def words(self, count: int) -> Words:
        """Uniform 64-bit words."""
        pages = -(-count // _WORDS_A_PAGE)
        raw = np.empty(pages * PAGE_BYTES + SLACK_BYTES, dtype=np.uint8)
        self._stream.fill(raw, self._page)
        self._page += pages
        return raw[:-SLACK_BYTES].view("<u8")[:count].astype(np.uint64, copy=False)

    def binomial(self, n: int, rate: float) -> int:
        """Successes in n coin flips, by inversion; the probabilities are resolved to 2^-52."""
        position = (float(self.words(1)[0] >> np.uint64(12)) + 0.5) * 2.0**-52  # within (0, 1), ends excluded
        return int(stats.binom.ppf(position, n, rate))

    def below(self, bound: int, count: int) -> Indices:
        """Independent whole numbers from 0 to ``bound - 1``, exactly uniform: words that would favour some are drawn again."""
        top = np.uint64(2**64 // bound * bound - 1)
        found = self.words(count)
        while bool((found > top).any()):
            found = np.concatenate([found[found <= top], self.words(int((found > top).sum()))])
        numbers: Indices = (found % np.uint64(bound)).astype(np.int64)
        return numbers

    def subset(self, n: int, size: int) -> Indices:
        """``size`` different whole numbers from 0 to ``n - 1``, every such set equally likely, at a cost like ``size``."""
        if size > n // 2:  # few are left out, or n is not much more than size
            kept = np.ones(n, dtype=bool)
            kept[self.subset(n, n - size)] = False
            return np.flatnonzero(kept)
        found: Indices = np.empty(0, dtype=np.int64)
        while found.size < size:
            # Numbers that came before are passed over; what is asked for covers the expected repeats.
            more = self.below(n, size - found.size)
            both = np.concatenate([found, more])
            _, first = np.unique(both, return_index=True)
            found = both[np.sort(first)]
        return found
