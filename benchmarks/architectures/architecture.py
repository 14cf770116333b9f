"""One architecture: how to build it small, and a batch for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

RECORDS = 5
"""Records in a batch; differs from the other sizes, so that no dimension is taken for the batch by accident."""

Batch = tuple[Tensor, ...] | dict[str, Tensor]
"""Positional or keyword arguments of the model; every tensor leads with the records."""


@dataclass(frozen=True)
class Architecture:
    """A model that can be built without downloads, and what to feed it.

    Attributes:
        name: as users know it.
        library: the package that it comes from.
        build: makes the model, without dropout.
        batch: makes a batch of `RECORDS` records.
        scores: the tensor of the model's output that is scored.
        batch_norm: what is done with its batch normalisation: replaced by `ModuleValidator.fix`, or kept in eval mode.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    scores: Callable[[Any], Tensor]
    batch_norm: Literal["none", "replaced", "frozen"] = "none"

    def make(self) -> nn.Module:
        """The model in training mode, with weights that differ from their initial values.

        Zeros and the small numbers of layer scales would hide errors behind them.
        """
        torch.manual_seed(0)
        model = self.build()
        if self.batch_norm == "replaced":
            from ghostgrad.validation import ModuleValidator

            model = ModuleValidator.fix(model)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        if self.batch_norm == "frozen":
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return model

    def make_batch(self) -> Batch:
        """The same batch every time."""
        torch.manual_seed(1)
        return self.batch()


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output."""
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def one_record(batch: Batch, index: int) -> Batch:
    """A batch of one."""
    if isinstance(batch, dict):
        return {name: tensor[index : index + 1] for name, tensor in batch.items()}
    return tuple(tensor[index : index + 1] for tensor in batch)


def installed(library: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(library) is not None


_declared: list[torch.library.Library] = []


def declare_torchvision_operators() -> None:
    """Let torchvision and timm import beside a torch for which torchvision's compiled operators do not load."""
    if _declared or not installed("torchvision"):
        return
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(operator + schema)
        _declared.append(library)
