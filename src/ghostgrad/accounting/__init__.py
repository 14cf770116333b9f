"""Privacy accounting on numpy and scipy only: events, a ledger, accountants, calibration and their reading."""

from __future__ import annotations

from ghostgrad.accounting.base import (
    Accountant,
    AccountingWarning,
    Bounds,
    create_accountant,
    register_accountant,
    registered_accountants,
)
from ghostgrad.accounting.calibration import get_noise_multiplier
from ghostgrad.accounting.events import (
    BestOf,
    Composed,
    Event,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    Opaque,
    PoissonSampled,
    Repeated,
    event_from_json,
    event_to_json,
)
from ghostgrad.accounting.gdp import GaussianAccountant
from ghostgrad.accounting.ledger import Ledger
from ghostgrad.accounting.pld import PLDAccountant, PRVAccountant
from ghostgrad.accounting.rdp import RDPAccountant

register_accountant("rdp", RDPAccountant)
register_accountant("pld", PLDAccountant)
register_accountant("prv", PRVAccountant)
register_accountant("gdp", GaussianAccountant)

__all__ = [
    "Accountant",
    "AccountingWarning",
    "BestOf",
    "Bounds",
    "Composed",
    "Event",
    "FixedSizeSampled",
    "Gaussian",
    "GaussianAccountant",
    "Laplace",
    "Ledger",
    "Opaque",
    "PLDAccountant",
    "PRVAccountant",
    "PoissonSampled",
    "RDPAccountant",
    "Repeated",
    "create_accountant",
    "event_from_json",
    "event_to_json",
    "get_noise_multiplier",
    "register_accountant",
    "registered_accountants",
]
