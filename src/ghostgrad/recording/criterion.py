"""A criterion whose values can be shown to be the mean or the sum of the records' own losses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
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

_DOES_NOT_RUN = (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError)


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
        args, kwargs: what it was called with; tensors are leaves, those that required grad still do.
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

    def gradients_shown(self) -> bool:
        """Whether its gradients are those of its records' own losses too, which values say nothing of (``l / l.detach()``).

        Raises:
            PrivacyError: they are not.
        """
        if not self.shown():
            return False
        leaves = [t for t in tensors(self._batch) if t.requires_grad]
        try:
            with torch.enable_grad():
                args, kwargs = map_tensors(torch.clone, self._batch)
                whole = self._call(*args, **kwargs).double() * self._count
                parts = torch.stack(self._parts()).sum()
            pairs = zip(_gradients(whole, leaves), _gradients(parts, leaves), strict=True)
        except _DOES_NOT_RUN:
            return False
        tolerance = _TOLERANCE[self._loss.dtype]
        if not all(_is_close(one, other, tolerance) for one, other in pairs):
            raise PrivacyError(
                f"the gradient of the criterion is not the {self._reduction} of its records' own: taken apart, the same batch "
                f"gives another one, so one record rescales others (a detached mean or count of the batch). Compute each "
                f"record's loss from that record alone, then their {self._reduction}."
            )
        return True

    def _show(self) -> bool:
        found = tensors(self._batch)
        n = count_records(*self._batch, None, batch_first=self._batch_first) if found else 0
        dim = 0 if self._batch_first else 1
        if n < 2 or not all(t.dim() > dim and t.shape[dim] == n for t in found if t.dim()):
            return False
        self._dim, self._n = dim, n
        try:
            with torch.no_grad():
                parts = torch.stack(self._parts())
        except _DOES_NOT_RUN:
            return False  # it does not take a batch of one record
        whole = self._loss.double().reshape(()) * self._count
        if not bool(whole.isfinite()):
            return False  # a value that is not finite says nothing about the others
        gap, size = (parts.sum() - whole).abs(), torch.maximum(parts.abs().sum(), whole.abs()).clamp(min=1e-6)
        if not bool(size.isfinite() & (gap <= _TOLERANCE[self._loss.dtype] * size)):
            raise PrivacyError(
                f"the criterion is not the {self._reduction} of its records' own losses: taken apart, the same batch gives "
                f"another value. A loss that is normalised over the batch (class weights, counted tokens) or compares records "
                f"rescales every record when one leaves. Compute each record's loss, then their {self._reduction}."
            )
        return True

    @property
    def _count(self) -> int:
        """What the value is multiplied by to be the sum of the parts."""
        return self._n if self._reduction == "mean" else 1

    def _parts(self) -> list[Tensor]:
        """The value of each record alone."""
        pieces = {t: torch.split(t, 1, self._dim) for t in tensors(self._batch) if t.dim()}
        return [self._alone(pieces, i) for i in range(self._n)]

    def _alone(self, pieces: Mapping[Tensor, Sequence[Tensor]], i: int) -> Tensor:
        # Cloned: what is a view among several must not be changed in place.
        args, kwargs = map_tensors(lambda t: (pieces[t][i] if t.dim() else t).clone(), self._batch)
        value: Tensor = self._call(*args, **kwargs)
        return value.double().reshape(())


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    if not leaves or not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)


def _is_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Relative to the largest element; what is not finite has to be so in both."""
    size = torch.where(one.isfinite(), one, 0).abs().max() if one.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(size), equal_nan=True)


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
        args, kwargs = map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), (args, kwargs))
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
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        loss = criterion(*args, **kwargs)
        note(args, kwargs, loss, criterion)
        return loss

    return wrapper, stop
