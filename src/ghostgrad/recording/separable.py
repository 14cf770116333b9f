"""Shows, on the first batch, that the gradient of a record's outputs does not depend on other records' outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ghostgrad.errors import PrivacyError
from ghostgrad.layers import Rows
from ghostgrad.recording import proofs
from ghostgrad.recording.loss_graph import BOUNDARY

_TOLERANCE = 1e-6


def check(loss: Tensor, boundaries: Sequence[Any]) -> None:
    """Differentiate the loss twice: d(gradient of some records' outputs) / d(outputs of the others) must be zero.

    Losses without a second derivative in torch are passed over.

    Raises:
        PrivacyError: for in-batch negatives, centring over the batch, and other losses that compare records.
    """
    edges = _edges(boundaries)
    tape, batch_first = boundaries[0].tape, boundaries[0].batch_first
    rows = Rows(tape.n, batch_first, "the loss")
    try:
        with torch.enable_grad():
            first = torch.autograd.grad(loss, edges, create_graph=True, allow_unused=True)
        if any(grad is not None and rows.dim(grad) is None for grad in first):
            return  # the recorder refuses such an output with its own reason
        for keep in proofs.random_halves(tape.n):
            _check_half(first, edges, rows, keep)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, PrivacyError):
            raise


def _check_half(first: Sequence[Tensor | None], edges: list[GradientEdge], rows: Rows, keep: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = proofs.mask_records(first, rows, keep)
    with torch.enable_grad():
        total = sum((grad * _noise_like(grad, generator)).sum() for grad in chosen if grad is not None)
    if not isinstance(total, Tensor) or not total.requires_grad:
        return  # the gradients are constants, as those of a sum are
    for second in torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True):
        if second is None:
            continue
        others = rows.split(second)[~keep.to(second.device)]
        others, scale = others[others.isfinite()], second[second.isfinite()].abs().max()
        if bool((others.abs() > _TOLERANCE * scale).any()):
            raise PrivacyError(
                "the loss compares records: the gradient of one record's outputs depends on the outputs of others (in-batch "
                "negatives, centring, a function of a batch mean), so clipping a record's own gradient does not bound it. "
                "Compute each record's loss from that record alone, then take the mean."
            )


def _noise_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)


def check_terms(terms: Sequence[Any], boundaries: Sequence[Any]) -> None:
    """Send a gradient back from the losses of some records only: it must arrive at these records' outputs alone.

    Needs no second derivative, so it sees comparisons that have none (absolute differences, hinges).

    Args:
        terms: what the loss adds up (`loss_terms.Term`).
        boundaries: nodes of the model's outputs.

    Raises:
        PrivacyError: for a loss of one record that is computed from other records' outputs.
    """
    for term in terms:
        inside = set(term.inside)
        for child, place in term.inside[0].next_functions if inside and not term.of_one else ():
            if child in inside and child.name() != BOUNDARY and not _is_by_record(child, place, boundaries):
                raise PrivacyError(
                    "the loss compares records: the loss of one record is computed from the outputs of others (a shifted or "
                    "reversed batch, pairs, centring over the batch), so clipping a record's own gradient does not bound it. "
                    "Compute each record's loss from that record alone, then take the mean."
                )


def reaches_one(node: Any, boundaries: Sequence[Any], n: int) -> bool:
    """Whether a gradient from the one output of a node arrives at the outputs of one record."""
    if len(node._input_metadata) > 1:
        return False
    try:
        grad, rows = _random_at(node, 0), Rows(n, boundaries[0].batch_first, "the loss")
        return int(_reached(GradientEdge(node, 0), _edges(boundaries), rows, grad).sum()) <= 1
    except (RuntimeError, NotImplementedError):
        return False


def _is_by_record(node: Any, place: int, boundaries: Sequence[Any]) -> bool:
    """Whether each element of an output depends on one record; also where autograd cannot say it."""
    grad, edges = _random_at(node, place), _edges(boundaries)
    rows = Rows(boundaries[0].tape.n, boundaries[0].batch_first, "the loss")
    edge = GradientEdge(node, place)
    try:
        return any(_is_isolated(edge, edges, rows, grad, whose) for whose in _layouts(grad.shape, rows.n))
    except (RuntimeError, NotImplementedError):
        return True


def _edges(boundaries: Sequence[Any]) -> list[GradientEdge]:
    return [GradientEdge(node, i) for node in boundaries for i in range(node.outputs)]


def _random_at(node: Any, place: int) -> Tensor:
    like = node._input_metadata[place]
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.to(like.device, like.dtype)


def _layouts(shape: torch.Size, n: int) -> Iterator[Tensor]:
    """To which record each element may belong: records are the slower or the faster part of a dimension, or of all."""
    flat = torch.arange(math.prod(shape)).view(shape)
    for dim, size in enumerate(shape):
        if size % n == 0:
            view = [1] * len(shape)
            view[dim] = size
            places = torch.arange(size).view(view).expand(shape)
            yield places.div(size // n, rounding_mode="floor")
            if size > n:
                yield places % n
    if flat.numel() % n == 0:
        yield flat.div(flat.numel() // n, rounding_mode="floor")
        yield flat % n


def _is_isolated(edge: GradientEdge, edges: list[GradientEdge], rows: Rows, grad: Tensor, whose: Tensor) -> bool:
    for keep in proofs.random_halves(rows.n):
        mask = keep[whose].to(grad.device)
        reached = _reached(edge, edges, rows, torch.where(mask, grad, torch.zeros_like(grad)))
        if bool((reached & ~keep).any()):
            return False
    return True


def _reached(edge: GradientEdge, edges: list[GradientEdge], rows: Rows, grad: Tensor) -> Tensor:
    """At the outputs of which records [n] a gradient arrives."""
    reached = torch.zeros(rows.n, dtype=torch.bool)
    for found in torch.autograd.grad(edge, edges, grad, retain_graph=True, allow_unused=True):
        if found is not None and found.numel() and rows.dim(found) is not None:
            sizes = rows.split(found).flatten(1).nan_to_num().abs().amax(1).cpu()
            reached |= sizes > _TOLERANCE * sizes.max()
    return reached
