"""Looks at the user's loss, when its backward is called, for a divisor that depends on which records are in the batch.

A loss that divides by the total class weight or the number of counted tokens of the batch rescales every record when one
leaves. The gradients that arrive at the model show no trace of that, so it is looked for in the graph between the loss
and the model: autograd's nodes say what they were made from. They forget it as soon as they have run, and torch has no hook
for the start of a backward; therefore `torch.autograd.backward` is wrapped while a model is private.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ghostgrad.errors import PrivacyError

_MEAN, _SUM = 1, 2
"""`at::Reduction` in the saved attributes of torch's loss nodes."""

_MOST_NODES = 10_000
"""Further nodes are not looked at: behind so many there is another network, not a loss."""

_BOUNDARY = "BoundaryBackward"


class _Watch:
    """Wraps `torch.autograd.backward` as long as anybody needs it."""

    def __init__(self) -> None:
        self.original = torch.autograd.backward
        self.depth = 0
        self._users = 0

    def start(self) -> None:
        """One more model is private."""
        if not self._users:
            self.original = torch.autograd.backward
            torch.autograd.backward = self._wrapper()
        self._users += 1

    def stop(self) -> None:
        """One less; the last one takes the wrapper off."""
        self._users -= 1
        if not self._users and getattr(torch.autograd.backward, "__wrapped__", None) is self.original:
            torch.autograd.backward = self.original

    def _wrapper(self) -> Any:
        @functools.wraps(self.original)
        def backward(tensors: Tensor | Sequence[Tensor], *args: Any, **options: Any) -> None:
            if not self.depth:
                check_losses([tensors] if isinstance(tensors, Tensor) else list(tensors))
            self.depth += 1
            try:
                self.original(tensors, *args, **options)
            finally:
                self.depth -= 1

        return backward


watch = _Watch()


def check_losses(losses: Sequence[Tensor]) -> None:
    """Check the losses that a backward starts from, where they lead to a private model.

    Raises:
        PrivacyError: for a loss that is not a scalar, a weighted mean, a mean over non-ignored targets, or a reduction
            other than the declared one.
    """
    for loss in losses:
        nodes = list(_nodes(loss))
        boundaries = [node for node in nodes if node.name() == _BOUNDARY]
        if boundaries:
            _check_scalar(loss)
            for boundary in boundaries:
                _check_reduction(loss, boundary.loss_reduction)
            for node in nodes:
                _check_normaliser(node)


def _nodes(loss: Tensor) -> Iterator[Any]:
    """The graph's nodes from the loss down to the boundaries of private models, these included."""
    seen: set[Any] = set()
    todo: list[Any] = [loss.grad_fn]
    while todo and len(seen) < _MOST_NODES:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node.name() != _BOUNDARY:
            todo.extend(following for following, _ in node.next_functions)


def _check_scalar(loss: Tensor) -> None:
    if loss.numel() != 1:
        raise PrivacyError(
            f"the loss has shape {list(loss.shape)} and is not a scalar, so how it weighs the records is not known. Take the "
            f"mean (or the sum, with loss_reduction='sum') of the records' losses before backward."
        )


def _check_normaliser(node: Any) -> None:
    if node.name() == "DivBackward0" and not node._input_metadata[0].shape and not _is_python_number(node._saved_other):
        raise PrivacyError(
            "the loss, one number by then, is divided by a tensor, such as the number of counted tokens or the total weight "
            "in the batch: one record rescales the gradients of all others, and clipping does not bound that. Divide within "
            "each record, then take the mean over the records; divide by a constant as a Python number."
        )
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


def _is_python_number(operand: Tensor) -> bool:
    """Whether an operand was written as a number: torch lets such a one not widen another scalar's type."""
    narrow = torch.zeros((), dtype=torch.float16 if operand.is_floating_point() else torch.int8)
    return torch.result_type(operand, narrow) == narrow.dtype


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
