"""The textbook step of one model: its records one by one, and the same step through a private engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.architecture import RECORDS, Architecture, Batch, call, one_record

Gradients = dict[str, Tensor]

EXACT = 2e-4
"""How far the update of a whole model in float32 may be from the textbook's, relative to its norm."""

EXACT_PARAMETER = 1e-2
"""How far one parameter's may be, relative to its own norm, or to a thousandth of the whole where that is smaller."""


@dataclass(frozen=True)
class Reference:
    """What a step without noise has to write into ``p.grad``."""

    model: nn.Module
    batch: Batch
    targets: Tensor
    bound: float
    gradients: Gradients


def losses(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each record, [n]: mean over its positions (pixels, tokens)."""
    scores = scores.movedim(1, -1) if scores.dim() == 4 else scores
    every = F.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1), reduction="none")
    return every.view(len(scores), -1).mean(1)


def reference(architecture: Architecture) -> Reference:
    """The clipped sum of the records' gradients by plain autograd, one record at a time, divided by their number."""
    model, batch = architecture.make(), architecture.make_batch()
    with torch.no_grad():
        scores = architecture.scores(call(copy.deepcopy(model), batch))
    shape = scores.shape[:1] + scores.shape[2:] if scores.dim() == 4 else scores.shape[:-1]
    classes = scores.shape[1] if scores.dim() == 4 else scores.shape[-1]
    targets = torch.randint(classes, shape)
    each = [_alone(architecture, model, one_record(batch, i), targets[i : i + 1]) for i in range(RECORDS)]
    norms = sorted(norm(gradients) for gradients in each)
    bound = norms[RECORDS // 2]
    parts = [{name: g * min(1.0, bound / norm(gradients)) for name, g in gradients.items()} for gradients in each]
    total = {name: torch.stack([part[name] for part in parts]).sum(0) / RECORDS for name in parts[0]}
    return Reference(model, batch, targets, bound, total)


def _alone(architecture: Architecture, model: nn.Module, record: Batch, target: Tensor) -> Gradients:
    alone = copy.deepcopy(model)
    losses(architecture.scores(call(alone, record)), target).sum().backward()
    trained = {name: p for name, p in alone.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


def norm(gradients: Mapping[str, Tensor]) -> float:
    """The L2 norm over all parameters."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def private_step(architecture: Architecture, truth: Reference, mode: str) -> Gradients:
    """``p.grad`` after a private step without noise on the same batch."""
    from ghostgrad import PrivacyEngine

    model = copy.deepcopy(truth.model)
    engine = PrivacyEngine()
    model, optimizer, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=None, noise_multiplier=0.0,
        max_grad_norm=truth.bound, grad_sample_mode=mode, sample_rate=0.01, expected_batch_size=float(RECORDS),
    )  # fmt: skip
    torch.manual_seed(2)
    losses(architecture.scores(call(model, truth.batch)), truth.targets).mean().backward()
    optimizer.step()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    engine.detach()
    return found


def difference(found: Gradients, truth: Gradients) -> str | None:
    """What is wrong with a step, or None."""
    missing = [name for name in truth if found.get(name) is None]
    if missing:
        return f"no gradient for {missing[0]} and {len(missing) - 1} others"
    whole = norm(truth)
    gaps = {name: float((found[name].double() - g.double()).norm()) for name, g in truth.items()}
    total = math.sqrt(sum(gap * gap for gap in gaps.values()))
    off = {n: g for n, g in gaps.items() if g > EXACT_PARAMETER * max(float(truth[n].norm()), 1e-3 * whole) or g != g}
    if total <= EXACT * whole and not off:
        return None
    worst = max(off or gaps, key=lambda name: gaps[name])
    return f"off by {total / whole:.1e} of the update's norm; most in {worst}"


def difference_with_dropout(architecture: Architecture, truth: Reference) -> str | None:
    """What is wrong with a private step of the model with dropout, or None.

    With a bound that no record reaches, the step is that of plain autograd on the whole batch under the same masks.
    """
    model = _with_dropout(copy.deepcopy(truth.model))
    plain = copy.deepcopy(model)
    torch.manual_seed(2)
    losses(architecture.scores(call(plain, truth.batch)), truth.targets).mean().backward()
    expected = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in plain.named_parameters() if p.requires_grad
    }
    loose = Reference(model, truth.batch, truth.targets, 1e9, expected)
    return difference(private_step(architecture, loose, "bk"), expected)


def _with_dropout(model: nn.Module, probability: float = 0.1) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = probability
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, probability)
    return model
