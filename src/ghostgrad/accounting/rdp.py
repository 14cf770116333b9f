"""Renyi accountant: fast for any ledger, never below the truth, a few per cent above it."""

from __future__ import annotations

import math
import warnings
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ghostgrad.accounting._checks import check_delta, check_epsilon
from ghostgrad.accounting._curves import (
    MORE_ORDERS,
    ORDERS,
    epsilon_curve,
    log_delta_curve,
    log_total_variation,
    total_curve,
)
from ghostgrad.accounting.base import Accountant, AccountingWarning
from ghostgrad.accounting.events import Event, FixedSizeSampled, Gaussian, Laplace, Opaque
from ghostgrad.accounting.ledger import Ledger
from ghostgrad.errors import ConfigurationError

Array = NDArray[np.float64]


def readable_others(ledger: Ledger, replace: bool = False) -> tuple[dict[Event, int], float]:
    """Events besides sampled Gaussians, restated for the ledger's neighbours, and the mass at infinite loss.

    A fixed-size sample turns the whole ledger to replace-one, where plain noise has half the effect; `Opaque` events
    are taken as stated for the ledger's own relation.
    """
    others, log_finite = ledger.others(), 0.0
    fixed = any(isinstance(event, FixedSizeSampled) for event in others)
    replace = replace or fixed
    if fixed and ledger.sampled_gaussians():
        raise ConfigurationError(
            "the ledger mixes Poisson samples (add or remove one record) with fixed-size samples (replace one); "
            "use one kind of sampling for a run."
        )
    result: dict[Event, int] = {}
    for event, count in others.items():
        if isinstance(event, Opaque) and event.delta > 0.0:
            log_finite += count * math.log1p(-event.delta) if event.delta < 1.0 else -math.inf
        if replace and isinstance(event, Gaussian):
            event = Gaussian(event.sigma / 2.0)
        elif replace and isinstance(event, Laplace):
            event = Laplace(event.scale / 2.0)
        elif replace and not isinstance(event, (Opaque, FixedSizeSampled)):
            raise ConfigurationError(
                f"{type(event).__name__} is stated for adding or removing one record and cannot be restated for replacing one, "
                f"which the fixed-size samples in the ledger (or neighbouring='replace-one') ask for. Account it by itself, or "
                f"give it as Opaque with its replace-one epsilon and delta."
            )
        result[event] = result.get(event, 0) + count
    return result, -math.expm1(log_finite)


class RDPAccountant(Accountant):
    """Epsilon by Renyi differential privacy.

    Curves: Mironov, Talwar and Zhang (2019), theorem 4, at fractional and whole orders from 1.00001 to 4096, and to
    262144 when the best order is the last. Conversion: Canonne, Kamath and Steinke (2020), prop. 12, clamped at 0.
    Upper bound for adding or removing one record. Edge cases: no steps or rate 0 give 0; no noise gives infinity.

    >>> accountant = RDPAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    >>> round(accountant.get_epsilon(1e-5), 2)
    2.1
    """

    mechanism: ClassVar[str] = "rdp"

    def __init__(self) -> None:
        super().__init__()
        self._cache: dict[bool, tuple[Ledger, int, Array, float]] = {}

    def _curve(self, more: bool) -> tuple[Array, Array, float]:
        orders = MORE_ORDERS if more else ORDERS
        held = self._cache.get(more)
        if held is None or held[0] is not self.ledger or held[1] != self.ledger.revision:
            others, infinite = readable_others(self.ledger)
            curve = total_curve(self.ledger.sampled_gaussians(), others, orders)
            held = (self.ledger, self.ledger.revision, curve, infinite)
            self._cache[more] = held
        return orders, held[2], held[3]

    def get_epsilon(self, delta: float) -> float:
        """Return epsilon at ``delta``; see `get_epsilon_and_order`."""
        return self.get_epsilon_and_order(delta)[0]

    def get_epsilon_and_order(self, delta: float) -> tuple[float, float]:
        """Return epsilon at ``delta`` and the Renyi order that gave it (``nan`` where none was needed).

        Warns:
            AccountingWarning: The best order is at an end of the orders: the bound holds but is loose.

        >>> RDPAccountant().get_epsilon_and_order(1e-5)
        (0.0, nan)
        """
        delta = check_delta(delta)
        orders, curve, infinite = self._curve(False)
        if not np.isfinite(curve).any() or delta <= infinite:
            return math.inf, math.nan
        delta = (delta - infinite) / (1.0 - infinite)
        if log_total_variation(orders, curve) <= math.log(delta):
            return 0.0, math.nan
        epsilons = epsilon_curve(orders, curve, delta)
        best = int(np.argmin(epsilons))
        last = best == len(orders) - 1
        if last and epsilons[best] > 0.0:
            orders, curve, _ = self._curve(True)
            more = epsilon_curve(orders, curve, delta)
            if more.min() <= epsilons[best]:
                best, epsilons = int(np.argmin(more)), more
                last = best == len(orders) - 1
            else:
                orders, last = ORDERS, False
        epsilon, order = float(epsilons[best]), float(orders[best])
        if epsilon <= 0.0:
            return 0.0, order
        if last or order == ORDERS[0]:
            _warn_loose(epsilon, order)
        # A nudge above rounding, so that get_delta(get_epsilon(delta)) cannot exceed delta.
        return epsilon * (1.0 + 1e-12) + 1e-14 * (1.0 - math.log(delta)) / (order - 1.0), order

    def get_delta(self, epsilon: float) -> float:
        """Return delta at ``epsilon``: the smallest over all orders, and never above 1."""
        epsilon = check_epsilon(epsilon)
        orders, curve, infinite = self._curve(False)
        if not np.isfinite(curve).any():
            return 1.0
        logs = log_delta_curve(orders, curve, epsilon)
        best = float(logs.min())
        if int(np.argmin(logs)) == len(orders) - 1:
            orders_more, curve_more, _ = self._curve(True)
            best = min(best, float(log_delta_curve(orders_more, curve_more, epsilon).min()))
        best = min(best, log_total_variation(orders, curve), 0.0)
        return min(1.0, infinite + (1.0 - infinite) * math.exp(best))

    def get_rdp(self, orders: NDArray[np.float64]) -> Array:
        """Return the Renyi divergence bound at ``orders`` (each > 1), for use elsewhere."""
        orders = np.asarray(orders, dtype=np.float64)
        if orders.ndim != 1 or not np.isfinite(orders).all() or (orders <= 1.0).any():
            raise ConfigurationError(f"orders={orders!r} must be a list of finite numbers above 1.")
        others, infinite = readable_others(self.ledger)
        if infinite > 0.0:
            raise ConfigurationError(
                "the ledger holds an Opaque event with delta > 0, which has no finite Renyi divergence."
            )
        return total_curve(self.ledger.sampled_gaussians(), others, orders) / (orders - 1.0)


def _warn_loose(epsilon: float, order: float) -> None:
    warnings.warn(
        f"epsilon={epsilon:.4g} was found at order {order:g}, an end of the orders: it holds, but is loose; "
        'ask accountant="pld" for a tight one.',
        AccountingWarning,
        stacklevel=4,
    )
