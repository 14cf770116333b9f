"""What every noise mechanism offers, and the checks that all of them share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ghostgrad.errors import ConfigurationError


class NoiseMechanism(Protocol):
    """Adds noise of a given standard deviation to what is about to be released, in place.

    >>> from ghostgrad.keys import RunKey
    >>> from ghostgrad.noise import KeyedGaussian
    >>> mechanism: NoiseMechanism = KeyedGaussian(RunKey.from_seed(0))
    >>> mechanism.add_(torch.zeros(3), std=1.0, step=0, index=0)
    """

    name: str

    def add_(self, tensor: torch.Tensor, *, std: float, step: int, index: int, offset: int = 0) -> None:
        """Add ``N(0, std^2)`` to every element of ``tensor``."""

    def add_all_(self, parts: Sequence[tuple[int, torch.Tensor]], *, std: float, step: int) -> None:
        """The same for many parts of one vector (index 0): ``(offset, tensor)`` of each."""

    def follow(self, facts: str) -> None:
        """Bind the noise from now on to public facts: where they differ from those of another run, so does its noise."""

    def state_dict(self) -> dict[str, Any]:
        """What the next draws depend on besides the key and their addresses, as plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


def check_request(parts: Sequence[tuple[int, torch.Tensor]], *, std: float, step: int, index: int = 0) -> None:
    """Raise ``ConfigurationError`` for what no mechanism can draw."""
    if not math.isfinite(std) or std < 0:
        raise ConfigurationError(
            f"std={std!r} is no standard deviation; give a finite number >= 0 (noise_multiplier x sensitivity)."
        )
    offset = min((offset for offset, _ in parts), default=0)
    for name, value in (("step", step), ("index", index), ("offset", offset)):
        if value < 0:
            raise ConfigurationError(f"{name}={value} is no address of a draw; count from 0.")
    for dtype in {tensor.dtype for _, tensor in parts} - {torch.float32, torch.float64}:
        raise ConfigurationError(
            f"noise for a tensor of dtype={dtype} would be rounded to that precision; add it to a float32 or "
            "float64 sum and convert afterwards."
        )
