"""One call of a module, as a rule sees it: its arguments, the gradient of its outputs, and which record owns which row."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.layers.randomness import Randomness
from ghostgrad.tree import tensors


@dataclass(frozen=True)
class Places:
    """Which dimension of the tensors of a call holds the records, as batches of two sizes have shown it.

    Attributes:
        inputs: by place among the input tensors; None for one that is the same whatever the batch. What the two batches left
            open is missing.
        outputs: the same for the floating-point outputs.
        by_rank: for tensors of that many dimensions, where those that hold records agree.
    """

    inputs: Mapping[int, int | None] = field(default_factory=dict)
    outputs: Mapping[int, int | None] = field(default_factory=dict)
    by_rank: Mapping[int, int | None] = field(default_factory=dict)


class Rows(NamedTuple):
    """Where the records are in a tensor of a call: what two batches have shown, or else what the sizes allow.

    A layer's rows are not the records: a batch folded into ``[n * fold, ...]`` has several rows of each.
    """

    n: int
    batch_first: bool
    path: str
    least: int = 1
    """The fewest dimensions that a tensor of this layer has: [n, f] is 2, whatever f is."""
    places: Places = Places()

    def dim(self, tensor: Tensor, *, least: int | None = None) -> int | None:
        """The dimension that holds the records, or None if there is none; ``least`` where it is not the layer's."""
        if tensor.dim() in self.places.by_rank:
            return self._whole(tensor, self.places.by_rank[tensor.dim()])
        least = self.least if least is None else least
        if not self.batch_first and tensor.dim() > least and tensor.shape[1] == self.n:
            return 1
        return 0 if tensor.dim() >= least and tensor.shape[0] > 0 and tensor.shape[0] % self.n == 0 else None

    def _whole(self, tensor: Tensor, dim: int | None) -> int | None:
        """``dim`` where it holds a whole number of rows for each record."""
        return None if dim is None or not tensor.shape[dim] or tensor.shape[dim] % self.n else dim

    def input(self, place: int, tensor: Tensor) -> int | None:
        """The dimension that holds the records in one of a call's input tensors, None if there is none."""
        return self._at(self.places.inputs, place, tensor)

    def output(self, place: int, tensor: Tensor) -> int | None:
        """The same for one of its floating-point outputs, or its gradient."""
        return self._at(self.places.outputs, place, tensor)

    def _at(self, known: Mapping[int, int | None], place: int, tensor: Tensor) -> int | None:
        if place in known:
            return self._whole(tensor, known[place])
        return self.dim(tensor) if tensor.dim() else None

    def lead(self, tensor: Tensor, *, least: int | None = None) -> Tensor:
        """``tensor`` with the records (or each record's consecutive rows) first.

        Raises:
            UnsupportedModuleError: when no dimension can be the records'.
        """
        return self._lead(tensor, self.dim(tensor, least=least))

    def lead_output(self, place: int, grad: Tensor) -> Tensor:
        """The same for the gradient of one of a call's floating-point outputs."""
        return self._lead(grad, self.output(place, grad))

    def _lead(self, tensor: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            raise UnsupportedModuleError(
                f"{self.path}: a tensor of shape {list(tensor.shape)} has no dimension for the {self.n} records of this "
                f"batch, so its rows cannot be attributed to records. Give the layer inputs that lead with the batch "
                f"(expand an input without a batch dimension to it)."
            )
        return tensor.movedim(dim, 0) if dim else tensor

    def split(self, tensor: Tensor, *, least: int | None = None) -> Tensor:
        """``tensor`` as [n, fold, ...]: each record's rows by themselves; fold is 1 unless the batch was folded."""
        lead = self.lead(tensor, least=least)
        return lead.reshape(self.n, lead.shape[0] // self.n, *lead.shape[1:])

    def images(self, tensor: Tensor, dims: int | None = None) -> Tensor:
        """``tensor`` as [n, fold, ...], for layers whose own batch is always the first of (if given) ``dims`` dimensions.

        Raises:
            UnsupportedModuleError: when the first dimension is not a whole number of rows for each record.
        """
        wrong = (dims is not None and tensor.dim() != dims) or self.places.by_rank.get(tensor.dim(), 0) != 0
        if wrong or tensor.shape[0] % self.n:
            raise UnsupportedModuleError(
                f"{self.path}: met a tensor of shape {list(tensor.shape)} in a batch of {self.n} records; this layer needs "
                f"the batch as the first{'' if dims is None else f' of {dims}'} dimension(s), with a whole number of rows "
                f"for each record."
            )
        return tensor.reshape(self.n, tensor.shape[0] // self.n, *tensor.shape[1:])


@dataclass(frozen=True)
class Call:
    """What a rule is given.

    Attributes:
        module: the module that was called.
        path: its name in the root module.
        parameters: its own trainable parameters at the time of the call, by local name; the rule answers for all of them.
        args, kwargs: the arguments of the call, tensors detached.
        grad_outputs: the gradient of each floating-point output tensor in the order of `torch.utils._pytree`; None where
            nothing depended on it.
        outputs: the outputs themselves, kept only while the call is still to be proved, and for a rule that compares; else None.
        rows: where the records are.
        randomness: where the call's random numbers began, if its rule asked for that (`Rule.draws`).
        buffers: what those of the module's buffers that the call changed were before it, under the same condition.
        autocast: the context of mixed precision that the call ran in, to be entered where the module is run again; None for
            none. A backward runs outside of it.
        holds_inputs: whether the graph holds the inputs as they are until it is let go, so that keeping them takes nothing more.
    """

    module: nn.Module
    path: str
    parameters: Mapping[str, nn.Parameter]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    grad_outputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...] | None
    rows: Rows
    randomness: Randomness | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    autocast: AbstractContextManager[Any] | None = None
    holds_inputs: bool = False

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the call, passed by position or by keyword."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def input(self) -> Tensor:
        """The first argument, under the name that torch's layers give it."""
        x = self.argument(0, "input", self.kwargs.get("x"))
        if not isinstance(x, Tensor):
            raise UnsupportedModuleError(f"{self.path}: the input is a {type(x).__name__}, not a tensor.")
        return x

    def held(self) -> list[Tensor]:
        """The tensors among the arguments that the graph holds."""
        return tensors((self.args, dict(self.kwargs))) if self.holds_inputs else []

    @property
    def grad_output(self) -> Tensor:
        """The gradient of the only output."""
        (grad,) = self.grad_outputs
        if grad is None:  # the probe does not fire without any gradient
            raise UnsupportedModuleError(f"{self.path}: no gradient arrived at the output.")
        return grad


def sum_to(grads: Tensor, shape: torch.Size) -> Tensor:
    """Per-sample gradients ``[n, ..., *p]`` summed over everything between the record and the parameter: ``[n, *p]``."""
    between = tuple(range(1, grads.dim() - len(shape)))
    if any(grads.shape[dim] != 1 for dim in between):
        return grads.sum(between)
    return grads.squeeze(between) if between else grads  # no copy: it may be kept beside what it is a view of
