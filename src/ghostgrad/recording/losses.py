"""Looks at the user's loss, when its backward is called, for what would let one record change how others count.

The gradients that arrive at the model show no trace of a divisor that depends on the batch, so it is looked for in the graph
between the loss and the model: autograd's nodes say what they were made from. They forget it as soon as they have run, and
torch has no hook for the start of a backward; therefore `torch.autograd.backward` is wrapped while a model is private.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ghostgrad.errors import PrivacyError
from ghostgrad.recording import loss_selections, loss_terms, separable
from ghostgrad.recording.loss_graph import BOUNDARY, leading_to, nodes_of
from ghostgrad.recording.scalers import scale_in, scalers


@dataclass
class LossKnowledge:
    """What is known of the losses of one private model.

    Attributes:
        reduction: the declared one.
        accumulation_steps: loader batches that make up one logical batch.
        separable: whether the gradient of a record's outputs was shown not to depend on other records' outputs.
        numbers: the Python numbers in the loss, as first seen; None before.
        shown: the same inside the criterion, when it was last taken apart on values.
        unpaired_sizes: sizes of batches in which no tensor of the loss had two dimensions of that size.
        scale: what a GradScaler multiplied the losses of the backward under way by; 1 without one.
    """

    reduction: str
    accumulation_steps: int = 1
    separable: bool = False
    numbers: list[float] | None = None
    shown: list[float] | None = None
    unpaired_sizes: set[int] = field(default_factory=set)
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
                given = args[0] if args else options.get("grad_tensors")
                weights = given if isinstance(given, (list, tuple)) else [given]
                check_losses(
                    losses,
                    weighted=any(weight is not None for weight in weights),
                    only_some_inputs=options.get("inputs") is not None or len(args) > 3,
                )
            self.depth += 1
            try:
                self.original(tensors, *args, **options)
            finally:
                self.depth -= 1

        return backward


watch = _Watch()


def check_losses(losses: Sequence[Tensor], *, weighted: bool = False, only_some_inputs: bool = False) -> None:
    """Check the losses that a backward starts from, where they lead to a private model.

    Args:
        weighted: whether ``backward(gradient=...)`` weighs them.
        only_some_inputs: whether ``backward(inputs=...)`` asks for some gradients only.

    Raises:
        PrivacyError: for a loss that is not a scalar, is not a mean (or the declared sum) over the records with constant
            weights, or compares records.
    """
    graphs = [list(nodes_of(loss)) for loss in losses]
    scale = scale_in(node for nodes in graphs for node in nodes)
    for loss, nodes in zip(losses, graphs, strict=True):
        boundaries = [node for node in nodes if node.name() == BOUNDARY]
        if not boundaries:
            continue
        leading = leading_to(boundaries, nodes)
        if only_some_inputs:
            raise PrivacyError(
                "backward(inputs=...) would not reach the parameters of the private model. Leave inputs out; for gradients of "
                "the model's inputs use torch.autograd.grad."
            )
        _check_scalar(loss)
        if weighted:
            raise PrivacyError(
                "backward(gradient=...) multiplies the loss by a tensor. If it was counted in the batch, one record rescales all "
                "others. Call loss.backward(), and write a constant factor into the loss as a Python number."
            )
        for boundary in boundaries:
            boundary.knowledge.scale = scale
        tape, knowledge = boundaries[0].tape, boundaries[0].knowledge
        if not tape.n:
            continue
        if tape.n > 1:  # a record by itself selects among nobody
            loss_selections.check_nodes(leading, boundaries, tape.n, knowledge)
        delivered = tape.delivery.records if tape.delivery else tape.n
        loss_terms.check(loss.grad_fn, leading, tape.n, delivered, knowledge)
        if tape.n > 1 and not knowledge.separable:
            separable.check(loss, boundaries)
            knowledge.separable = True


def _check_scalar(loss: Tensor) -> None:
    if loss.numel() != 1:
        raise PrivacyError(
            f"the loss has shape {list(loss.shape)} and is not a scalar, so how it weighs the records is not known. Take the "
            f"mean (or the sum, with loss_reduction='sum') of the records' losses before backward."
        )
