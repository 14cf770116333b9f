"""Holds plain data to the schema that ships with the package, with the part of JSON Schema that it uses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from ghostgrad.errors import ConfigurationError

_LARGEST = 2**63
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST,
    "number": lambda value: (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e300
    ),
}


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a privacy report (draft 2020-12)."""
    found: dict[str, Any] = json.loads(resources.files("ghostgrad.report").joinpath("schema.json").read_text("utf-8"))
    return found


def validate(value: object, form: Mapping[str, Any] | None = None, where: str = "report") -> None:
    """Raise where ``value`` is not of the schema's form.

    Raises:
        ConfigurationError: naming the place and what was found there.

    >>> validate({"x": 1}, {"type": "object", "required": ["y"]})
    Traceback (most recent call last):
    ...
    ghostgrad.errors.ConfigurationError: report has no 'y'; it was not written by this version of ghostgrad.
    """
    form = schema() if form is None else form
    if "$ref" in form:
        validate(value, schema()["$defs"][form["$ref"].rpartition("/")[2]], where)
    if "anyOf" in form:
        _any_of(value, form["anyOf"], where)
    allowed = [form["const"]] if "const" in form else form.get("enum")
    if allowed is not None and not any(type(value) is type(one) and value == one for one in allowed):
        raise _unlike(where, value, " or ".join(map(repr, allowed)))
    if "type" in form and not _TYPES[form["type"]](value):
        raise _unlike(where, value, f"{form['type']}")
    if isinstance(value, dict):
        _members(value, form, where)
    if isinstance(value, list):
        _items(value, form, where)
    if isinstance(value, str) and len(value) > form.get("maxLength", math.inf):
        raise _unlike(where, value, f"text of at most {form['maxLength']} characters")
    if isinstance(value, (int, float)) and not form.get("minimum", -math.inf) <= value <= form.get("maximum", math.inf):
        raise _unlike(where, value, f"between {form.get('minimum')} and {form.get('maximum', 'infinity')}")


def _any_of(value: object, forms: list[Mapping[str, Any]], where: str) -> None:
    complaints = [complaint for form in forms if (complaint := _complaint(value, form, where))]
    if len(complaints) == len(forms):
        # The one that got furthest into the value is the one that helps.
        raise max(complaints, key=lambda error: len(str(error).split("=")[0].split(" ")[0]))


def _complaint(value: object, form: Mapping[str, Any], where: str) -> ConfigurationError | None:
    try:
        validate(value, form, where)
    except ConfigurationError as error:
        return error
    return None


def _members(value: Mapping[str, Any], form: Mapping[str, Any], where: str) -> None:
    for name in form.get("required", ()):
        if name not in value:
            raise ConfigurationError(f"{where} has no {name!r}; it was not written by this version of ghostgrad.")
    known = form.get("properties", {})
    for name, part in value.items():
        if name in known:
            validate(part, known[name], f"{where}.{name}")
        elif form.get("additionalProperties") is False:
            raise ConfigurationError(f"{where} has {_short(name)}, which this version of ghostgrad does not know.")


def _items(value: list[Any], form: Mapping[str, Any], where: str) -> None:
    if not form.get("minItems", 0) <= len(value) <= form.get("maxItems", math.inf):
        raise _unlike(
            where, value, f"a list of {form.get('minItems', 0)} to {form.get('maxItems', 'any number of')} items"
        )
    for number, part in enumerate(value):
        validate(part, form.get("items", {}), f"{where}[{number}]")


def _unlike(where: str, value: object, wanted: str) -> ConfigurationError:
    return ConfigurationError(f"{where}={_short(value)} must be {wanted}.")


def _short(value: object) -> str:
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
