"""Shows, on the first batch, that the gradient of a record's outputs does not depend on other records' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ghostgrad.errors import PrivacyError
from ghostgrad.layers import Rows
from ghostgrad.recording import proofs

_TOLERANCE = 1e-6


def check(loss: Tensor, boundaries: Sequence[Any]) -> None:
    """Differentiate the loss twice: d(gradient of some records' outputs) / d(outputs of the others) must be zero.

    Losses without a second derivative in torch are passed over.

    Raises:
        PrivacyError: for in-batch negatives, centring over the batch, and other losses that compare records.
    """
    edges = [GradientEdge(node, i) for node in boundaries for i in range(node.outputs)]
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
