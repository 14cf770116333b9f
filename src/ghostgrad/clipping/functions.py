"""From per-sample norms to clip factors, and the sensitivity that results.

A clip function is handed squared norms with one column for each parameter, [n, b], and returns factors that broadcast to
the same shape. With factors f, the sum of ``f[n, b] * grad[n, b]`` over the parameters b of one record has norm at most
`sensitivity`, so leaving the record out moves the sum by no more: neighbouring means add or remove one record.

Edge cases, the same in every function:

=============================  ==========================================================
a record's norm is 0           factor at most its usual bound; the contribution is 0 anyway
a norm is infinite or NaN      factor 0: the step equals the step without the record
no records (n = 0)             an empty sum
=============================  ==========================================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ghostgrad.errors import ConfigurationError, as_float


class ClipFunction(ABC):
    """Turns norms into factors. Fixed within a logical batch; `update` may move it between two."""

    name: str
    bound: float | list[float]
    """``max_grad_norm`` as it was given: a number, or one for each parameter."""

    @abstractmethod
    def rebound(self, max_grad_norm: Any) -> None:
        """Take another ``max_grad_norm``; only between logical batches."""

    @property
    @abstractmethod
    def sensitivity(self) -> float:
        """The most that one record can move the noise-free sum, in the L2 norm."""

    @abstractmethod
    def factors(self, sq_norms: Tensor) -> Tensor:
        """Factors [n, b] or [n, 1] from squared norms [n, b] in float64."""

    def check(self, parameters: int) -> None:  # noqa: B027 (most functions take any number)
        """Refuse a number of parameters that the function was not made for."""

    def effective_noise_multiplier(self, noise_multiplier: float) -> float:
        """The noise multiplier of the sum when the step as a whole is to have ``noise_multiplier``."""
        return noise_multiplier

    def statistic(self, sq_norms: Tensor) -> float:
        """What the function wants summed over the records of a logical batch, from norms [n, b] before clipping."""
        return 0.0

    def update(  # noqa: B027 (most functions stay as they are)
        self, *, statistic: float, expected_batch_size: float, noise_multiplier: float, noise: Callable[[], float]
    ) -> None:
        """The logical step is over; ``noise()`` is one standard Gaussian for what the function itself releases."""


def _finite_total(sq_norms: Tensor) -> tuple[Tensor, Tensor]:
    """Norm over all parameters [n, 1], and where it is finite; the norm is 0 elsewhere."""
    total = sq_norms.sum(1, keepdim=True).sqrt()
    finite = total.isfinite()
    return torch.where(finite, total, 0.0), finite


class FlatClipping(ClipFunction):
    """One bound C for the whole gradient: factor ``min(1, C / norm)`` (Abadi et al. 2016, algorithm 1).

    >>> FlatClipping(1.0).factors(torch.tensor([[9.0, 16.0], [0.0, 0.25]], dtype=torch.float64))
    tensor([[0.2000],
            [1.0000]], dtype=torch.float64)
    """

    name = "flat"
    bound: float

    def __init__(self, max_grad_norm: float) -> None:
        self.rebound(max_grad_norm)

    def rebound(self, max_grad_norm: Any) -> None:
        self.bound = check_bound(max_grad_norm)

    @property
    def sensitivity(self) -> float:
        return self.bound

    def factors(self, sq_norms: Tensor) -> Tensor:
        norms, finite = _finite_total(sq_norms)
        return torch.where(finite, _clip(norms, self.bound), 0.0)


class PerLayerClipping(ClipFunction):
    """A bound for each parameter: sensitivity ``sqrt(sum C_b^2)`` (McMahan et al. 2018, section 3).

    A record with any non-finite gradient contributes nothing at all.
    """

    name = "per_layer"
    bound: list[float]

    def __init__(self, max_grad_norm: Sequence[float]) -> None:
        self.rebound(max_grad_norm)

    def rebound(self, max_grad_norm: Any) -> None:
        bounds = [max_grad_norm] * len(self.bound) if isinstance(max_grad_norm, (int, float)) else max_grad_norm
        self.bound = [check_bound(bound) for bound in bounds]

    @property
    def sensitivity(self) -> float:
        return math.sqrt(math.fsum(bound * bound for bound in self.bound))

    def check(self, parameters: int) -> None:
        if parameters != len(self.bound):
            raise ConfigurationError(
                f"max_grad_norm has {len(self.bound)} bounds for {parameters} trainable parameters; per_layer "
                f"clipping needs one for each, in the optimizer's order, or a single number for all of them."
            )

    def factors(self, sq_norms: Tensor) -> Tensor:
        _, finite = _finite_total(sq_norms)
        norms = torch.where(finite, sq_norms, 0.0).sqrt()
        bounds = torch.tensor(self.bound, dtype=norms.dtype, device=norms.device)
        return torch.where(finite, _clip(norms, bounds), 0.0)


class AutomaticClipping(ClipFunction):
    """Normalise every gradient: factor ``C / (norm + gamma)`` (Bu et al. 2023, "Automatic Clipping", equation 4.1).

    Args:
        max_grad_norm: C, the sensitivity; with an adaptive optimizer it merely scales.
        gamma: stability constant > 0, in the units of the norm. Default 0.01, as in the paper.
    """

    name = "automatic"
    bound: float

    def __init__(self, max_grad_norm: float, *, gamma: float = 0.01) -> None:
        self.rebound(max_grad_norm)
        if not (math.isfinite(gamma) and gamma > 0):
            raise ConfigurationError(f"gamma={gamma} must be positive and finite: it keeps C / (norm + gamma) bounded.")
        self.gamma = gamma

    def rebound(self, max_grad_norm: Any) -> None:
        self.bound = check_bound(max_grad_norm)

    @property
    def sensitivity(self) -> float:
        return self.bound

    def factors(self, sq_norms: Tensor) -> Tensor:
        norms, finite = _finite_total(sq_norms)
        return torch.where(finite, self.bound / (norms + self.gamma), 0.0)


def _clip(norms: Tensor, bound: float | Tensor) -> Tensor:
    """``min(1, bound / norm)`` without dividing by zero."""
    limit = torch.as_tensor(bound, dtype=norms.dtype, device=norms.device)
    return torch.where(norms > limit, limit / torch.maximum(norms, limit), 1.0)


def check_bound(max_grad_norm: float) -> float:
    """A clip bound as a float.

    Raises:
        ConfigurationError: unless it is positive and finite.
    """
    if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, (int, float)):
        raise ConfigurationError(f"max_grad_norm={max_grad_norm!r} must be a number.")
    if not 0 < as_float(max_grad_norm) < math.inf:
        raise ConfigurationError(
            f"max_grad_norm={max_grad_norm} must be positive and finite: it bounds what one record can change, and the noise "
            f"is scaled to it."
        )
    return float(max_grad_norm)
