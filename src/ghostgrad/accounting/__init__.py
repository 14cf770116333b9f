"""Privacy accounting on numpy and scipy only: events, a ledger, accountants, calibration and their reading."""

from __future__ import annotations

from ghostgrad.accounting.base import (
    Accountant,
    AccountingWarning,
    Bounds,
    DeltaBounds,
    create_accountant,
    register_accountant,
    registered_accountants,
)
from ghostgrad.accounting.calibration import (
    get_batch_size,
    get_noise_multiplier,
    get_noise_multiplier_for_attack,
    get_sample_rate,
    get_steps,
)
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
from ghostgrad.accounting.planning import Plan, make_plan
from ghostgrad.accounting.pld import PLDAccountant, PRVAccountant
from ghostgrad.accounting.rdp import RDPAccountant
from ghostgrad.accounting.reading import (
    Curve,
    Reading,
    closest_gaussian,
    epsilon_over_releases,
    membership_advantage,
    posterior_bound,
    privacy_profile,
    remaining_steps,
    tpr_at_fpr,
    trade_off,
)
from ghostgrad.accounting.tuning import draw_trials, tuned_epsilon, tuning_event

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
    "Curve",
    "DeltaBounds",
    "Event",
    "FixedSizeSampled",
    "Gaussian",
    "GaussianAccountant",
    "Laplace",
    "Ledger",
    "Opaque",
    "PLDAccountant",
    "PRVAccountant",
    "Plan",
    "PoissonSampled",
    "RDPAccountant",
    "Reading",
    "Repeated",
    "closest_gaussian",
    "create_accountant",
    "draw_trials",
    "epsilon_over_releases",
    "event_from_json",
    "event_to_json",
    "get_batch_size",
    "get_noise_multiplier",
    "get_noise_multiplier_for_attack",
    "get_sample_rate",
    "get_steps",
    "make_plan",
    "membership_advantage",
    "posterior_bound",
    "privacy_profile",
    "register_accountant",
    "registered_accountants",
    "remaining_steps",
    "tpr_at_fpr",
    "trade_off",
    "tuned_epsilon",
    "tuning_event",
]
