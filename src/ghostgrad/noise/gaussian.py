"""Gaussian noise addressed by (run key, step, vector, element)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ghostgrad.keys import RunKey
from ghostgrad.keystream import Keystream, keystream_type
from ghostgrad.noise._box_muller import add_gaussians
from ghostgrad.noise.mechanism import check_request

_SECURE_TERMS = 4


class KeyedGaussian:
    """Independent ``N(0, std^2)`` values, each a pure function of the run key and of its own address.

    The value for element ``offset + j`` of vector ``index`` in step ``step`` does not depend on what was drawn
    before, on how the vector was cut into slices, or on the number of threads; so a resumed run repeats no noise,
    and ranks that each draw a share draw together what one process draws. Vector 0 is the gradient, all parameters one behind the
    other. Values of float32 and float64 have nothing in common. Words come from AES-256 in counter mode
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
            index: number of the vector.
            offset: address of the first element, for a slice of a vector. Default 0.

        Raises:
            ConfigurationError: negative or non-finite ``std``, a negative address, another dtype.
        """
        self._add([(offset, tensor)], std=std, step=step, index=index)

    def add_all_(self, parts: Sequence[tuple[int, Tensor]], *, std: float, step: int) -> None:
        """Add noise to parts of vector 0 in place: `add_` for each, in one go.

        Args:
            parts: ``(offset, tensor)`` of each.
            std, step: as in `add_`.

        Raises:
            ConfigurationError: as `add_`.
        """
        self._add(parts, std=std, step=step, index=0)

    @torch.no_grad()
    def _add(self, parts: Sequence[tuple[int, Tensor]], *, std: float, step: int, index: int) -> None:
        check_request(parts, std=std, step=step, index=index)
        if std == 0:
            return
        flats, apart = [], []
        for offset, tensor in parts:
            if tensor.is_contiguous() and tensor.is_cpu:
                flats.append((offset, tensor.view(-1)))
            else:
                flats.append((offset, torch.zeros(tensor.numel(), dtype=tensor.dtype)))
                apart.append((tensor, flats[-1][1]))
        for dtype in {flat.dtype for _, flat in flats}:
            here = [(offset, flat) for offset, flat in flats if flat.dtype == dtype]
            add_gaussians(self._streams(step, index, dtype), here, std=std, dtype=dtype)
        for tensor, noise in apart:
            tensor.add_(noise.view(tensor.shape).to(tensor.device))

    def _streams(self, step: int, index: int, dtype: torch.dtype) -> list[Keystream]:
        """Those whose Gaussians are added. A page holds other addresses for each dtype, so each has streams of its own."""
        course = (int.from_bytes(self._course, "big"),) if self._course else ()
        lanes = [()] if self._terms == 1 else [(lane,) for lane in range(self._terms)]
        address = (*course, step, index, dtype.itemsize)
        return [self._stream_type(self._key.derive("noise", *address, *lane)) for lane in lanes]

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
