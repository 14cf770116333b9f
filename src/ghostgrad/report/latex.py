"""A report as one line of LaTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ghostgrad.report.numbers import at_most, shown
from ghostgrad.report.view import RELATIONS, headline

_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip

_CLAIMS = {
    "yes": "The training is",
    "no": "If it were not for that, the training would be",
    "unknown": "If that is so, the training is",
}


def escape(text: str) -> str:
    r"""Text that LaTeX sets as it is, on one line.

    >>> escape("a_b & \\input{x}")
    'a\\_b \\& \\textbackslash{}input\\{x\\}'
    """
    flat = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)
    return "".join(_ESCAPES.get(character, character) for character in flat)


def to_latex(data: Mapping[str, Any]) -> str:
    """One line; what voids the guarantee comes first."""
    row, delta = headline(data), _power(data["epsilon"][0]["delta"])
    doubts = [f for f in data["findings"] if f["effect"] != "other"]
    first = "".join(f"\\textbf{{{escape(f['statement'])}}} " for f in doubts)
    unit = f"privacy unit: {escape(data['privacy_unit'])}"
    if row is None or row["upper"] == "inf":
        kind = "known" if row is None else "finite"
        return f"{first}No {kind} $\\varepsilon$ can be claimed at $\\delta = {delta}$ ({unit}).\n"
    return (
        f"{first}{_CLAIMS[data['holds']]} $({at_most(row['upper'])}, {delta})$-differentially private with respect to "
        f"{RELATIONS[data['neighbouring']]} ({unit}; {escape(row['accountant'])} accountant).\n"
    )


def _power(number: float) -> str:
    mantissa, _, exponent = shown(number).partition("e")
    if not exponent:
        return mantissa
    factor = "" if mantissa == "1" else rf"{mantissa} \cdot "
    return f"{factor}10^{{{int(exponent)}}}"
