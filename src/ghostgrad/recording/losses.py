"""Looks at the user's loss, when its backward is called, for what would let one record change how others count.

The gradients that arrive at the model show no trace of a divisor that depends on the batch, so it is looked for in the graph
between the loss and the model: autograd's nodes say what they were made from. They forget it as soon as they have run, and
torch has no hook for the start of a backward; therefore `torch.autograd.backward` is wrapped while a model is private.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghostgrad.errors import PrivacyError
from ghostgrad.recording import loss_terms, separable
from ghostgrad.recording.scalers import scale_in, scalers

_MOST_NODES = 10_000
"""Further nodes are not looked at: behind so many there is another network, not a loss."""

_BOUNDARY = "BoundaryBackward"


@dataclass
class LossKnowledge:
    """What is known of the losses of one private model.

    Attributes:
        reduction: the declared one.
        accumulation_steps: loader batches that make up one logical batch.
        separable: whether the gradient of a record's outputs was shown not to depend on other records' outputs.
        weights: what the terms of the loss are multiplied by, as first seen; None before.
        shown: what the terms inside the criterion were multiplied by when it was last taken apart on values.
        scale: what a GradScaler multiplied the losses of the backward under way by; 1 without one.
    """

    reduction: str
    accumulation_steps: int = 1
    separable: bool = False
    weights: list[float] | None = None
    shown: list[float] | None = None
    scale: float = 1.0


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
            scalers.start()
        self._users += 1

    def stop(self) -> None:
        """One less; the last one takes the wrapper off."""
        self._users -= 1
        if not self._users:
            scalers.stop()
        if not self._users and getattr(torch.autograd.backward, "__wrapped__", None) is self.original:
            torch.autograd.backward = self.original

    def _wrapper(self) -> Any:
        @functools.wraps(self.original)
        def backward(tensors: Tensor | Sequence[Tensor], *args: Any, **options: Any) -> None:
            if not self.depth:
                losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
                check_losses(losses, only_some_inputs=options.get("inputs") is not None or len(args) > 3)
            self.depth += 1
            try:
                self.original(tensors, *args, **options)
            finally:
                self.depth -= 1

        return backward


watch = _Watch()


def check_losses(losses: Sequence[Tensor], *, only_some_inputs: bool = False) -> None:
    """Check the losses that a backward starts from, where they lead to a private model.

    Raises:
        PrivacyError: for a loss that is not a scalar, is not a mean (or the declared sum) over the records with constant
            weights, or compares records.
    """
    graphs = [list(_nodes(loss)) for loss in losses]
    scale = scale_in(node for nodes in graphs for node in nodes)
    for loss, nodes in zip(losses, graphs, strict=True):
        boundaries = [node for node in nodes if node.name() == _BOUNDARY]
        if not boundaries:
            continue
        leading = _leading_to(boundaries, nodes)
        if only_some_inputs:
            raise PrivacyError(
                "backward(inputs=...) would not reach the parameters of the private model. Leave inputs out; for gradients of "
                "the model's inputs use torch.autograd.grad."
            )
        _check_scalar(loss)
        for boundary in boundaries:
            boundary.knowledge.scale = scale
        tape, knowledge = boundaries[0].tape, boundaries[0].knowledge
        if tape.n < 2:
            continue  # a record by itself rescales nobody, and its own mean and sum cannot be told apart
        loss_terms.check(loss.grad_fn, leading, tape.n, knowledge)
        if not knowledge.separable:
            separable.check(loss, boundaries)
            knowledge.separable = True


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


def _leading_to(boundaries: Sequence[Any], nodes: Sequence[Any]) -> list[Any]:
    """Those of the nodes that have a boundary behind them: the rest of a loss is not about records."""
    above: dict[Any, list[Any]] = {}
    for node in nodes:
        for following, _ in node.next_functions:
            above.setdefault(following, []).append(node)
    found: set[Any] = set()
    todo = list(boundaries)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(above.get(node, ()))
    return [node for node in nodes if node in found]


def _check_scalar(loss: Tensor) -> None:
    if loss.numel() != 1:
        raise PrivacyError(
            f"the loss has shape {list(loss.shape)} and is not a scalar, so how it weighs the records is not known. Take the "
            f"mean (or the sum, with loss_reduction='sum') of the records' losses before backward."
        )
