"""One private step through the public API without noise, and the textbook's answer to it, for a layer case."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from layer_case import RECORDS, Case
from single_record import Gradients, bound_that_clips_some, gradients_of_each_record
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset

from ghostgrad import BatchMemoryManager, PrivacyEngine

MODES = ["hooks", "functorch", "ghost", "bk"]


@functools.cache
def truth(case: Case, dtype: torch.dtype = torch.float64) -> tuple[list[Gradients], float]:
    """Each record's gradient, alone and in float64, and a bound that clips some of them."""
    each = gradients_of_each_record(case.model(dtype), case.losses, case.batch(dtype), case.batch_dims)
    return each, bound_that_clips_some(each)


def read(model: nn.Module) -> Gradients:
    """``p.grad`` of every trainable parameter; all of them are set after a step."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


def step_by_hand(
    case: Case,
    mode: str,
    *,
    max_grad_norm: Any,
    parts: Sequence[int] = (RECORDS,),
    loss_reduction: str = "mean",
    dtype: torch.dtype = torch.float64,
    clipping: str = "flat",
    expected_batch_size: float = RECORDS,
    max_memory: int | None = None,
) -> Gradients:
    """One step; the batch comes in ``parts`` of these sizes, a backward each."""
    model = case.model(dtype)
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=expected_batch_size, noise_multiplier=0.0, max_grad_norm=max_grad_norm, clipping=clipping,
        grad_sample_mode=mode, loss_reduction=loss_reduction, batch_first=case.batch_first, max_memory=max_memory,
    )  # fmt: skip
    for part in _cut(case, case.batch(dtype), parts):
        _reduced(case.losses(model, *part), loss_reduction).backward()
    optimizer.step()
    return read(model)


def _cut(case: Case, batch: Sequence[Tensor], parts: Sequence[int]) -> Iterator[list[Tensor]]:
    assert sum(parts) == RECORDS
    start = 0
    for part in parts:
        yield [t.narrow(dim, start, part) for t, dim in zip(batch, case.batch_dims, strict=True)]
        start += part


def _reduced(losses: Tensor, loss_reduction: str) -> Tensor:
    return losses.mean() if loss_reduction == "mean" else losses.sum()


def step_from_loader(
    case: Case,
    mode: str,
    *,
    max_grad_norm: float,
    physical: int | None = None,
    accumulation_steps: int = 1,
    loss_reduction: str = "mean",
    max_memory: int | None = None,
) -> Gradients:
    """One step over all records, drawn by the private loader and handed out in pieces."""
    model, batch, dims = case.model(), case.batch(), case.batch_dims

    def collate(records: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [torch.stack(column, dim) for column, dim in zip(zip(*records, strict=True), dims, strict=True)]

    data = StackDataset(*(t.movedim(dim, 0) for t, dim in zip(batch, dims, strict=True)))
    model, optimizer, loader = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=RECORDS // accumulation_steps, collate_fn=collate),
        sample_rate=1.0, noise_multiplier=0.0, max_grad_norm=max_grad_norm, accumulation_steps=accumulation_steps,
        grad_sample_mode=mode, loss_reduction=loss_reduction, batch_first=case.batch_first, max_memory=max_memory,
    )  # fmt: skip
    if physical is None:
        return _train(case, model, optimizer, loader, loss_reduction)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as pieces:
        return _train(case, model, optimizer, pieces, loss_reduction)


def sampled_steps(
    case: Case, mode: str, *, max_grad_norm: float, sample_rate: float
) -> list[tuple[list[int], Gradients]]:
    """The drawn records and the gradient of each step of one pass, in single records, three parts to a logical batch."""
    model, batch, dims = case.model(), case.batch(), case.batch_dims

    def collate(records: list[tuple[Tensor, ...]]) -> list[Tensor]:
        *columns, numbers = zip(*records, strict=True)
        return [*(torch.stack(column, dim) for column, dim in zip(columns, dims, strict=True)), torch.stack(numbers)]

    data = StackDataset(*(t.movedim(dim, 0) for t, dim in zip(batch, dims, strict=True)), torch.arange(RECORDS))
    model, optimizer, loader = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data, batch_size=1, collate_fn=collate), sample_rate=sample_rate, noise_multiplier=0.0,
        max_grad_norm=max_grad_norm, accumulation_steps=3, grad_sample_mode=mode, batch_first=case.batch_first,
    )  # fmt: skip
    found: list[tuple[list[int], Gradients]] = []
    drawn: list[int] = []
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=1, optimizer=optimizer) as pieces:
        for *columns, numbers in pieces:
            case.losses(model, *columns).mean().backward()
            optimizer.step()
            drawn += numbers.tolist()
            if optimizer.steps > len(found):
                found.append((drawn, read(model)))
                drawn = []
            optimizer.zero_grad()
    return found


def _train(case: Case, model: nn.Module, optimizer: Any, loader: Any, loss_reduction: str) -> Gradients:
    """The user's loop until the first step was released."""
    for batch in loader:
        _reduced(case.losses(model, *batch), loss_reduction).backward()
        optimizer.step()
        if optimizer.steps:
            return read(model)
        optimizer.zero_grad()
    raise AssertionError("no step was released")
