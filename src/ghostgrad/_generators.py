"""The global generators that a user's code may draw from besides torch's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def draws_put_back() -> Iterator[None]:
    """Leaves the generators of Python and numpy as they were; torch has `torch.random.fork_rng` for its own."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
