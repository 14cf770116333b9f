"""How many physical pieces a pass will have."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom

from ghostgrad.sampling._inspect import Servable


def pieces_of_own_batches(servable: Servable, limit: int) -> int:
    """Exact: full batches, and the shorter one that may come last."""
    full, rest = divmod(servable.num_records, servable.batch_size)
    pieces = full * -(-servable.batch_size // limit)
    return pieces if servable.drop_last else pieces + -(-rest // limit)


def pieces_of_poisson_batches(parts: int, num_records: int, rate: float, limit: int) -> int:
    """Expected: ``parts * E[max(1, ceil(B / limit))]`` for ``B`` ~ Binomial(num_records, rate), rounded."""
    size = binom(num_records, rate)
    # E[ceil(B / limit)] = sum over j >= 0 of P(B > j limit); beyond 12 standard deviations nothing is left to add.
    most = min(num_records, size.mean() + 12 * size.std() + 12)
    pieces = size.sf(np.arange(0, most, limit)).sum() + size.pmf(0)
    return max(parts, round(float(parts * pieces)))
