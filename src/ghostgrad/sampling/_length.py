"""How many physical pieces a pass will have."""

from __future__ import annotations

import numpy as np
from scipy.special import betainc

from ghostgrad.sampling._inspect import Servable


def pieces_of_own_batches(servable: Servable, limit: int) -> int:
    """Exact: full batches, and the shorter one that may come last."""
    full, rest = divmod(servable.num_records, servable.batch_size)
    pieces = full * -(-servable.batch_size // limit)
    return pieces if servable.drop_last else pieces + -(-rest // limit)


def pieces_of_poisson_batches(parts: int, num_records: int, rate: float, limit: int) -> int:
    """Expected number ``parts * E[max(1, ceil(B / limit))]``, rounded, for ``B`` ~ Binomial(num_records, rate).

    ``E[ceil(B / limit)]`` is the sum over ``j >= 0`` of ``P(B > j limit)``, and ``P(B > k) = I_rate(k + 1, n - k)``,
    the regularised incomplete beta function (Abramowitz and Stegun 1964, equation 26.5.24).
    """
    mean = num_records * rate
    # Beyond 12 standard deviations nothing is left to add.
    most = min(float(num_records), mean + 12 * (mean * (1 - rate)) ** 0.5 + 12)
    above = np.arange(0, most, limit)
    empty = (1 - rate) ** num_records
    return max(parts, round(float(parts * (betainc(above + 1, num_records - above, rate).sum() + empty))))
