"""The slow truth: one record at a time through plain autograd, clipped and summed as the textbook says.

Nothing of the library is used here. A gradient set is a dict from parameter name to tensor; a parameter that a record does
not reach has a gradient of zeros.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
Losses = Callable[..., Tensor]
"""``losses(model, *batch)``: the loss of each record, [n]."""


def record(batch: Sequence[Tensor], index: int, dims: Sequence[int]) -> list[Tensor]:
    """One record as a batch of one; floating tensors in float64. ``dims``: which dimension of each tensor is the batch."""
    cut = [tensor.narrow(dim, index, 1) for tensor, dim in zip(batch, dims, strict=True)]
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in cut]


def gradients_of_each_record(
    model: nn.Module, losses: Losses, batch: Sequence[Tensor], dims: Sequence[int] | None = None
) -> list[Gradients]:
    """The gradient of each record's own loss, from a batch that holds nothing else."""
    dims = [0] * len(batch) if dims is None else dims
    found = []
    for index in range(batch[0].shape[dims[0]]):
        alone = copy.deepcopy(model).double()
        (loss,) = losses(alone, *record(batch, index, dims))
        loss.backward()
        trained = {name: p for name, p in alone.named_parameters() if p.requires_grad}
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
        found.append({name: grad.to_dense() if grad.is_sparse else grad for name, grad in grads.items()})
    return found


def norm(gradients: Gradients) -> float:
    """The L2 norm over all parameters."""
    return math.sqrt(sum(float(grad.square().sum()) for grad in gradients.values()))


def bound_that_clips_some(each: Sequence[Gradients]) -> float:
    """A clip bound in the middle of the records' norms."""
    norms = sorted(norm(gradients) for gradients in each)
    half = len(norms) // 2
    return (norms[half - 1] + norms[half]) / 2


def clipped(gradients: Gradients, max_grad_norm: float | Sequence[float], clipping: str, gamma: float) -> Gradients:
    """One record's gradient after clipping."""
    if clipping == "flat":
        factor = min(1.0, max_grad_norm / max(norm(gradients), 1e-300))
        return {name: grad * factor for name, grad in gradients.items()}
    if clipping == "automatic":
        factor = max_grad_norm / (norm(gradients) + gamma)
        return {name: grad * factor for name, grad in gradients.items()}
    assert clipping == "per_layer"
    bounds = [max_grad_norm] * len(gradients) if isinstance(max_grad_norm, float) else max_grad_norm
    return {
        name: grad * min(1.0, bound / max(float(grad.norm()), 1e-300))
        for (name, grad), bound in zip(gradients.items(), bounds, strict=True)
    }


def clipped_sum(
    each: Sequence[Gradients], max_grad_norm: float | Sequence[float], *, clipping: str = "flat", gamma: float = 0.01
) -> Gradients:
    """The sum of the clipped gradients."""
    parts = [clipped(gradients, max_grad_norm, clipping, gamma) for gradients in each]
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def expected_gradient(
    each: Sequence[Gradients],
    max_grad_norm: float | Sequence[float],
    *,
    expected_batch_size: float,
    loss_reduction: str = "mean",
    clipping: str = "flat",
) -> Gradients:
    """What ``p.grad`` holds after a step without noise."""
    divisor = expected_batch_size if loss_reduction == "mean" else 1.0
    return {name: total / divisor for name, total in clipped_sum(each, max_grad_norm, clipping=clipping).items()}


def assert_same_gradients(found: Gradients, expected: Gradients, *, relative: float) -> None:
    """Each parameter by itself, relative to its norm; to a thousandth of the whole where it is (nearly) zero."""
    assert found.keys() == expected.keys()
    whole = norm(expected)
    for name, grad in expected.items():
        gap = float((found[name].double() - grad).norm())
        allowed = relative * max(float(grad.norm()), 1e-3 * whole)
        assert gap <= allowed, f"{name}: off by {gap:.3e}, allowed {allowed:.3e}"
