"""What a layer case is: a model, a batch for it, and each record's loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[..., Any]

RECORDS = 7
"""Odd and prime: no part of a batch is a whole share of it, and no fold is mistaken for the batch."""


def call_model(model: nn.Module, *inputs: Tensor) -> Any:
    return model(*inputs)


def randn(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """One input of normal numbers, [RECORDS, *shape]; some records are larger than others."""
    return lambda: (sizes(1 + len(shape)) * torch.randn(RECORDS, *shape, dtype=torch.float64),)


def ids(rows: int, *shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """One input of row numbers, [RECORDS, *shape]."""
    return lambda: (torch.randint(rows, (RECORDS, *shape)),)


def sizes(dims: int) -> Tensor:
    return torch.linspace(0.3, 2.0, RECORDS, dtype=torch.float64).view(-1, *[1] * (dims - 1))


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Attributes:
        name: shown by pytest.
        build: makes the model; its parameters are drawn anew afterwards.
        inputs: makes the input tensors.
        run: from model and inputs to outputs.
        dims: the batch dimension of each input.
        out_dim: the batch dimension of the outputs.
        batch_first: as in ``make_private``.
        generic: whether the generic rule can surely answer for it too; where not, functorch mode may refuse it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    run: Run = call_model
    dims: tuple[int, ...] | None = None
    out_dim: int = 0
    batch_first: bool = True
    generic: bool = True

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        model = self.build()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.5 * torch.randn_like(p))
        return model.to(dtype)

    def batch(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """The inputs and one target a record."""
        torch.manual_seed(1)
        batch = (*self.inputs(), torch.linspace(-1, 2, RECORDS, dtype=torch.float64))
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)

    @property
    def batch_dims(self) -> tuple[int, ...]:
        return (*(self.dims or (0,) * (len(self.batch()) - 1)), 0)

    def losses(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Each record's loss [n]: uneven over the outputs, so that no two of them can change places."""
        *inputs, target = batch
        total = torch.zeros_like(target)
        for out in floats(self.run(model, *inputs)):
            rows = out.movedim(self.out_dim, 0)
            rows = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
            weights = torch.cos(torch.arange(rows.shape[1], device=rows.device)).to(rows.dtype)
            total = total + ((rows - target.unsqueeze(1)).square() * weights + rows * weights.flip(0)).sum(1)
        return total


def floats(tree: Any) -> Iterator[Tensor]:
    """The floating tensors in an output."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from floats(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from floats(value)
    elif dataclasses.is_dataclass(tree):
        for entry in dataclasses.fields(tree):
            yield from floats(getattr(tree, entry.name))


def frozen(build: Callable[[], nn.Module], *names: str) -> Callable[[], nn.Module]:
    """The model with the parameters of these last names not trained."""

    def built() -> nn.Module:
        model = build()
        for name, p in model.named_parameters():
            p.requires_grad_(name.rsplit(".", 1)[-1] not in names)
        return model

    return built
