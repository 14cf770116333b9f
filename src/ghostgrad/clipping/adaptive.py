"""Clipping to a tracked quantile of the norms, which pays for what it looks at."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ghostgrad.clipping.functions import ClipFunction, FlatClipping, check_bound
from ghostgrad.errors import ConfigurationError


class AdaptiveClipping(ClipFunction):
    """Move C to the ``target_unclipped_quantile`` of the norms (Andrew, Thakkar, McMahan and Ramaswamy 2021).

    After each logical step ``C <- C exp(-learning_rate (b - quantile))``, where b is the noisy share of records whose norm
    was at most C: ``b = 1/2 + (sum (1[norm <= C] - 1/2) + N(0, unclipped_num_std^2)) / expected_batch_size``. One record
    moves that sum by 1/2. Together with the gradients the step is one Gaussian mechanism of noise multiplier z when the
    gradients get ``z_g = (z^-2 - (2 unclipped_num_std)^-2)^(-1/2)`` (their theorem 1), so the step is accounted at the z that
    was asked for and the count is paid by a little more noise on the gradients. The divisor is the expected batch size: the
    realised one is private.

    Args:
        max_grad_norm: C of the first step.
        target_unclipped_quantile: in (0, 1). Default 0.5, the median.
        learning_rate: step of the geometric update. Default 0.2.
        unclipped_num_std: standard deviation of the count's noise, in records; None takes
            ``max(expected_batch_size / 20, noise_multiplier)``, the paper's choice where that is large enough.
        min_bound, max_bound: C stays within these. Defaults 1e-8 and 1e8.
    """

    name = "adaptive"
    bound: float

    def __init__(
        self,
        max_grad_norm: float,
        *,
        target_unclipped_quantile: float = 0.5,
        learning_rate: float = 0.2,
        unclipped_num_std: float | None = None,
        min_bound: float = 1e-8,
        max_bound: float = 1e8,
    ) -> None:
        if not 0 < target_unclipped_quantile < 1:
            raise ConfigurationError(f"target_unclipped_quantile={target_unclipped_quantile} must lie between 0 and 1.")
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ConfigurationError(f"learning_rate={learning_rate} must be positive and finite.")
        if not 0 < min_bound <= max_bound < math.inf:
            raise ConfigurationError(f"min_bound={min_bound} and max_bound={max_bound} must be positive and in order.")
        if unclipped_num_std is not None and not (math.isfinite(unclipped_num_std) and unclipped_num_std > 0):
            raise ConfigurationError(f"unclipped_num_std={unclipped_num_std} must be positive and finite.")
        self.rebound(max_grad_norm)
        self.quantile, self.learning_rate = target_unclipped_quantile, learning_rate
        self.unclipped_num_std = unclipped_num_std
        self.min_bound, self.max_bound = min_bound, max_bound

    def rebound(self, max_grad_norm: Any) -> None:
        self.bound = check_bound(max_grad_norm)

    def configure(self, *, expected_batch_size: float, noise_multiplier: float) -> None:
        """Settle the count's noise from the public size of a step.

        Raises:
            ConfigurationError: when the count's noise alone already spends the step's budget.
        """
        if self.unclipped_num_std is None:
            self.unclipped_num_std = max(expected_batch_size / 20, noise_multiplier)
        self.effective_noise_multiplier(noise_multiplier)

    @property
    def sensitivity(self) -> float:
        return self.bound

    def effective_noise_multiplier(self, noise_multiplier: float) -> float:
        if noise_multiplier == 0 or self.unclipped_num_std is None:
            return noise_multiplier
        rest = noise_multiplier**-2 - (2 * self.unclipped_num_std) ** -2
        if rest <= 0:
            raise ConfigurationError(
                f"unclipped_num_std={self.unclipped_num_std} is too small for noise_multiplier={noise_multiplier}: the count "
                f"alone would spend the step's budget. Take one above {noise_multiplier / 2:g}."
            )
        return float(rest**-0.5)

    def factors(self, sq_norms: Tensor) -> Tensor:
        return FlatClipping(self.bound).factors(sq_norms)

    def statistic(self, sq_norms: Tensor) -> float:
        unclipped = sq_norms.sum(1).sqrt() <= self.bound  # False for a norm that is not finite
        return float((unclipped.to(torch.float64) - 0.5).sum())

    def update(
        self, *, statistic: float, expected_batch_size: float, noise_multiplier: float, noise: Callable[[], float]
    ) -> None:
        std = self.unclipped_num_std if self.unclipped_num_std is not None and noise_multiplier else 0.0
        share = 0.5 + (statistic + std * noise()) / expected_batch_size
        moved = self.bound * math.exp(-self.learning_rate * (share - self.quantile))
        self.bound = min(max(moved, self.min_bound), self.max_bound)
