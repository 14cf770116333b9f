"""Holds the second backward through a graph to the first: factors from one pass bound nothing in another that differs."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ghostgrad.distributed import local
from ghostgrad.errors import PrivacyError
from ghostgrad.layers import Call
from ghostgrad.tree import tensors

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF = 2e-2
"""How far the two may be apart, relative to the norm: kernels that add up in any order do not round twice alike."""


class Passes:
    """Remembers the sum and the norm of every tensor that the first backward showed at a call; nothing else is kept."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Another backward of the user's begins."""
        self._first: dict[tuple[str, int], list[Tensor]] = {}
        self._gaps: list[Tensor] = []
        self._calls: Counter[str] = Counter()

    def first(self, call: Call) -> None:
        """A gradient arrived at a call, and its norms are taken."""
        self._first[call.path, self._calls[call.path]] = [_figures(tensor) for tensor in _seen(call)]
        self._calls[call.path] += 1

    def turn(self) -> None:
        """The second backward begins."""
        self._calls.clear()

    def second(self, call: Call) -> None:
        """A gradient arrived at the same call again, and is added up."""
        known = self._first[call.path, self._calls[call.path]]
        self._calls[call.path] += 1
        for before, tensor in zip(known, _seen(call), strict=True):
            tolerance = _TOLERANCE.get(tensor.dtype, _HALF)
            gap = (_figures(tensor) - before).abs() - tolerance * before[1]
            self._gaps.append(gap.max().to("cpu", torch.float64))

    def check(self) -> None:
        """Both have ended.

        Raises:
            PrivacyError: they differ. What is not finite is passed over: such records add nothing.
        """
        if self._gaps and bool((torch.stack(self._gaps) > 0).any()):
            raise PrivacyError(
                "the second backward of this mode met other values than the first, from which the clip factors come, so the sum "
                "is not bounded: something is drawn anew in each backward (a checkpoint with preserve_rng_state=False, a hook or "
                "an autograd function that draws or counts). Leave that out, or use grad_sample_mode='bk' without max_memory, "
                "which takes one backward."
            )


def _seen(call: Call) -> list[Tensor]:
    """The gradients that arrived, and the inputs they meet."""
    found = [*call.grad_outputs, *tensors((call.args, dict(call.kwargs)))]
    return [local(tensor) for tensor in found if tensor is not None and tensor.is_floating_point()]


def _figures(tensor: Tensor) -> Tensor:
    """Sum and norm, [2]."""
    kind = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=kind)
    return torch.stack([tensor.detach().sum(dtype=kind), norm])
