"""Holds a user's model and loss to the loop over single records: what ``engine.check`` runs."""

from ghostgrad.checking.check import check
from ghostgrad.checking.records import LossFunction
from ghostgrad.checking.report import CheckReport, Finding

__all__ = ["CheckReport", "Finding", "LossFunction", "check"]
