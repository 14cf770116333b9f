"""What ``python -m ghostgrad report`` does: show, compare and check reports. No torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ghostgrad.accounting import Accountant, AccountingWarning
from ghostgrad.accounting._checks import check_delta
from ghostgrad.errors import ConfigurationError, choose
from ghostgrad.report.numbers import at_most, shown, value
from ghostgrad.report.privacy_report import PrivacyReport
from ghostgrad.report.reading import again, releases
from ghostgrad.report.view import lines

_WHOLE = ("figures", "ledger")
_NAMES = ("code", "what", "name", "path", "kind")
_ROUNDING = 1e-3
"""What another machine or version may give less: the mesh of a convolution is chosen by what was asked before."""


def load(path: str | Path) -> PrivacyReport:
    """Read a report's JSON file.

    Raises:
        ConfigurationError: no such file, or no report in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"report={str(path)!r} cannot be read: {error}.") from error
    return PrivacyReport.from_json(text)


def show(path: str | Path) -> str:
    """The report as text."""
    return "\n".join(lines(load(path).data))


# ------------------------------------------------------------------ diff


def diff(path: str | Path, other: str | Path) -> list[str]:
    """One line for each place where two reports differ."""
    return list(_changes("", load(path).data, load(other).data))


def _changes(where: str, one: Any, other: Any) -> Iterator[str]:
    if one == other and type(one) is type(other):
        return
    if where in _WHOLE:
        yield f"{where}: differs"
    elif isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            yield from _changes(f"{where}.{name}".lstrip("."), one.get(name, _NOTHING), other.get(name, _NOTHING))
    elif isinstance(one, list) and isinstance(other, list):
        yield from _changes(where, _labelled(one), _labelled(other))
    else:
        yield f"{where}: {_said(one)} -> {_said(other)}"


_NOTHING = object()


def _said(part: Any) -> str:
    text = "nothing" if part is _NOTHING else repr(part)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _labelled(parts: list[Any]) -> dict[str, Any]:
    """The items of a list by what they are of, so that an added one does not shift all others."""
    found: dict[str, Any] = {}
    for number, part in enumerate(parts):
        label = str(number)
        if isinstance(part, dict) and "accountant" in part:
            label = f"{part['accountant']} at {part['delta']}"
        elif isinstance(part, dict):
            label = str(next((part[name] for name in _NAMES if name in part), number))
        found[label if label not in found else f"{label} ({number})"] = part
    return found


# ------------------------------------------------------------------ check


def check(
    path: str | Path,
    *,
    max_epsilon: float,
    delta: float | None = None,
    accountant: str = "pld",
    accept: Sequence[str] = (),
) -> tuple[list[str], str]:
    """Why a report does not pass, if it does not; and what passes otherwise.

    Epsilon is worked out again from the ledger in the report where it holds one.

    Args:
        path: a report's JSON file.
        max_epsilon: the largest epsilon that passes.
        delta: default the report's first.
        accountant: ``"pld"`` or ``"rdp"``: bounds only.
        accept: codes of assumptions that may stand.

    Raises:
        ConfigurationError: the file holds no report, or an argument is none of these.
    """
    choose("accountant", accountant, ("pld", "rdp"))
    if math.isnan(max_epsilon) or max_epsilon < 0:
        raise ConfigurationError(f"max_epsilon={max_epsilon} must be at least 0.")
    data = load(path).data
    where = data["epsilon"][0]["delta"] if delta is None else check_delta(delta)
    failures = [*_doubts(data, accept), *_contradictions(data)]
    epsilon = _epsilon(data, where, accountant)
    said = f"epsilon at delta {shown(where)} by {accountant}"
    if math.isnan(epsilon):
        failures.append(f"{said} is unknown: the report holds neither that row nor its ledger.")
    elif epsilon > max_epsilon:
        failures.append(
            f"{said} is {'infinite' if math.isinf(epsilon) else at_most(epsilon, 6)}, above {max_epsilon:g}."
        )
    return failures, f"{said} is {epsilon:.6g}, at most {max_epsilon:g}."


def _doubts(data: dict[str, Any], accept: Sequence[str]) -> Iterator[str]:
    for finding in data["findings"]:
        code = finding["code"]
        if finding["effect"] == "void":
            yield f"the guarantee does not hold ({code}). {finding['statement']}"
        elif finding["effect"] == "assumed" and code not in accept:
            yield f"{finding['statement']} Pass --accept {code} if you know that it is so."
        elif code == "nothing-released":
            yield "nothing was released: this is no report of a training."
    if data["not_private"] is not None:
        yield "the report holds numbers that are not private; make it without not_private=True before it is published."


def _contradictions(data: dict[str, Any]) -> Iterator[str]:
    """Where the numbers of the report do not follow from its ledger."""
    held = {found.mechanism: found for found in again(data)}
    if not held:
        return
    said = data["releases"]
    if releases(next(iter(held.values())).ledger, said["steps"], said["made"]) != said:
        yield "what the report says of its releases does not follow from its ledger."
    for row in data["epsilon"]:
        if row["bound"] and row["accountant"] in held:
            found = _read(held[row["accountant"]], row["delta"])
            if value(row["upper"]) < found * (1.0 - _ROUNDING):
                yield (
                    f"the report says epsilon {at_most(row['upper'])} at delta {shown(row['delta'])} by {row['accountant']}, but "
                    f"its ledger gives {at_most(found)}."
                )


def _epsilon(data: dict[str, Any], delta: float, accountant: str) -> float:
    for held in again(data):
        if held.mechanism == accountant:
            return _read(held, delta)
    rows = [
        row for row in data["epsilon"] if row["accountant"] == accountant and row["delta"] == delta and row["bound"]
    ]
    return value(rows[0]["upper"]) if rows else math.nan


def _read(accountant: Accountant, delta: float) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccountingWarning)
        return accountant.get_bounds(delta).upper
