"""The nodes put into the user's graph: a probe behind every call of a module, a boundary behind the root's outputs with an
outline of each in front of it, and a gate in front of modules whose weights are gathered for their call.

Gradients pass through all of them unchanged. What is handed on is ``tensor.detach()`` and not a view, so operations in place
behind them keep working.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ghostgrad.errors import PrivacyError

Listener = Callable[[Callable[[], tuple[Tensor, ...]], tuple[Tensor | None, ...]], None]
"""Is given the kept tensors, on demand, and the gradients of the outputs when a probe fires."""


class Probe(torch.autograd.Function):
    """Passes a module's outputs on; its backward tells the listener and returns no gradient for parameters.

    The parameters are inputs only so that the outputs depend on them and the backward comes by. What is kept goes through
    ``save_for_backward``: activation checkpointing then drops and recomputes it like anything else, and a change in place is
    noticed by autograd itself.
    """

    @staticmethod
    def forward(ctx: Any, listener: Listener, keep: tuple[Tensor, ...], count: int, *tensors: Tensor) -> Any:
        ctx.listener, ctx.others = listener, len(tensors) - count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*keep)
        return tuple(out.detach() for out in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if any(grad is not None for grad in grads):
            ctx.listener(lambda: ctx.saved_tensors, grads)
        return (None, None, None, *grads, *[None] * ctx.others)


class Gate(torch.autograd.Function):
    """Passes a module's inputs on; its backward says that the gradient has gone through the module."""

    @staticmethod
    def forward(ctx: Any, passed: Callable[[], None], *tensors: Tensor) -> Any:
        ctx.passed = passed
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.passed()
        return (None, *grads)


class Outline(torch.autograd.Function):
    """A tensor with the shape and the graph of another, but not its memory: a backward begins at it as it would at the other."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_zeros(()).expand(tensor.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Boundary(torch.autograd.Function):
    """Cuts the root's outputs off their graph; its backward runs that graph as often as the clipper needs.

    ``backward`` is handed the gradients of the outputs and returns those of the root's inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, backward: Callable[..., Any], tape: Any, knowledge: Any, batch_first: bool, anchor: Tensor, inputs: int,
        *tensors: Tensor,
    ) -> Any:  # fmt: skip
        # The anchor requires grad, so the outputs do, also where no input does.
        # Looked at when the loss is checked, on the way from it to here.
        ctx.tape, ctx.knowledge, ctx.batch_first, ctx.outputs = tape, knowledge, batch_first, len(tensors) - inputs
        ctx.run, ctx.inputs, ctx.others = backward, inputs, len(tensors) - inputs
        ctx.set_materialize_grads(False)
        return tuple(out.detach() for out in tensors[inputs:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # else what depends on these gradients would silently have none of its own
            raise PrivacyError(
                "gradients through the private model were asked for with create_graph=True (a gradient penalty, a second "
                "derivative). Gradients of gradients are not taken record by record. Leave the penalty out, or train on inputs "
                "that were perturbed by torch.autograd.grad without create_graph."
            )
        return (*[None] * 6, *ctx.run(grads), *[None] * ctx.others)
