"""What the records of a logical batch looked like to the clip function: exact for one's own eyes, or counted with noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostgrad.errors import ConfigurationError


@dataclass(frozen=True)
class Seen:
    """The norms [n] of some records over all parameters, in float64, and whether each was clipped, [n]. Private.

    A record is clipped where its factor is below 1 for any parameter; one that is not finite has norm infinity and is clipped.
    """

    norms: Tensor
    clipped: Tensor

    @classmethod
    def of(cls, sq_norms: Tensor, factors: Tensor) -> Seen:
        """From squared norms [n, b] before clipping and the factors [n, b] that came of them."""
        norms = sq_norms.sum(1).sqrt()
        return cls(torch.where(norms.isfinite(), norms, math.inf), (factors < 1).any(1))

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """All records of several parts of a logical batch."""
        nothing = torch.zeros(0, dtype=torch.float64)
        norms = torch.cat([nothing, *(part.norms for part in parts)])
        return cls(norms, torch.cat([nothing.bool(), *(part.clipped for part in parts)]))


class Measurement:
    """Noisy counts of each logical batch, paid for by a share of its privacy budget.

    Counted are the records that were clipped, and the records in each bin of the norm: ``bins`` are its edges, in units of
    the sensitivity, and records above the last one (or not finite) are in a bin of their own.

    Guarantee (add or remove one record; the same for blanking one): a record adds at most 1 to the count of clipped ones and
    1 to one bin, so the vector of counts moves by at most sqrt(2) in the L2 norm. With noise of standard deviation
    ``sqrt(2) z_c`` on every count it is a Gaussian mechanism of noise multiplier z_c. It is released together with the clipped
    sum of the *same* logical batch, and two Gaussian mechanisms on the same records are one of noise multiplier z with
    ``z^-2 = z_g^-2 + z_c^-2``. For a share s of the budget, z_c = z / sqrt(s), and the gradients get z_g = z / sqrt(1 - s):
    the step as a whole has the z that it is accounted with, whatever the sampling. The ledger has the step before
    anything of it is drawn, and nothing is paid twice. (Two entries in the ledger, one for the counts and one for the sum, would
    be wrong: the accounting of two entries assumes two independent draws.)

    Args:
        share: of the step's budget (of ``1 / z^2``), in (0, 1).
        bins: increasing edges > 0, in units of the sensitivity.

    Raises:
        ConfigurationError: outside of these.

    >>> Measurement(share=0.01).rest(1.0)
    1.005037815259212
    """

    def __init__(self, share: float, bins: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)) -> None:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise ConfigurationError(
                f"private_share={share!r} must lie between 0 and 1: the part of the budget to spend."
            )
        edges = list(bins)
        good = all(isinstance(edge, (int, float)) and math.isfinite(edge) for edge in edges)
        if not edges or not good or sorted(set(edges)) != edges or edges[0] <= 0:
            raise ConfigurationError(f"bins={edges!r} must be finite and increasing numbers above 0.")
        self.share, self.bins = float(share), tuple(float(edge) for edge in edges)
        self.counts: Tensor | None = None
        """The noisy counts of the last step, float64: clipped records, then the bins; None before the first."""
        self.scale = 1.0
        """The sensitivity that the bins of the last step were in units of."""
        self.expected_records = math.nan
        """How many records the last step had on average."""

    def rest(self, noise_multiplier: float) -> float:
        """The noise multiplier that is left for everything else in the step."""
        return noise_multiplier / math.sqrt(1.0 - self.share)

    def std(self, noise_multiplier: float) -> float:
        """The standard deviation of the noise on each count, in records."""
        return noise_multiplier * math.sqrt(2.0 / self.share)

    def count(self, seen: Seen, sensitivity: float) -> Tensor:
        """The exact counts, float64 [1 + bins + 1]. Private."""
        self.scale = sensitivity
        edges = torch.tensor(self.bins, dtype=torch.float64) * sensitivity
        bins = torch.bincount(torch.bucketize(seen.norms, edges), minlength=len(self.bins) + 1)
        return torch.cat([seen.clipped.sum().reshape(1), bins]).to(torch.float64)

    def release(self, counts: Tensor, *, expected_records: float) -> None:
        """Keep the counts of a step, which noise was added to."""
        self.counts, self.expected_records = counts, expected_records
