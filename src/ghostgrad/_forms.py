"""What a saved state has to look like, so that a damaged or a made-up one is refused before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ghostgrad.errors import CheckpointError

Test = Callable[[Any], bool]


def is_int(value: Any) -> bool:
    """A whole number of a sensible size, at least -1 (which stands for "none yet")."""
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 1 << 62


def is_count(value: Any) -> bool:
    """A whole number of a sensible size, at least 0."""
    return is_int(value) and value >= 0


def is_positive(value: Any) -> bool:
    """A whole number of a sensible size, at least 1."""
    return is_int(value) and value >= 1


def is_number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_bool(value: Any) -> bool:
    """True or False."""
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def is_hex(value: Any) -> bool:
    """Bytes in hexadecimal."""
    try:
        return isinstance(value, str) and bool(bytes.fromhex(value) or not value)
    except ValueError:
        return False


def is_key(value: Any) -> bool:
    """A run key in hexadecimal."""
    return is_hex(value) and len(value) == 64


def is_table(value: Any) -> bool:
    """A mapping from names."""
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def is_tensor(value: Any) -> bool:
    """A dense tensor."""
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_sparse


def is_any_tensor(value: Any) -> bool:
    """A tensor of any kind."""
    return isinstance(value, Tensor)


def optional(form: Any) -> tuple[str, Any]:
    """None, or something of that form."""
    return ("optional", form)


def either(*forms: Any) -> tuple[str, Any]:
    """Something of one of the forms."""
    return ("either", forms)


def named(form: Any) -> tuple[str, Any]:
    """A mapping from any names to things of one form."""
    return ("named", form)


def row(*forms: Any) -> tuple[str, Any]:
    """A sequence of that length."""
    return ("row", forms)


def require(value: Any, form: Any, place: str = "the state") -> None:
    """Refuse a value of another form; a dict has exactly these keys, a list holds any number of its one form.

    Raises:
        CheckpointError: naming the place. Values are not shown: some are secret.

    >>> require({"steps": [1, 2]}, {"steps": [is_int]})
    """
    if not _holds(value, form, place):
        raise CheckpointError(
            f"{place} is not what this version of ghostgrad writes (found {type(value).__name__}): the checkpoint is damaged, or "
            f"of another version. Load one that was saved with this version, as it was saved."
        )


def _holds(value: Any, form: Any, place: str) -> bool:
    if isinstance(form, dict):
        if not isinstance(value, Mapping) or set(value) != set(form):
            return False
        for name, inner in form.items():
            require(value[name], inner, f"{place}[{name!r}]")
        return True
    if isinstance(form, list):
        ok = isinstance(value, (list, tuple))
        for part in value if ok else ():
            require(part, form[0], f"an entry of {place}")
        return ok
    if isinstance(form, tuple):
        return _holds_special(value, form, place)
    return bool(form(value))


def _holds_special(value: Any, form: tuple[str, Any], place: str) -> bool:
    kind, inner = form
    if kind == "optional":
        return value is None or _holds(value, inner, place)
    if kind == "either":
        return any(_is(value, option, place) for option in inner)
    if kind == "named":
        if not is_table(value):
            return False
        for name, part in value.items():
            require(part, inner, f"{place}[{name!r}]")
        return True
    if not isinstance(value, (list, tuple)) or len(value) != len(inner):
        return False
    for part, own in zip(value, inner, strict=True):
        require(part, own, f"an entry of {place}")
    return True


def _is(value: Any, form: Any, place: str) -> bool:
    try:
        return _holds(value, form, place)
    except CheckpointError:
        return False
