"""Numbers as the report has them: finite, ``"inf"`` or ``"unknown"``; and how they are shown, never on the flattering side."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from typing import Any, Union

Number = Union[float, str]  # noqa: UP007

UNKNOWN = "unknown"


def plain(value: float) -> Number:
    """A float for strict JSON.

    >>> plain(1.5), plain(math.inf), plain(math.nan)
    (1.5, 'inf', 'unknown')
    """
    if math.isnan(value):
        return UNKNOWN
    return "inf" if math.isinf(value) else value + 0.0


def value(number: Number) -> float:
    """The float; NaN where it is not known.

    >>> value("inf"), value("unknown")
    (inf, nan)
    """
    return float(number) if number != UNKNOWN else math.nan


def shown(number: Any, digits: int = 4) -> str:
    """``digits`` significant digits; words for what is not finite or not known.

    >>> shown(0.012345678), shown("inf"), shown("unknown"), shown(1234567), shown(1e-5), shown(2.0)
    ('0.01235', 'infinity', 'unknown', '1,234,567', '1e-5', '2')
    """
    if isinstance(number, list):
        return ", ".join(shown(part, digits) for part in number)
    return _shown(number, digits, ROUND_HALF_EVEN, "g")


def nearly(number: Any, digits: int = 4) -> str:
    """To nearest, with all digits, to stand in a column with bounds.

    >>> nearly(2.10999)
    '2.110'
    """
    return _shown(number, digits, ROUND_HALF_EVEN, "#")


def at_most(number: Any, digits: int = 4) -> str:
    """An upper bound, rounded up.

    >>> at_most(1.82821), at_most(1.79991), at_most(0.99999999)
    ('1.829', '1.800', '1.000')
    """
    return _shown(number, digits, ROUND_CEILING, "#")


def at_least(number: Any, digits: int = 4) -> str:
    """A lower bound, rounded down.

    >>> at_least(1.82889)
    '1.828'
    """
    return _shown(number, digits, ROUND_FLOOR, "#")


def _shown(number: float | str, digits: int, rounding: str, form: str) -> str:
    if isinstance(number, str):
        return {"inf": "infinity"}.get(number, number)
    exact = Decimal(str(number))
    if not exact.is_finite():
        return "infinity" if exact.is_infinite() else UNKNOWN
    if exact == exact.to_integral_value() and abs(exact) < 10**15:
        return f"{int(exact):,}"
    rounded = Context(prec=digits, rounding=rounding).plus(exact)
    rounded = (
        rounded
        if len(rounded.as_tuple().digits) == digits
        else rounded.quantize(Decimal(1).scaleb(rounded.adjusted() - digits + 1))
    )
    text = f"{rounded:.{digits - 1}e}" if not -5 < rounded.adjusted() < 6 else f"{rounded:f}"
    return _tidy(text, trailing=form == "#")


def _tidy(text: str, *, trailing: bool) -> str:
    """No zeros before an exponent's digits, and none at the end unless they tell the precision."""
    mantissa, _, exponent = text.lower().partition("e")
    if not trailing and "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
