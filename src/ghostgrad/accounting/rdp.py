"""Renyi accountant: fast for any ledger, never below the truth, a few per cent above it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import ClassVar, Literal

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
from ghostgrad.accounting.base import AccountingWarning, EitherNeighbour
from ghostgrad.accounting.events import BestOf, Event, FixedSizeSampled, Gaussian, Laplace, Opaque, samples_poisson
from ghostgrad.accounting.ledger import Ledger
from ghostgrad.errors import ConfigurationError

Array = NDArray[np.float64]


def readable_others(ledger: Ledger, replace: bool = False) -> tuple[dict[Event, int], float]:
    """Events besides sampled Gaussians, restated for the ledger's neighbours, and the mass at infinite loss.

    Where a record is replaced, plain noise counts for half. `Opaque` events are stated for the ledger's own relation,
    which a fixed-size sample turns to replace-one; asked for replace-one otherwise (``replace``), they pay for two records:
    one leaves and another enters (Vadhan 2017, lemma 2.2).
    """
    others, log_finite = ledger.others(), 0.0
    fixed = any(isinstance(event, FixedSizeSampled) for event in others)
    if fixed and (ledger.sampled_gaussians() or any(samples_poisson(event) for event, _ in ledger)):
        raise ConfigurationError(
            "the ledger mixes Poisson samples (add or remove one record) with fixed-size samples (replace one); "
            "use one kind of sampling for a run."
        )
    result: dict[Event, int] = {}
    for event, count in others.items():
        if fixed or replace:
            event = _restated(event, fixed)
        if isinstance(event, Opaque) and event.delta > 0.0:
            log_finite += count * math.log1p(-event.delta) if event.delta < 1.0 else -math.inf
        result[event] = result.get(event, 0) + count
    failing = [event for event in result if isinstance(event, Opaque) and event.delta > 0.0]
    if len(failing) == 1 and result[failing[0]] == 1:
        return result, failing[0].delta  # without the rounding of logarithms
    return result, min(1.0, (0.0 - math.expm1(log_finite)) * (1.0 + 4e-16))


def _restated(event: Event, fixed: bool) -> Event:
    """``event`` for replacing a record; ``fixed`` where the ledger's own relation is that already."""
    if isinstance(event, Gaussian):
        return Gaussian(event.sigma / 2.0)
    if isinstance(event, Laplace):
        return Laplace(max(event.scale / 2.0, 5e-324))
    if isinstance(event, Opaque) and not fixed:
        delta = event.delta * (1.0 + math.exp(min(event.epsilon, 700.0))) if event.delta > 0.0 else 0.0
        return Opaque(min(2.0 * event.epsilon, 1.7e308), min(1.0, delta))
    if fixed and not isinstance(event, (Opaque, FixedSizeSampled)):
        raise ConfigurationError(
            f"{type(event).__name__} is stated for adding or removing one record and cannot be restated for replacing one, "
            f"which the fixed-size samples in the ledger ask for. Account it by itself, or give it as Opaque with its "
            f"replace-one epsilon and delta."
        )
    return event


def pure_epsilon(others: Mapping[Event, int]) -> float:
    """The sum of epsilons where every event of ``others`` is bounded without its failure mass; else infinite."""
    total = 0.0
    for event, count in others.items():
        if isinstance(event, Opaque):
            total += count * event.epsilon
        elif isinstance(event, Laplace):
            total += count * (1.0 / event.scale)
        else:
            return math.inf
    return total * (1.0 + 1e-15 * max(1, len(others)))


def finite_share(delta: float, infinite: float) -> float:
    """What ``delta`` leaves to finite losses, below rounding, so that the sum of both cannot exceed it."""
    return (delta * (1.0 - 4e-16) - infinite) / (1.0 - infinite) * (1.0 - 4e-16) if infinite > 0.0 else delta


class RDPAccountant(EitherNeighbour):
    """Epsilon by Renyi differential privacy.

    Curves: Mironov, Talwar and Zhang (2019), theorem 4, at fractional and whole orders from 1.00001 to 4096, and to
    262144 when the best order is the last. Conversion: Canonne, Kamath and Steinke (2020), prop. 12, clamped at 0.
    Guarantee: upper bound for adding or removing one record, or for replacing one (``neighbouring``): sampled Gaussians by
    their dominating pair, other sampled releases through the dataset without the record, all else restated exactly.
    Edge cases: no steps or rate 0 give 0; no noise gives infinity.

    Args:
        neighbouring: ``"add-or-remove-one"`` (default) or ``"replace-one"``.

    >>> accountant = RDPAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    >>> round(accountant.get_epsilon(1e-5), 2)
    2.1
    """

    mechanism: ClassVar[str] = "rdp"

    def __init__(self, neighbouring: Literal["add-or-remove-one", "replace-one"] = "add-or-remove-one") -> None:
        super().__init__(neighbouring)
        self._cache: dict[bool, tuple[Ledger, int, Array, float]] = {}

    def _curve(self, more: bool) -> tuple[Array, Array, float]:
        orders = MORE_ORDERS if more else ORDERS
        held = self._cache.get(more)
        if held is None or held[0] is not self.ledger or held[1] != self.ledger.revision:
            others, infinite = readable_others(self.ledger, self.replace)
            curve = total_curve(self.ledger.sampled_gaussians(), others, orders, self.replace)
            held = (self.ledger, self.ledger.revision, curve, infinite)
            self._cache[more] = held
        return orders, held[2], held[3]

    def _pure(self) -> float:
        return (
            math.inf if self.ledger.sampled_gaussians() else pure_epsilon(readable_others(self.ledger, self.replace)[0])
        )

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
        worst = self._pure()
        if not np.isfinite(curve).any() or delta <= infinite:
            return (worst if delta >= infinite else math.inf), math.nan
        delta = finite_share(delta, infinite)
        if delta <= 0.0:
            return worst, math.nan
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
        # A nudge above rounding, so that get_delta(get_epsilon(delta)) cannot exceed delta.
        epsilon = epsilon * (1.0 + 1e-12) + 1e-14 * (1.0 - math.log(delta)) / (order - 1.0)
        if epsilon > worst:
            return worst, math.nan
        if last or order == ORDERS[0]:
            _warn_loose(epsilon, order)
        return epsilon, order

    def get_delta(self, epsilon: float) -> float:
        """Return delta at ``epsilon``: the smallest over all orders, and never above 1."""
        epsilon = check_epsilon(epsilon)
        orders, curve, infinite = self._curve(False)
        if epsilon >= self._pure():
            return infinite
        epsilon = min(epsilon, 1e300)  # beyond, products overflow; delta only falls
        if not np.isfinite(curve).any():
            return 1.0
        logs = log_delta_curve(orders, curve, epsilon)
        best = float(logs.min())
        tuned = any(isinstance(event, BestOf) for event in self.ledger.others())  # those curves have several valleys
        if tuned or int(np.argmin(logs)) == len(orders) - 1:
            orders_more, curve_more, _ = self._curve(True)
            best = min(best, float(log_delta_curve(orders_more, curve_more, epsilon).min()))
        best = min(best, log_total_variation(orders, curve), 0.0)
        return min(1.0, infinite + (1.0 - infinite) * math.exp(best))

    def get_rdp(self, orders: NDArray[np.float64]) -> Array:
        """Return the Renyi divergence bound at ``orders`` (each > 1), for use elsewhere."""
        orders = np.asarray(orders, dtype=np.float64)
        if orders.ndim != 1 or not np.isfinite(orders).all() or (orders <= 1.0).any():
            raise ConfigurationError(f"orders={orders!r} must be a list of finite numbers above 1.")
        others, infinite = readable_others(self.ledger, self.replace)
        if infinite > 0.0:
            raise ConfigurationError(
                "the ledger holds an Opaque event with delta > 0, which has no finite Renyi divergence."
            )
        return total_curve(self.ledger.sampled_gaussians(), others, orders, self.replace) / (orders - 1.0)


def _warn_loose(epsilon: float, order: float) -> None:
    warnings.warn(
        f"epsilon={epsilon:.4g} was found at order {order:g}, an end of the orders: it holds, but is loose; "
        'ask accountant="pld" for a tight one.',
        AccountingWarning,
        stacklevel=4,
    )
