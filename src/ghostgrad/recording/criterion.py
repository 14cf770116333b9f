"""A criterion that proves, on its first batch, that it is a mean or a sum of the records' own losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ghostgrad.errors import ConfigurationError, PrivacyError
from ghostgrad.recording.rows import count_records
from ghostgrad.tree import map_tensors, tensors

_TOLERANCE = 1e-3


def check_criterion(criterion: Any, loss_reduction: str) -> None:
    """Refuse what can be seen to be wrong before any batch.

    Raises:
        ConfigurationError: not callable, another reduction than the declared one, or a class-weighted mean.
    """
    if not callable(criterion):
        raise ConfigurationError(f"criterion={criterion!r} is not callable; give a loss module or function.")
    reduction = getattr(criterion, "reduction", loss_reduction)
    if reduction in ("mean", "sum") and reduction != loss_reduction:
        raise ConfigurationError(
            f"criterion.reduction={reduction!r} but loss_reduction={loss_reduction!r}; give make_private the same one."
        )
    if reduction == "none":
        raise ConfigurationError(
            f"criterion.reduction='none' gives one loss for each record; backward needs a scalar. Build it with "
            f"reduction={loss_reduction!r}."
        )
    weighted = isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) and criterion.weight is not None
    if weighted and reduction == "mean":
        raise ConfigurationError(
            f"{type(criterion).__name__} with class weights and reduction='mean' divides by the total weight of the batch, so "
            f"one record rescales all others. Use reduction='sum' with loss_reduction='sum'."
        )


def proved(criterion: Callable[..., Any], loss_reduction: str, *, batch_first: bool) -> Callable[..., Any]:
    """The criterion, which checks itself once: a module gets a hook for its first call, a function is wrapped."""
    done = False

    def prove(args: Any, kwargs: Any, loss: Any, call: Callable[..., Any]) -> None:
        nonlocal done
        if not done and isinstance(loss, Tensor) and loss.dim() == 0 and torch.is_grad_enabled():
            done = _check(args, kwargs, loss, call, loss_reduction, batch_first=batch_first)

    if isinstance(criterion, nn.Module):

        def hook(module: nn.Module, args: Any, kwargs: Any, loss: Any) -> None:
            prove(args, kwargs, loss, module.forward)
            if done:
                handle.remove()

        handle = criterion.register_forward_hook(hook, with_kwargs=True)
        return criterion

    @functools.wraps(criterion)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        loss = criterion(*args, **kwargs)
        prove(args, kwargs, loss, criterion)
        return loss

    return wrapper


def _check(
    args: Any, kwargs: Any, loss: Tensor, call: Callable[..., Any], loss_reduction: str, *, batch_first: bool
) -> bool:
    """Whether the check could be made: it needs two records and targets that lead with the batch."""
    found = tensors((args, kwargs))
    n = count_records(args, kwargs, None, batch_first=batch_first) if found else 0
    dim = 0 if batch_first else 1
    if n < 2 or not all(t.dim() > dim and t.shape[dim] == n for t in found if t.dim()):
        return False

    def part(start: int, count: int) -> Tensor:
        cut = map_tensors(lambda t: t.detach().narrow(dim, start, count) if t.dim() else t, (args, kwargs))
        value: Tensor = call(*cut[0], **cut[1])
        return value.double() * (count if loss_reduction == "mean" else 1)

    with torch.no_grad():
        parts = part(0, 1) + part(1, n - 1)
        whole = loss.detach().double() * (n if loss_reduction == "mean" else 1)
    gap, size = (parts - whole).abs(), whole.abs().clamp(min=1e-6)
    if bool(whole.isfinite() & parts.isfinite() & (gap > _TOLERANCE * size)):
        raise PrivacyError(
            f"the criterion is not the {loss_reduction} of its records' own losses: taken apart, the same batch gives "
            f"another value. A loss that is normalised over the batch (class weights, counted tokens) or compares records "
            f"rescales every record when one leaves. Compute each record's loss, then their {loss_reduction}."
        )
    return True
