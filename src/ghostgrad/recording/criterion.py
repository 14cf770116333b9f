"""A criterion whose values can be shown to be the mean or the sum of the records' own losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ghostgrad.errors import ConfigurationError, PrivacyError
from ghostgrad.recording.hooks import Hook
from ghostgrad.recording.loss_terms import attach_evidence
from ghostgrad.recording.rows import count_records
from ghostgrad.tree import map_tensors, tensors

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far the sum of the parts may be from the whole, relative to the sum of their sizes."""


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


class Evidence:
    """One value of a criterion, to be shown to be the mean (sum) of its records' own losses by taking it apart.

    Args:
        call: evaluates the criterion without hooks.
        args, kwargs: what it was called with, tensors detached.
        loss: what it gave.
        reduction: ``"mean"`` or ``"sum"``.
        batch_first: whether the arguments lead with the batch.
    """

    def __init__(
        self, call: Callable[..., Any], args: Any, kwargs: Any, loss: Tensor, reduction: str, *, batch_first: bool
    ) -> None:
        self._call, self._batch, self._loss = call, (args, kwargs), loss.detach()
        self._reduction, self._batch_first = reduction, batch_first
        self._shown: bool | None = None

    def shown(self) -> bool:
        """Whether it is; False where it cannot be taken apart: one record, arguments that do not lead with the batch, NaN.

        Raises:
            PrivacyError: it is not.
        """
        if self._shown is None:
            self._shown = self._show()
        return self._shown

    def _show(self) -> bool:
        found = tensors(self._batch)
        n = count_records(*self._batch, None, batch_first=self._batch_first) if found else 0
        dim = 0 if self._batch_first else 1
        if n < 2 or not all(t.dim() > dim and t.shape[dim] == n for t in found if t.dim()):
            return False
        try:
            with torch.no_grad():
                parts = torch.stack([self._alone(i, dim) for i in range(n)])
        except (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError):
            return False  # it does not take a batch of one record
        whole = self._loss.double().reshape(()) * (n if self._reduction == "mean" else 1)
        if not bool(whole.isfinite()):
            return False  # a value that is not finite says nothing about the others
        gap, size = (parts.sum() - whole).abs(), torch.maximum(parts.abs().sum(), whole.abs()).clamp(min=1e-6)
        if not bool(gap <= _TOLERANCE[self._loss.dtype] * size):
            raise PrivacyError(
                f"the criterion is not the {self._reduction} of its records' own losses: taken apart, the same batch gives "
                f"another value. A loss that is normalised over the batch (class weights, counted tokens) or compares records "
                f"rescales every record when one leaves. Compute each record's loss, then their {self._reduction}."
            )
        return True

    def _alone(self, i: int, dim: int) -> Tensor:
        args, kwargs = map_tensors(lambda t: t.narrow(dim, i, 1) if t.dim() else t, self._batch)
        value: Tensor = self._call(*args, **kwargs)
        return value.double().reshape(())


def watched(
    criterion: Callable[..., Any], reduction: str, *, batch_first: bool
) -> tuple[Callable[..., Any], Callable[[], None]]:
    """The criterion, whose values carry their `Evidence`, and what ends that: a module gets a hook, a function is wrapped.

    The first value that can be taken apart is, at once; later ones where the graph of the loss does not say enough.
    """
    shown, active = False, True

    def note(args: Any, kwargs: Any, loss: Any, call: Callable[..., Any]) -> None:
        nonlocal shown
        if not active or not isinstance(loss, Tensor) or loss.numel() != 1 or loss.grad_fn is None:
            return
        args, kwargs = map_tensors(lambda t: t.detach(), (args, kwargs))
        evidence = Evidence(call, args, kwargs, loss, reduction, batch_first=batch_first)
        shown = shown or evidence.shown()
        attach_evidence(loss.grad_fn, evidence)

    def stop() -> None:
        nonlocal active
        active = False

    if isinstance(criterion, nn.Module):

        def hook(module: nn.Module, args: Any, kwargs: Any, loss: Any) -> None:
            note(args, kwargs, loss, module.forward)

        return criterion, criterion.register_forward_hook(Hook(hook), with_kwargs=True).remove

    @functools.wraps(criterion)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        loss = criterion(*args, **kwargs)
        note(args, kwargs, loss, criterion)
        return loss

    return wrapper, stop
