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


def escape(text: str) -> str:
    r"""Text that LaTeX sets as it is, on one line.

    >>> escape("a_b & \\input{x}")
    'a\\_b \\& \\textbackslash{}input\\{x\\}'
    """
    flat = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)
    return "".join(_ESCAPES.get(character, character) for character in flat)


def to_latex(data: Mapping[str, Any]) -> str:
    """One line; what voids the guarantee comes first."""
    row = headline(data)
    upper = "unknown" if row is None else row["upper"]
    epsilon = {"inf": r"\infty", "unknown": r"\text{unknown}"}.get(upper, at_most(upper))
    delta = _power(data["epsilon"][0]["delta"])
    doubts = [f for f in data["findings"] if f["effect"] != "other"]
    first = "".join(f"\\textbf{{{escape(f['statement'])}}} " for f in doubts)
    if_so = {"yes": "The training is", "no": "What was accounted is", "unknown": "If that is so, the training is"}
    by = "" if row is None else f" ({escape(row['accountant'])} accountant)"
    return (
        f"{first}{if_so[data['holds']]} $({epsilon}, {delta})$-differentially private with respect to "
        f"{RELATIONS[data['neighbouring']]}; privacy unit: {escape(data['privacy_unit'])}{by}.\n"
    )


def _power(number: float) -> str:
    mantissa, _, exponent = shown(number).partition("e")
    if not exponent:
        return mantissa
    factor = "" if mantissa == "1" else rf"{mantissa} \cdot "
    return f"{factor}10^{{{int(exponent)}}}"
