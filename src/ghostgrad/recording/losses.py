"""Looks at the user's loss, when its backward is called, for a divisor that depends on which records are in the batch.

A loss that divides by the total class weight or the number of counted tokens of the batch rescales every record when one
leaves. The gradients that arrive at the model show no trace of that, so it is looked for in the graph between the loss
and the model: autograd's nodes say what they were made from. They forget it as soon as they have run, and torch has no hook
for the start of a backward; therefore `torch.autograd.backward` is wrapped while a model is private.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ghostgrad.errors import PrivacyError

_MEAN, _SUM = 1, 2
"""`at::Reduction` in the saved attributes of torch's loss nodes."""

_MOST_NODES = 10_000
"""Further nodes are not looked at: behind so many there is another network, not a loss."""

_BOUNDARY = "BoundaryBackward"


class Listener(Protocol):
    """Is told of a backward before it starts."""

    def before_backward(self, losses: Sequence[Tensor]) -> None:
        """May raise to keep the backward from running."""


class _Watch:
    """Wraps `torch.autograd.backward` as long as anybody listens."""

    def __init__(self) -> None:
        self.original = torch.autograd.backward
        self.depth = 0
        self._listeners: list[Listener] = []

    def add(self, listener: Listener) -> None:
        """Start to listen."""
        if not self._listeners:
            self.original = torch.autograd.backward
            torch.autograd.backward = self._wrapper()
        self._listeners.append(listener)

    def remove(self, listener: Listener) -> None:
        """Stop to listen; the last one to leave takes the wrapper off."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            if not self._listeners and getattr(torch.autograd.backward, "__wrapped__", None) is self.original:
                torch.autograd.backward = self.original

    def _wrapper(self) -> Any:
        @functools.wraps(self.original)
        def backward(tensors: Tensor | Sequence[Tensor], *args: Any, **options: Any) -> None:
            losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            for listener in tuple(self._listeners):
                listener.before_backward(losses)
            self.depth += 1
            try:
                self.original(tensors, *args, **options)
            finally:
                self.depth -= 1

        return backward


watch = _Watch()


def check_losses(losses: Sequence[Tensor], loss_reduction: str) -> None:
    """Check the losses that a backward starts from, where they lead to a private model.

    Raises:
        PrivacyError: for a weighted mean, a mean over non-ignored targets, or a reduction other than the declared one.
    """
    for loss in losses:
        nodes = list(_nodes(loss))
        if any(following.name() == _BOUNDARY for node in nodes for following, _ in node.next_functions if following):
            _check_reduction(loss, loss_reduction)
            for node in nodes:
                _check_normaliser(node)


def _nodes(loss: Tensor) -> Iterator[Any]:
    """The graph's nodes from the loss down to the model's boundary."""
    seen: set[Any] = set()
    todo: list[Any] = [loss.grad_fn]
    while todo and len(seen) < _MOST_NODES:
        node = todo.pop()
        if node is None or node in seen or node.name() == _BOUNDARY:
            continue
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions)
        yield node


def _check_normaliser(node: Any) -> None:
    if not node.name().startswith("NllLoss") or node._saved_reduction != _MEAN:
        return
    if node._saved_weight is not None:
        raise PrivacyError(
            "the loss is a mean weighted by class: it divides by the total weight of the batch, so one record rescales the "
            "gradients of all others and clipping does not bound it. Use reduction='none' with the class weights and take "
            "the mean over the records, or loss_reduction='sum' with reduction='sum'."
        )
    if bool((node._saved_target == node._saved_ignore_index).any()):
        raise PrivacyError(
            f"the loss is a mean over the targets that are not ignored (ignore_index={node._saved_ignore_index}): it divides "
            f"by their number in the batch, so one record rescales the gradients of all others and clipping does not bound "
            f"it. Take reduction='none', the mean within each record, then the mean over the records."
        )


def _check_reduction(loss: Tensor, loss_reduction: str) -> None:
    node: Any = loss.grad_fn
    found = _MEAN if node.name() == "MeanBackward0" else getattr(node, "_saved_reduction", None)
    declared = _MEAN if loss_reduction == "mean" else _SUM
    if found in (_MEAN, _SUM) and found != declared:
        name = "mean" if found == _MEAN else "sum"
        raise PrivacyError(
            f"the loss is a {name} over the batch, but loss_reduction={loss_reduction!r}: the size of the batch, which is "
            f"private, would scale every record's gradient. Call make_private with loss_reduction={name!r}."
        )
