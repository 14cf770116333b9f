"""Gaussian noise addressed by (run key, step, parameter, element)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ghostgrad.keys import RunKey
from ghostgrad.keystream import Keystream, keystream_type
from ghostgrad.noise._box_muller import Draw, add_gaussians
from ghostgrad.noise.mechanism import check_request

_SECURE_TERMS = 4


class KeyedGaussian:
    """Independent ``N(0, std^2)`` values, each a pure function of the run key and of its own address.

    The value for element ``offset + j`` of parameter ``index`` in step ``step`` does not depend on what was drawn
    before, on how the parameter was cut into slices, or on the number of threads; so a resumed run repeats no noise,
    and ranks that each draw a share draw together what one process draws. Words come from AES-256 in counter mode
    where the package ``cryptography`` is installed, else from Philox4x64-10, and become Gaussians by Box and Muller
    (1958).

    Formal guarantee: added to a sum whose L2 sensitivity under adding or removing one record is ``s``, with
    ``std = noise_multiplier * s``, this is the Gaussian mechanism of that noise multiplier, in floating point. With
    ``secure=True`` each value is the sum of four Gaussians divided by 2, so that inverting the floating-point
    Box-Muller transform no longer identifies values that only one of two neighbouring sums can produce (Holohan and
    Braghin 2021); the price is four times the work.

    Args:
        key: the run key; who knows it can subtract the noise.
        secure: demand the cryptographic source and sum four Gaussians. Default ``False``.

    Raises:
        MissingDependencyError: ``secure=True`` without ``cryptography``.

    >>> noise = KeyedGaussian(RunKey.from_seed(0))
    >>> whole, part = torch.zeros(1000), torch.zeros(10)
    >>> noise.add_(whole, std=2.0, step=5, index=1)
    >>> noise.add_(part, std=2.0, step=5, index=1, offset=333)
    >>> torch.equal(part, whole[333:343])
    True
    """

    name: str

    def __init__(self, key: RunKey, *, secure: bool = False) -> None:
        self._key = key
        self._course = b""
        self._stream_type = keystream_type(cryptographic=secure)
        self._terms = _SECURE_TERMS if secure else 1
        kind = f"sum of {_SECURE_TERMS} Gaussians" if secure else "Gaussian"
        self.name = f"{kind} ({self._stream_type.name} keystream)"

    def __repr__(self) -> str:
        return f"KeyedGaussian({self.name})"

    def add_(self, tensor: torch.Tensor, *, std: float, step: int, index: int, offset: int = 0) -> None:
        """Add noise to ``tensor`` in place.

        Args:
            tensor: float32 or float64, any shape, device and strides; its elements in row-major order take the
                values of addresses ``offset, offset + 1, ...``.
            std: standard deviation, in the units of ``tensor``; 0 adds nothing.
            step: number of the logical step.
            index: number of the parameter.
            offset: address of the first element, for a slice of a flat parameter. Default 0.

        Raises:
            ConfigurationError: negative or non-finite ``std``, a negative address, another dtype.
        """
        check_request(tensor, std=std, step=step, index=index, offset=offset)
        self._add([(index, tensor, offset)], std=std, step=step)

    def add_all_(self, slices: Sequence[tuple[int, Tensor, int]], *, std: float, step: int) -> None:
        """Add noise to several parameters, or slices of them, in place: `add_` for each, in one go.

        Args:
            slices: ``(index, tensor, offset)`` of each.
            std, step: as in `add_`.

        Raises:
            ConfigurationError: as `add_`.
        """
        for index, tensor, offset in slices:
            check_request(tensor, std=std, step=step, index=index, offset=offset)
        self._add(slices, std=std, step=step)

    @torch.no_grad()
    def _add(self, requests: Sequence[tuple[int, Tensor, int]], *, std: float, step: int) -> None:
        if std == 0:
            return
        flats = [_flat(tensor) for _, tensor, _ in requests]
        for dtype in {flat.dtype for flat in flats}:
            draws = (
                Draw(self._streams(step, index), flat, offset)
                for (index, _, offset), flat in zip(requests, flats, strict=True)
                if flat.dtype == dtype
            )
            add_gaussians(draws, std=std, dtype=dtype)
        for (_, tensor, _), flat in zip(requests, flats, strict=True):
            if not _in_place(tensor):
                tensor.add_(flat.view(tensor.shape).to(tensor.device))

    def _streams(self, step: int, index: int) -> list[Keystream]:
        lanes = [()] if self._terms == 1 else [(lane,) for lane in range(self._terms)]
        course = (int.from_bytes(self._course, "big"),) if self._course else ()
        return [self._stream_type(self._key.derive("noise", *course, step, index, *lane)) for lane in lanes]

    def follow(self, facts: str) -> None:
        """Make all later noise a function of these public facts too, and of those before them.

        Two runs with one key whose facts differ in a step (the clipping bound, the learning rate) draw independent noise in
        it and from there on.
        """
        self._course = hashlib.blake2b(self._course + facts.encode(), digest_size=16).digest()

    def rekey(self, key: RunKey) -> None:
        """Draw from another key."""
        self._key = key

    def state_dict(self) -> dict[str, Any]:
        """What `follow` has led to; not the key."""
        return {"course": self._course.hex()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._course = bytes.fromhex(state["course"])


def _in_place(tensor: Tensor) -> bool:
    """Whether noise can be added where the tensor is."""
    return tensor.is_contiguous() and tensor.device.type == "cpu"


def _flat(tensor: Tensor) -> Tensor:
    """What the noise of a tensor is added to."""
    return tensor.view(-1) if _in_place(tensor) else torch.zeros(tensor.numel(), dtype=tensor.dtype)
