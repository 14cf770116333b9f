"""The accountants under the name that Opacus gives them; they live in `ghostgrad.accounting`."""

from ghostgrad.accounting import (
    Accountant,
    GaussianAccountant,
    PLDAccountant,
    PRVAccountant,
    RDPAccountant,
    create_accountant,
    register_accountant,
)
from ghostgrad.accounting import Accountant as IAccountant

__all__ = [
    "Accountant",
    "GaussianAccountant",
    "IAccountant",
    "PLDAccountant",
    "PRVAccountant",
    "RDPAccountant",
    "create_accountant",
    "register_accountant",
]
