"""States of torch's generators as text, so that they can be saved anywhere; a damaged one is refused before it is used."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ghostgrad import _forms as forms
from ghostgrad.errors import CheckpointError


def to_text(state: torch.Tensor) -> str:
    """The bytes in hexadecimal.

    >>> generator = torch.Generator().manual_seed(3)
    >>> torch.equal(from_text(to_text(generator.get_state())), generator.get_state())
    True
    """
    return state.cpu().numpy().tobytes().hex()


def from_text(text: str, device: str | torch.device = "cpu") -> torch.Tensor:
    """The state, tried out on a generator of that device.

    Raises:
        CheckpointError: it is none.
    """
    try:
        state = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        torch.Generator(device).set_state(state)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"the state of a random generator is damaged ({error!s:.80}).") from error
    return state


GLOBAL_STATES = {
    "torch": forms.is_hex,
    "cuda": [forms.is_hex],
    "python": forms.row(forms.is_count, [forms.is_count], forms.optional(forms.is_number)),
    "numpy": forms.row(forms.is_text, [forms.is_count], forms.is_count, forms.is_count, forms.is_number),
}
"""What `global_states` returns."""


def global_states(*, cuda: bool = True) -> dict[str, Any]:
    """The states of the global generators, as plain values: torch's on the CPU and the GPUs, Python's and numpy's."""
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, state, following = random.getstate()
    devices = torch.cuda.get_rng_state_all() if cuda and torch.cuda.is_available() else []
    return {
        "torch": to_text(torch.get_rng_state()),
        "cuda": [to_text(state) for state in devices],
        "python": [version, list(state), following],
        "numpy": [str(name), np.asarray(words).tolist(), int(position), int(has_gauss), float(gauss)],
    }


def check_global_states(states: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where `set_global_states` would fail."""
    from_text(states["torch"])
    try:
        random.Random().setstate((states["python"][0], tuple(states["python"][1]), states["python"][2]))
        np.random.RandomState().set_state(_numpy_state(states["numpy"]))
    except (ValueError, TypeError, OverflowError, KeyError) as error:
        raise CheckpointError(f"the state of a random generator is damaged ({error!s:.80}).") from error
    for index, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        from_text(state, f"cuda:{index}")


def set_global_states(states: Mapping[str, Any]) -> None:
    """Put the global generators where `global_states` found them; GPUs that are not here are left out."""
    torch.set_rng_state(from_text(states["torch"]))
    random.setstate((states["python"][0], tuple(states["python"][1]), states["python"][2]))
    np.random.set_state(_numpy_state(states["numpy"]))
    for index, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(from_text(state, f"cuda:{index}"), index)


def _numpy_state(state: Sequence[Any]) -> tuple[str, Any, int, int, float]:
    name, words, position, has_gauss, gauss = state
    return name, np.array(words, dtype=np.uint32), position, has_gauss, gauss
