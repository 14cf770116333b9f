"""From a ledger to the numbers of a report: epsilon by each accountant, and what an attacker can reach. No torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from ghostgrad.accounting import (
    Accountant,
    AccountingWarning,
    Curve,
    Gaussian,
    GaussianAccountant,
    Ledger,
    PLDAccountant,
    PoissonSampled,
    RDPAccountant,
    epsilon_over_releases,
    membership_advantage,
    posterior_bound,
    tpr_at_fpr,
    trade_off,
)
from ghostgrad.errors import ConfigurationError
from ghostgrad.report.numbers import UNKNOWN, Number, plain, shown

FALSE_POSITIVES = (0.001, 0.01)
BASELINES = (1e-6, 1e-3, 0.1)
PRIORS = (0.5,)
FAILURE = 1e-5
_MESH_POINTS = 1 << 15  # answers in a tenth of a second, and is above finer meshes
_MOST_ENTRIES = 1000
_MOST_PHASES = 100
_POINTS = 32
_NO_CURVE = Curve(np.zeros(0), np.zeros(0), "", "", "")


def accountants(ledger: Ledger, neighbouring: str, own: Accountant | None = None) -> list[Accountant]:
    """One of each kind on a ledger, and the training's own where it is of another kind.

    Args:
        ledger: the releases; it is read only.
        neighbouring: ``"replace-one"``, or anything else for adding or removing (blanking) one.
        own: the training's accountant.
    """
    relation: Any = "replace-one" if neighbouring == "replace-one" else "add-or-remove-one"
    found: list[Accountant] = [RDPAccountant(relation), PLDAccountant(relation, mesh_points=_MESH_POINTS)]
    if relation == "add-or-remove-one":
        found.append(GaussianAccountant())
    for accountant in found:
        accountant.ledger = ledger
    if own is not None and own.mechanism not in ("rdp", "pld", "prv", "gdp"):
        found.append(own)
    return found


def epsilons(held: Sequence[Accountant], deltas: Sequence[float]) -> list[dict[str, Any]]:
    """The rows of the table of epsilon."""
    return [_row(accountant, delta) for delta in deltas for accountant in held]


def _row(accountant: Accountant, delta: float) -> dict[str, Any]:
    bound = not isinstance(accountant, GaussianAccountant)
    lower, upper, method = 0.0, math.nan, accountant.mechanism
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccountingWarning)
        try:
            if bound:
                bounds = accountant.get_bounds(delta)
                lower, upper, method = bounds.lower, bounds.upper, bounds.method
            else:
                upper, method = accountant.get_epsilon(delta), "central limit, can be too low"
        except ConfigurationError:
            method = "has no answer for this ledger"
    has_lower = isinstance(accountant, PLDAccountant) and lower > 0.0
    return {
        "delta": delta,
        "accountant": accountant.mechanism,
        "lower": plain(lower) if has_lower else UNKNOWN,
        "upper": plain(upper),
        "bound": bound,
        "method": method,
    }


def attacks(held: Accountant) -> dict[str, Any]:
    """What any attacker can reach at best.

    Reconstruction: an attacker who knows all other records, and whose best guess without the model is right with
    probability b, is right with it at most with probability ``1 - f(b)``, f being the trade-off curve: the true positive rate
    at b false positives. For "the guess is right" is a test of whether the record was in: of a model without it the guess is
    independent of the record, so right with probability b at most; and ``1 - f`` is concave, so that the mean over records
    stays below it. The notion is reconstruction robustness (Balle, Cherubin and Hayes 2022); the bound by a test is of Hayes,
    Mahloujifar and Balle (2023), in terms of f of Kaissis, Hayes, Ziller and Rueckert (2023).
    """

    def caught(rate: float) -> Number:
        return _known(lambda: tpr_at_fpr(held, rate).value)

    return {
        "accountant": held.mechanism,
        "membership_advantage": _known(lambda: membership_advantage(held).value),
        "true_positives": [{"false_positives": rate, "upper": caught(rate)} for rate in FALSE_POSITIVES],
        "posterior": [
            {"prior": prior, "failure": FAILURE, "upper": _known(partial(_belief, held, prior))} for prior in PRIORS
        ],
        "reconstruction": [{"baseline": rate, "upper": caught(rate)} for rate in BASELINES],
    }


def _belief(held: Accountant, prior: float) -> float:
    return posterior_bound(held, prior, FAILURE).value


def _known(answer: Callable[[], float]) -> Number:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccountingWarning)
        try:
            return plain(answer())
        except ConfigurationError:  # a ledger that no accountant can read
            return UNKNOWN


def figures(held: Accountant, delta: float) -> dict[str, Any]:
    """The points of the two figures."""
    curves: tuple[Curve, ...] = ()
    with warnings.catch_warnings(), suppress(ConfigurationError):
        warnings.simplefilter("ignore", AccountingWarning)
        curves = epsilon_over_releases(held, delta, _POINTS), trade_off(held, np.linspace(0.0, 1.0, 51))
    epsilon, curve = curves or (_NO_CURVE, _NO_CURVE)
    return {
        "epsilon": _points(epsilon, "releases", f"epsilon at delta {shown(delta)}"),
        "trade_off": _points(curve, "false positive rate", "miss rate"),
    }


def tightest(held: Sequence[Accountant]) -> Accountant:
    """The one to ask many questions: tight, but for long ledgers, on which it is slow."""
    rdp, pld = held[:2]
    return pld if len(pld.ledger.sampled_gaussians()) <= _MOST_PHASES else rdp


def _points(curve: Curve, x: str, y: str) -> dict[str, Any]:
    def rounded(values: Any) -> list[Any]:
        return [plain(float(f"{value:.6g}")) for value in values.tolist()]

    return {"x_label": x, "y_label": y, "x": rounded(curve.x), "y": rounded(curve.y)}


def releases(ledger: Ledger, steps: int, made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many releases there were, how they were made, with how much noise, and which were no steps."""
    sigmas, others = [], dict[str, int]()
    for event, count in ledger:
        if isinstance(event, PoissonSampled) and isinstance(event.event, Gaussian):
            sigmas.append(event.event.sigma)
        else:
            others[type(event).__name__] = others.get(type(event).__name__, 0) + count
    return {
        "count": ledger.steps,
        "steps": steps,
        "made": [dict(part) for part in made],
        "phases": len(ledger),
        "least_noise_multiplier": plain(min(sigmas, default=math.nan)),
        "largest_noise_multiplier": plain(max(sigmas, default=math.nan)),
        "by_hand": [{"kind": kind, "count": count} for kind, count in sorted(others.items())],
    }


def kept(ledger: Ledger) -> Any:
    """The ledger itself, where it is short."""
    return ledger.state_dict() if len(ledger) <= _MOST_ENTRIES else UNKNOWN


def again(data: dict[str, Any]) -> Iterator[Accountant]:
    """Accountants on the ledger that a report holds; none where it was too long to be kept.

    Raises:
        ConfigurationError: the ledger cannot be read.
    """
    if data["ledger"] != UNKNOWN:
        ledger = Ledger.from_state_dict(data["ledger"])
        yield from accountants(ledger, data["neighbouring"])
