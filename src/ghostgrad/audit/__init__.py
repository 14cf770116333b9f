"""Audits: what an attack shows that epsilon must be at least, held against what is claimed that it is at most."""

from __future__ import annotations

from ghostgrad.audit.bounds import errors_epsilon, errors_mu, one_run_epsilon, one_run_p_value, rate_upper
from ghostgrad.audit.evidence import Errors, Guesses
from ghostgrad.audit.gradients import GradientCanaries
from ghostgrad.audit.records import OneRun, blank, mislabelled
from ghostgrad.audit.result import AuditResult, Claim, Comparison
from ghostgrad.audit.scores import Releases, gradient_score, loss_score
from ghostgrad.audit.training import audit_training

__all__ = [
    "AuditResult",
    "Claim",
    "Comparison",
    "Errors",
    "GradientCanaries",
    "Guesses",
    "OneRun",
    "Releases",
    "audit_training",
    "blank",
    "errors_epsilon",
    "errors_mu",
    "gradient_score",
    "loss_score",
    "mislabelled",
    "one_run_epsilon",
    "one_run_p_value",
    "rate_upper",
]
