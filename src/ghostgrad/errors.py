"""The errors that ghostgrad raises, from one root.

Every message says what was found, why it cannot be private or correct, and what to do next. Where Python has a type for
the kind of fault (``ValueError``, ``TypeError``, ``RuntimeError``) ours derives from it too, so that code which already
catches the standard type keeps working.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class GhostgradError(Exception):
    """The root of all errors of this library."""


class ConfigurationError(GhostgradError, ValueError):
    """An argument, or a combination of arguments, cannot be used."""


class UnsupportedModuleError(GhostgradError, NotImplementedError):
    """A module, or the way it is called, has no exact per-sample gradient here."""


class PrivacyError(GhostgradError, RuntimeError):
    """What was asked for cannot be shown to be bounded by ``max_grad_norm``; nothing was released."""


class BudgetExhausted(GhostgradError, RuntimeError):  # noqa: N818 (the public name users catch)
    """The next step would spend more than ``target_epsilon``; the parameters were not touched."""


class CheckpointError(GhostgradError, ValueError):
    """A checkpoint or a state cannot be read, is damaged, or is not of this training; nothing was changed."""


class LedgerError(GhostgradError, ValueError):
    """A ledger file was tampered with, cut, forked, or is in use; ``line`` is where, counted from 1, or None."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class MissingDependencyError(GhostgradError, ImportError):
    """An optional package is needed for what was asked and is not installed."""


def as_float(number: float) -> float:
    """The number as a float; infinite, which checks refuse, where it is a whole number that no float can hold.

    >>> as_float(3), as_float(-(10**400))
    (3.0, -inf)
    """
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def choose(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``allowed``; else raise with the nearest valid name.

    >>> choose("clipping", "flt", ["flat", "per_layer"])
    Traceback (most recent call last):
    ...
    ghostgrad.errors.ConfigurationError: clipping='flt' is not known; did you mean 'flat'? One of: 'flat', 'per_layer'.
    """
    options = list(allowed)
    if value in options:
        return value
    near = difflib.get_close_matches(str(value), options, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigurationError(f"{name}={value!r} is not known{hint} One of: {', '.join(map(repr, options))}.")
