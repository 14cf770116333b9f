"""The scale of a `torch.amp.GradScaler`: read where it is applied, divided out before norms, never steered by records.

A scaler multiplies the loss so that small float16 gradients do not vanish, skips a step in which anything overflowed, and
changes its scale by that. Here the gradients are divided by the scale in float32 before they are measured, a record that
overflowed is left out like any other that is not finite, no step is skipped, and the scale stays: whether something overflowed
is a fact about private records. Scalers leave their mark on the node that multiplies the loss; `GradScaler.scale` is wrapped for
that while a model is private. Dividing by it undoes exactly what it did, whatever it is.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from ghostgrad.errors import PrivacyError
from ghostgrad.tree import tensors

_MARK = "ghostgrad: multiplied by a GradScaler"


class _Scalers:
    """Knows the scalers that are used while any model is private."""

    def __init__(self) -> None:
        self._original = GradScaler.scale
        self._known: weakref.WeakSet[GradScaler] = weakref.WeakSet()

    def start(self) -> None:
        """Mark what scalers multiply from now on."""
        self._original = original = GradScaler.scale

        @functools.wraps(original)
        def scale(scaler: GradScaler, outputs: Any) -> Any:
            scaled = original(scaler, outputs)
            if scaler.is_enabled():
                self._known.add(scaler)
                for tensor in tensors(scaled):
                    if tensor.grad_fn is not None:
                        metadata: Any = tensor.grad_fn.metadata
                        metadata[_MARK] = True
            return scaled

        GradScaler.scale = scale  # type: ignore[method-assign, assignment]

    def stop(self) -> None:
        """Leave scalers alone again."""
        if getattr(GradScaler.scale, "__wrapped__", None) is self._original:
            GradScaler.scale = self._original  # type: ignore[method-assign]

    def answer(self, optimizer: Any) -> bool:
        """Tell the scaler that steps a private optimizer now that nothing overflowed, and to keep its scale.

        Returns:
            Whether the scaler is known.
        """
        stepping = [scaler for scaler in self._known if id(optimizer) in scaler._per_optimizer_states]
        for scaler in stepping:
            device = scaler._scale.device  # type: ignore[union-attr]
            scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {
                device: torch.zeros((), device=device)
            }
            # update() adds one and lets the scale grow at growth_interval: without a way back it would only ever grow.
            scaler._growth_tracker.fill_(-1)  # type: ignore[union-attr]
        return bool(stepping)


scalers = _Scalers()


def is_scaled(node: Any) -> bool:
    """Whether a node of autograd's graph multiplies by the scale of a scaler."""
    return node.name() == "MulBackward0" and _MARK in node.metadata


def scale_in(nodes: Iterable[Any]) -> float:
    """The scale that the loss behind these nodes was multiplied by; 1 without a scaler.

    Raises:
        PrivacyError: where there are several.
    """
    found = {_factor(node) for node in nodes if is_scaled(node)}
    if len(found) > 1:
        raise PrivacyError(
            f"one backward joined losses that were scaled by {sorted(found)}: its gradients cannot be unscaled by one number. "
            f"Scale the sum of the losses once, with one GradScaler."
        )
    return found.pop() if found else 1.0


def _factor(node: Any) -> float:
    constant: Tensor = node._saved_other if node._saved_other is not None else node._saved_self
    return float(constant)
