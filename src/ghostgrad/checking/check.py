"""Compares every clipper with the loop over single records, and looks for records that touch each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghostgrad import setup
from ghostgrad.checking.records import Batch, Gradients, LossFunction, Subject, add, norm, randomness_kept
from ghostgrad.checking.report import CheckReport, Finding
from ghostgrad.clipping import ClippedSum, Clipper, FlatClipping, Mode
from ghostgrad.errors import ConfigurationError, GhostgradError, PrivacyError, UnsupportedModuleError, choose
from ghostgrad.layers import Rows
from ghostgrad.recording import Recorder
from ghostgrad.recording.proofs import no_gradients

_EXACT = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""How far a clipper's sum may be from the loop's, relative to it; no more than rounding in that precision."""

_TOUCHES = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""How far an output, or its gradient, may move when another record leaves, relative to the largest."""

_MODEL_MIXES = (
    "The model's output for a record depends on which others are in the batch (batch statistics, centring, in-batch "
    "comparisons), so a record's influence is not bounded by clipping its own gradient. ModuleValidator.fix(model) replaces "
    "BatchNorm; compute anything else within each record."
)
_LOSS_MIXES = (
    "The loss is not the {0} of the records' own losses: when a record leaves, the gradients of the others change. It divides by "
    "something counted over the batch (non-ignored tokens, class weights), compares records, or has another reduction than "
    "loss_reduction. Compute each record's loss, then their {0}."
)
_NOT_A_SUM = (
    "The gradient of the batch is not made of the gradients of its records alone: the model or the loss joins them, or a part of "
    "the loss (a weight penalty) is not about records at all."
)
_NOT_ALONE = "One record alone: {}. A record's gradient is that of its own loss, so there must be one."
_NOT_FINITE = (
    "The gradients of records {} are not finite (a NaN or infinity in the data, or an overflow). They add nothing to a private "
    "step, so nothing is learned from them: look at these records."
)
_NOT_EXACT = (
    "{}: the gradient of {} is not that of the single-record loop; {} answered for it. If you registered that rule, correct "
    "it; else use grad_sample_mode='functorch' and report it."
)


def check(
    module: Any,
    batch: Any,
    loss_fn: LossFunction,
    *,
    batch_first: bool,
    loss_reduction: str,
    max_grad_norm: float | None = None,
) -> CheckReport:
    """What ``engine.check`` returns. Works on copies; nothing that was given is changed, nor are random states.

    Args:
        module: private or not.
        batch: at least two records.
        loss_fn: ``loss_fn(module, batch)`` is the scalar loss.
        batch_first, loss_reduction: as in ``make_private``.
        max_grad_norm: C of the comparison; None for the middle of the records' norms, so that about half are clipped.

    Raises:
        ConfigurationError: the arguments are of the wrong kind.
    """
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"module is a {type(module).__name__}; it must be a torch.nn.Module.")
    if not callable(loss_fn):
        raise ConfigurationError(
            f"loss_fn is {loss_fn!r}; it must be a function: loss_fn(module, batch) is the scalar loss."
        )
    setup.check_flags(batch_first=batch_first)
    choose("loss_reduction", loss_reduction, ("mean", "sum"))
    if max_grad_norm is not None:
        FlatClipping(max_grad_norm)
    records = Batch(batch, batch_first=batch_first)
    with randomness_kept(module), torch.enable_grad():
        subject = Subject(module, loss_fn)
        with no_gradients():
            subject.loss(
                records.only(range(records.n))
            )  # a loss_fn that takes another module is refused before a backward
        found = _Check(subject, module, records, loss_fn, batch_first=batch_first, loss_reduction=loss_reduction)
        return found.run(max_grad_norm)


class _Check:
    """One check under way."""

    def __init__(
        self, subject: Subject, module: nn.Module, records: Batch, loss_fn: LossFunction, *, batch_first: bool,
        loss_reduction: str,
    ) -> None:  # fmt: skip
        self._subject, self._given, self._records, self._loss_fn = subject, module, records, loss_fn
        self._batch_first, self._mean = batch_first, loss_reduction == "mean"
        self._dtype = next((p.dtype for p in subject.module.parameters() if p.requires_grad), torch.float32)
        self._findings: list[Finding] = []
        self._modes: dict[str, float | None] = {}
        self._elsewhere: list[str] | None = None
        """Weights that the module above answers for, once a clipper has shown it."""

    def run(self, max_grad_norm: float | None) -> CheckReport:
        """Everything, in the order of the table."""
        norms = self._norms()
        if norms is not None:
            finite = [i for i, size in enumerate(norms) if math.isfinite(size)]
            self._note_finite(len(norms), finite)
            if len(finite) > 1:
                self._note_touching_or_refusal(finite)
            bound = max_grad_norm or _middle([norms[i] for i in finite])
        else:
            bound = max_grad_norm or 1.0
        truth = None if norms is None else self._truth(norms, bound)
        for mode in Mode:
            self._note_mode(mode, bound, truth)
        if self._elsewhere is not None:
            found = "; ".join(self._elsewhere) or "all in the calls of their own modules"
            self._note("every use of a weight is measured", True, found)
        headline = (
            f"{type(self._given).__name__}, {self._records.n} records, {'mean' if self._mean else 'sum'} loss, dropout left "
            f"out, max_grad_norm={bound:.3g}"
        )
        return CheckReport(headline, tuple(self._findings), self._modes)

    def _note(self, what: str, holds: bool, found: str, reason: str = "") -> None:
        self._findings.append(Finding(what, holds, found, reason))

    # ------------------------------------------------------------------ the single-record loop

    def _norms(self) -> list[float] | None:
        """Each record's gradient norm, or None where the model or the loss does not take one record."""
        what = "the model and the loss take one record alone"
        try:
            norms = [norm(self._subject.gradient(self._records.only([i]))) for i in range(self._records.n)]
        except GhostgradError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            self._note(what, False, type(error).__name__, _NOT_ALONE.format(reason))
            return None
        self._note(what, True, f"norms from {min(norms):.3g} to {max(norms):.3g}")
        return norms

    def _truth(self, norms: Sequence[float], bound: float) -> Gradients:
        """The sum of the clipped gradients, as the textbook says; a record that is not finite adds nothing."""
        total: Gradients = {
            name: torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
            for name, p in self._subject.module.named_parameters()
            if p.requires_grad
        }
        for i, size in enumerate(norms):
            if math.isfinite(size):
                add(total, self._subject.gradient(self._records.only([i])), min(1.0, bound / max(size, 1e-300)))
        return total

    def _note_finite(self, n: int, finite: Sequence[int]) -> None:
        bad = sorted(set(range(n)) - set(finite))
        self._note(
            "every record's gradient is finite",
            not bad,
            f"records {bad} are not" if bad else f"all {n}",
            _NOT_FINITE.format(bad) if bad else "",
        )

    # ------------------------------------------------------------------ records that touch each other

    def _note_touching_or_refusal(self, finite: Sequence[int]) -> None:
        try:
            self._note_touching(finite)
        except (PrivacyError, UnsupportedModuleError) as error:  # a criterion of make_private, which checks itself
            self._note("the loss treats records one by one", False, f"refused: {type(error).__name__}", str(error))

    def _note_touching(self, finite: Sequence[int]) -> None:
        """Leave each record out: neither the outputs for the others nor the loss's gradients of these may move."""
        whole, grads = self._forward(finite)
        moved, rescaled = 0.0, 0.0
        for place in range(len(finite)):
            rest = [record for i, record in enumerate(finite) if i != place]
            outputs, partial = self._forward(rest)
            moved = max(moved, _largest_move(self._others(whole, place, len(finite)), outputs))
            rescaled = max(rescaled, _largest_move(self._others(grads, place, len(finite)), partial))
        limit = _TOUCHES.get(self._dtype, 1e-3)
        self._note(
            "the model treats records one by one",
            moved <= limit,
            f"outputs move by {moved:.1e} when a record leaves",
            "" if moved <= limit else _MODEL_MIXES,
        )
        self._note(
            "the loss treats records one by one",
            rescaled <= limit,
            f"output gradients move by {rescaled:.1e} when a record leaves",
            "" if rescaled <= limit or moved > limit else _LOSS_MIXES.format("mean" if self._mean else "sum"),
        )
        self._note_sum(finite, limit)

    def _note_sum(self, finite: Sequence[int], limit: float) -> None:
        total: Gradients = {}
        for i in finite:
            add(total, self._subject.gradient(self._records.only([i])), 1.0)
        whole = self._subject.gradient(self._records.only(finite))
        scale = len(finite) if self._mean else 1
        gap = norm({name: grad - whole[name] * scale for name, grad in total.items()}) / max(norm(total), 1e-300)
        self._note(
            "the batch's gradient is the sum of its records'",
            gap <= limit,
            f"off by {gap:.1e}",
            "" if gap <= limit else _NOT_A_SUM,
        )

    def _forward(self, records: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and gradients of each record's own loss with respect to them."""
        grads = self._subject.output_gradients(self._records.only(records))
        scale = len(records) if self._mean else 1
        return [out.detach() for out in self._subject.outputs if out.requires_grad], [grad * scale for grad in grads]

    def _others(self, tree: Sequence[Tensor], place: int, n: int) -> list[Tensor]:
        """The rows of all records but one."""
        rows = Rows(n, self._batch_first, "the output")
        keep = torch.arange(n) != place
        cut = []
        for tensor in tree:
            dim = rows.dim(tensor)
            if dim is not None:
                whose = keep.to(tensor.device).repeat_interleave(tensor.shape[dim] // n)
                tensor = tensor.movedim(dim, 0)[whose].movedim(0, dim)
            cut.append(tensor)
        return cut

    # ------------------------------------------------------------------ the clippers

    def _note_mode(self, mode: Mode, bound: float, truth: Gradients | None) -> None:
        what = f"{mode.value} is exact"
        try:
            sums, explained = self._clipped(mode, bound)
        except GhostgradError as error:
            self._modes[mode.value] = None
            self._note(what, False, f"refused: {type(error).__name__}", str(error))
            return
        if truth is None:
            self._note(what, False, "nothing to compare with")
            return
        gaps = {name: sums[name].to(grad.dtype) - grad for name, grad in truth.items()}
        worst = max(gaps, key=lambda name: norm({name: gaps[name]}))
        off = norm(gaps) / max(norm(truth), 1e-300)
        self._modes[mode.value] = off
        exact = off <= _EXACT.get(self._dtype, 2e-4)
        self._note(
            what,
            exact,
            f"off by {off:.1e}" + ("" if exact else f", most at {worst}"),
            "" if exact else _NOT_EXACT.format(mode.value, worst, explained.get(worst, "no rule")),
        )

    def _clipped(self, mode: Mode, bound: float) -> tuple[Gradients, dict[str, str]]:
        """The clipped sum as a private step has it, and which rule answered for each parameter."""
        subject = Subject(self._given, self._loss_fn)
        setup.check_module(subject.module)
        names = {p: name for name, p in subject.module.named_parameters() if p.requires_grad}
        total = ClippedSum(lambda: list(names), None)
        recorder = Recorder(
            subject.module, Clipper(FlatClipping(bound), total, mode), None, batch_first=self._batch_first,
            generic_only=mode is Mode.FUNCTORCH, loss_reduction="mean" if self._mean else "sum",
        )  # fmt: skip
        recorder.attach()
        try:
            subject.loss(self._records.only(range(self._records.n))).backward()  # type: ignore[no-untyped-call]
            explained = _explained(recorder, names)
            if mode is not Mode.FUNCTORCH:
                self._elsewhere = _used_elsewhere(recorder)
            return {name: total.take(p) for p, name in names.items()}, explained
        finally:
            recorder.detach()


def _explained(recorder: Recorder, names: dict[nn.Parameter, str]) -> dict[str, str]:
    plan, found = recorder.modules.plan, {}
    for path, part in recorder.root.named_modules():
        for parameter in plan.claims(path, part).values():
            if parameter in names:
                found[names[parameter]] = f"rule {plan.rule(path, part).name!r} of {path or type(part).__name__}"
    return found


def _used_elsewhere(recorder: Recorder) -> list[str]:
    """Weights that are used outside their own module's call, and who answers for them."""
    return [
        f"{f'{path}.{name}' if path else name} outside its module, by {path or type(recorder.root).__name__} record by record"
        for path, taken in recorder.modules.plan.enclosing.items()
        for name in taken
    ]


def _middle(norms: Sequence[float]) -> float:
    ordered = sorted(norms)
    half = len(ordered) // 2
    middle = (ordered[half - 1] + ordered[half]) / 2 if len(ordered) > 1 else 1.0
    return middle if middle > 0 else 1.0


def _largest_move(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """How far any element moved, relative to the largest; infinity where a shape did."""
    largest = 0.0
    for one, other in zip(before, after, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.numel():
            scale = max(float(one.double().abs().max()), 1e-30)
            largest = max(largest, float((one.double() - other.double()).abs().max()) / scale)
    return largest
