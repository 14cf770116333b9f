"""The same step by Opacus 1.6, from its own engine, for the comparison in the zoo."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from architectures.architecture import RECORDS, Architecture, call
from architectures.single_record import Gradients, Reference, losses


class _Criterion:
    """Cross-entropy of each record; Opacus sets ``reduction`` to "none" while it wants these."""

    reduction = "mean"

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        each = losses(scores, targets)
        return each.mean() if self.reduction == "mean" else each


def opacus_step(architecture: Architecture, truth: Reference, mode: str) -> Gradients:
    """``p.grad`` after a step of Opacus without noise on the same batch; whatever it raises goes through.

    Args:
        architecture: what the model is.
        truth: the model, its batch, and the bound.
        mode: ``"hooks"`` or ``"ghost"``.
    """
    from opacus import PrivacyEngine

    model = copy.deepcopy(truth.model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    made = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(TensorDataset(torch.zeros(RECORDS)), batch_size=RECORDS),
        criterion=_Criterion(), noise_multiplier=0.0, max_grad_norm=truth.bound, poisson_sampling=False,
        grad_sample_mode=mode,
    )  # fmt: skip
    wrapped, private = made[0], made[1]
    criterion = made[2] if mode == "ghost" else _Criterion()
    private.zero_grad()
    torch.manual_seed(2)
    criterion(architecture.scores(call(wrapped, truth.batch)), truth.targets).backward()
    private.step()
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: p.grad for p in wrapped.parameters() if p.requires_grad and p in names and p.grad is not None}
