"""Looks at the user's loss, when its backward is called, for what would let one record change how others count.

The gradients that arrive at the model show no trace of a divisor that depends on the batch, so it is looked for in the graph
between the loss and the model: autograd's nodes say what they were made from. They forget it as soon as they have run, and
torch has no hook for the start of a backward; therefore `torch.autograd.backward` is wrapped while a model is private.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ghostgrad.errors import PrivacyError
from ghostgrad.recording import loss_padding, loss_selections, loss_terms, separable
from ghostgrad.recording.loss_graph import BOUNDARY, MOST_NODES, leading_to, nodes_of
from ghostgrad.recording.scalers import scale_in, scalers


@dataclass
class LossKnowledge:
    """What is known of the losses of one private model.

    Attributes:
        reduction: the declared one.
        accumulation_steps: loader batches that make up one logical batch.
        separable: the kinds of losses that were shown to take each record by itself, by the operations in them.
        numbers: the Python numbers in the loss, as first seen; by whether a criterion was read like the rest, of one record.
        shown: the same inside the criterion, when it was last taken apart on values.
        unpaired_sizes: sizes of batches in which no tensor of the loss had two dimensions of that size.
        scale: what a GradScaler multiplied the losses of the backward under way by; 1 without one.
    """

    reduction: str
    accumulation_steps: int = 1
    separable: set[Any] = field(default_factory=set)
    numbers: dict[bool, list[float]] = field(default_factory=dict)
    shown: list[float] | None = None
    unpaired_sizes: set[int] = field(default_factory=set)
    scale: float = 1.0


class _Watch:
    """Wraps `torch.autograd.backward` as long as anybody needs it."""

    def __init__(self) -> None:
        self.original = torch.autograd.backward
        self.depth = 0
        """How many backwards are under way, one inside the other."""
        self.begun = 0
        """How many were begun so far."""
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
        # In a training step that was compiled as one, all that is done to records would be compiled too.
        @functools.wraps(self.original)
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def backward(tensors: Tensor | Sequence[Tensor], *args: Any, **options: Any) -> None:
            losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            given = args[0] if args else options.get("grad_tensors")
            weights = given if isinstance(given, (list, tuple)) else [given]
            check_losses(
                losses,
                weighted=any(weight is not None for weight in weights),
                only_some_inputs=options.get("inputs") is not None or len(args) > 3,
                nested=bool(self.depth),
            )
            self.depth += 1
            self.begun += 1
            try:
                self.original(tensors, *args, **options)
            finally:
                self.depth -= 1

        return backward


watch = _Watch()


def check_losses(
    losses: Sequence[Tensor], *, weighted: bool = False, only_some_inputs: bool = False, nested: bool = False
) -> None:
    """Check the losses that a backward starts from, where they lead to a private model.

    Args:
        weighted: whether ``backward(gradient=...)`` weighs them.
        only_some_inputs: whether ``backward(inputs=...)`` asks for some gradients only.
        nested: whether another backward is under way, as in re-entrant checkpointing.

    Raises:
        PrivacyError: for a loss that is not a scalar, is not a mean (or the declared sum) over the records with constant
            weights, or compares records.
    """
    graphs = [list(nodes_of(loss)) for loss in losses]
    scale = scale_in(node for nodes in graphs for node in nodes)
    ends = [[node for node in nodes if node.name() == BOUNDARY] for nodes in graphs]
    _check_one_loss_each(ends)
    for loss, nodes, boundaries in zip(losses, graphs, ends, strict=True):
        if not boundaries or len(nodes) >= MOST_NODES:
            continue
        if nested and weighted:
            raise PrivacyError(
                "the private model was called inside re-entrant checkpointing, which hides the loss behind it: how it weighs the "
                "records cannot be read. Use checkpoint(..., use_reentrant=False), or checkpoint parts inside the model."
            )
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
        for of_model in _by_model(boundaries):
            _check_weights(loss, of_model, leading_to(of_model, nodes))
        for boundary in boundaries:
            boundary.tape.read = True


def _check_one_loss_each(ends: Sequence[Sequence[Any]]) -> None:
    """Each loss is read by itself, so those of one model have to be one loss."""
    models = [model for boundaries in ends for model in {id(boundary.knowledge) for boundary in boundaries}]
    if len(set(models)) < len(models):
        raise PrivacyError(
            "torch.autograd.backward was given several losses of one private model. Add them up and call backward once: "
            "(a + b).backward() has the same gradients."
        )


def _by_model(boundaries: Iterable[Any]) -> list[list[Any]]:
    found: dict[int, list[Any]] = {}
    for boundary in boundaries:
        found.setdefault(id(boundary.knowledge), []).append(boundary)
    return list(found.values())


def _check_weights(loss: Tensor, boundaries: Sequence[Any], leading: Sequence[Any]) -> None:
    """Check how a loss weighs the records of one private model."""
    tape, knowledge = boundaries[0].tape, boundaries[0].knowledge
    if not tape.n:
        return
    if tape.n > 1:  # a record by itself selects among nobody
        loss_selections.check_nodes(leading, boundaries, tape.n, knowledge)
    delivered = tape.delivery.records if tape.delivery else tape.n
    terms = loss_terms.check(loss.grad_fn, leading, tape.n, delivered, knowledge)
    padded = [own for boundary in boundaries for own in boundary.tape.padded or ()]
    if padded:
        loss_padding.check(leading, terms, tape.n, padded)
    kind = frozenset((node.name(), getattr(node, "_saved_dim", None)) for node in leading)
    joined = any(boundary.tape.n != tape.n for boundary in boundaries)  # refused when the backward ends
    if tape.n > 1 and not joined and kind not in knowledge.separable:
        separable.check(loss, boundaries)
        separable.check_terms(terms, boundaries)
        knowledge.separable.add(kind)


def _check_scalar(loss: Tensor) -> None:
    if loss.numel() != 1:
        raise PrivacyError(
            f"the loss has shape {list(loss.shape)} and is not a scalar, so how it weighs the records is not known. Take the "
            f"mean (or the sum, with loss_reduction='sum') of the records' losses before backward."
        )
