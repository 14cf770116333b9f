"""Poisson sampling: every record enters every logical batch with the same probability, independently of all others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ghostgrad.errors import ConfigurationError
from ghostgrad.keys import RunKey
from ghostgrad.keystream import keystream_type
from ghostgrad.sampling._indices import check_indices
from ghostgrad.sampling._uniform import Indices, Uniform


class PoissonBatchSampler(Sampler[list[int]]):
    """Index lists of Poisson batches, each a pure function of the key, the epoch and the step within it.

    The size of a logical batch is drawn from Binomial(n, ``sample_rate``) in float64 and that many of the n records are
    drawn without replacement; that is the law of n independent coins, at a cost proportional to the batch and not to n.
    With ``accumulation_steps=k`` the records of one draw are dealt to k parts, each record to a part drawn uniformly:
    the parts are disjoint, one step's sensitivity and amplification are those of the one draw.

    Formal guarantee: under adding or removing one record, a step on one logical batch is amplified by Poisson
    subsampling at rate ``sample_rate`` (Balle, Barthe and Gaboardi 2018, theorem 8; Abadi et al. 2016, section 3.1),
    as long as the key stays secret. The counts and the indices are secrets as well. Draws are made of AES-256 in counter mode
    where the package ``cryptography`` is installed (secure mode demands it), else of Philox4x64-10.

    Args:
        records: how many records there are (indices ``0 .. n-1``), or the indices that may be drawn, without repeats.
        sample_rate: probability of each record for one logical batch, in (0, 1].
        steps: logical batches per epoch, at least 1.
        key: source of all draws.
        accumulation_steps: parts k that one logical batch is dealt to. Default 1.

    Raises:
        ConfigurationError: an argument outside these ranges.

    Attributes:
        epoch: number of the next pass; set it to resume.
        first_step: logical batch that the next pass begins with, for a pass that was left in the middle; 0 after it.

    >>> sampler = PoissonBatchSampler(1000, sample_rate=0.01, steps=3, key=RunKey.from_seed(0))
    >>> len(sampler), len(list(sampler)), sampler.epoch
    (3, 3, 1)
    >>> sampler.draw(epoch=0, step=2) == sampler.draw(epoch=0, step=2)
    True
    """

    def __init__(
        self, records: int | Sequence[int], *, sample_rate: float, steps: int, key: RunKey, accumulation_steps: int = 1
    ) -> None:
        check_rate(sample_rate)
        check_count("steps", steps)
        check_count("accumulation_steps", accumulation_steps)
        check_indices(records, None)
        self._indices: Indices | None = None if isinstance(records, int) else np.asarray(records).astype(np.int64)
        self.num_records: int = records if isinstance(records, int) else len(records)
        check_count("records", self.num_records)
        self.sample_rate = float(sample_rate)
        self.steps = steps
        self.accumulation_steps = accumulation_steps
        self.epoch = 0
        self.first_step = 0
        self._key = key

    def __len__(self) -> int:
        return self.steps * self.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.begin()[1]

    def rekey(self, key: RunKey) -> None:
        """Draw from another key from the next draw on."""
        self._key = key

    def begin(self, skip: int = 0) -> tuple[int, Iterator[list[int]]]:
        """Take the next epoch's number; return it with that epoch's parts but for the first ``skip``, a multiple of k."""
        epoch, first = self.epoch, self.first_step + skip // self.accumulation_steps
        self.epoch, self.first_step = epoch + 1, 0
        return epoch, (part for step in range(first, self.steps) for part in self.draw(epoch=epoch, step=step))

    def first_record(self) -> int:
        """One index that may be drawn."""
        return 0 if self._indices is None else int(self._indices[0])

    def draw(self, *, epoch: int, step: int) -> list[list[int]]:
        """The ``accumulation_steps`` parts of one logical batch; any of them may be empty."""
        draws = Uniform(keystream_type(cryptographic=False)(self._key.derive("sampling", epoch, step)))
        count = draws.binomial(self.num_records, self.sample_rate)
        drawn = draws.subset(self.num_records, count)
        if self._indices is not None:
            drawn = self._indices[drawn]
        if self.accumulation_steps == 1:
            return [drawn.tolist()]
        part_of = draws.below(self.accumulation_steps, count)
        return [drawn[part_of == part].tolist() for part in range(self.accumulation_steps)]


def check_rate(sample_rate: float) -> None:
    """Raise ``ConfigurationError`` unless ``sample_rate`` is a probability above 0, of which ``1 / sample_rate`` is finite."""
    if isinstance(sample_rate, bool) or not 0 < sample_rate <= 1 or math.isinf(1 / sample_rate):
        raise ConfigurationError(
            f"sample_rate={sample_rate!r} is no probability; give expected batch size / number of records, in (0, 1]."
        )


def check_count(name: str, value: int) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1.")
