"""Gaussian differential privacy: the central limit of many sampled steps, an approximation that can be too low."""

from __future__ import annotations

import math
from typing import ClassVar

from ghostgrad.accounting._checks import check_delta, check_epsilon, precision
from ghostgrad.accounting._closed_forms import gaussian_delta, gaussian_epsilon
from ghostgrad.accounting.base import Accountant, Bounds
from ghostgrad.accounting.events import FixedSizeSampled, Gaussian
from ghostgrad.accounting.rdp import readable_others
from ghostgrad.errors import ConfigurationError


class GaussianAccountant(Accountant):
    """Epsilon of the limiting Gaussian mechanism (Dong, Roth and Su 2022; Bu, Dong, Long and Su 2020, corollary 5.4).

    **Not a bound**: for sampled steps the limit can be below the truth, and often is; never report it as a guarantee.
    Exact for plain Gaussians. ``mu^2`` adds over phases: ``n q^2 (exp(1 / sigma^2) - 1)`` for n sampled steps.

    >>> accountant = GaussianAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    >>> round(accountant.mu, 3)
    0.415
    """

    mechanism: ClassVar[str] = "gdp"

    @property
    def mu(self) -> float:
        """The limiting Gaussian mechanism's sensitivity / sigma; infinite where there is no noise."""
        others, infinite = readable_others(self.ledger)
        square = 0.0
        for (rate, sigma), count in self.ledger.sampled_gaussians().items():
            if sigma < 0.0376:  # exp(1 / sigma^2) overflows
                return math.inf
            square += count * rate**2 * math.expm1(sigma**-2.0)
        for event, count in others.items():
            if not isinstance(event, Gaussian) or isinstance(event, FixedSizeSampled) or infinite > 0.0:
                raise ConfigurationError(
                    f'{event!r} has no central limit here; use accountant="pld" or "rdp" for this ledger.'
                )
            square += count * precision(event.sigma)
        return math.sqrt(square)

    def get_epsilon(self, delta: float) -> float:
        """Return the approximate epsilon at ``delta``; it can be below the truth."""
        delta, mu = check_delta(delta), self.mu
        return math.inf if math.isinf(mu) else gaussian_epsilon(mu, delta)

    def get_delta(self, epsilon: float) -> float:
        """Return the approximate delta at ``epsilon``; it can be below the truth."""
        epsilon, mu = check_epsilon(epsilon), self.mu
        return 1.0 if math.isinf(mu) else gaussian_delta(epsilon, mu)

    def get_bounds(self, delta: float) -> Bounds:
        """Return 0 and infinity: an approximation bounds nothing."""
        return Bounds(0.0, math.inf, check_delta(delta), self.neighbouring, "central limit (no bound)")
