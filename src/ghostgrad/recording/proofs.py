"""Proofs on the user's own model and first batch that a record's row is a record: nothing of it reaches another row."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ghostgrad._generators import draws_put_back
from ghostgrad.distributed import local
from ghostgrad.errors import PrivacyError
from ghostgrad.layers import Call, Rows, Rule
from ghostgrad.recording.draws import SEEDS, Constant, NoDraws, drawn, in_mode, seed_others
from ghostgrad.recording.rows import some_of, with_first_replaced
from ghostgrad.tree import map_tensors, tensors

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far an output may move, relative to the largest, when another record leaves the batch (matrix products of other
sizes round differently)."""

_SAME_KIND = {torch.float64: 10.0, torch.float32: 10.0}
"""How much larger a value may be than what moved, to be counted in its scale. In half precision what is small moves first."""

DOES_NOT_RUN = (RuntimeError, ValueError, AssertionError, LookupError, TypeError)
"""What a model raises on records that it cannot take."""


def random_halves(n: int) -> tuple[Tensor, Tensor]:
    """Two complementary masks [n], neither empty, without a pattern that a layout could share."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    first = torch.zeros(n, dtype=torch.bool)
    first[order[: n // 2]] = True
    return first, ~first


def mask_records(grads: Sequence[Tensor | None], rows: Rows, keep: Tensor) -> list[Tensor | None]:
    """Output gradients with the records outside ``keep`` [n] set to zero."""

    def mask(grad: Tensor) -> Tensor:
        dim = rows.dim(grad) or 0
        whose = keep.to(grad.device).repeat_interleave(grad.shape[dim] // rows.n)
        shape = [1] * grad.dim()
        shape[dim] = -1
        return torch.where(whose.view(shape), grad, torch.zeros((), dtype=grad.dtype, device=grad.device))

    return [None if grad is None else mask(grad) for grad in grads]


def check_call(rule: Rule, call: Call, keep: Tensor) -> bool:
    """At a probe, while only the records in ``keep`` have an output gradient: the other rows must have none.

    Returns:
        Whether the kept records had a gradient here: zeros everywhere show nothing.

    Raises:
        PrivacyError: when they do. Rows that are not finite are passed over: 0 * inf is not a leak.
    """
    rows = rule.rows(call.module, call.rows)
    call = replace(call, rows=rows)
    shown = False
    for index, grad in enumerate(call.grad_outputs):
        if grad is None:
            continue
        led = rule.led(call, grad, index)
        by_record = led.reshape(rows.n, len(led) // rows.n, *led.shape[1:])
        shown = shown or bool(by_record[keep.to(grad.device)].count_nonzero())
        others = by_record[~keep.to(grad.device)]
        if bool((others[others.isfinite()] != 0).any()):
            raise PrivacyError(
                f"{rows.path}: the gradient of one record reaches the rows of others, so clipping rows does not bound a "
                f"record. Either the model mixes records (batch statistics, centring over the batch, in-batch negatives) or "
                f"the rows of this layer are not ordered by record. Use a model that treats records one by one "
                f"(GroupNorm for BatchNorm; ModuleValidator.fix does that), and fold with the record as the slowest index."
            )
    return shown


class Linearity:
    """Holds the gradients of two complementary halves of the records to those of the whole: a backward is linear.

    One that is not (a hook or a function that divides by the norm of the batch's gradient) lets each record rescale the others,
    though the rows of records without a gradient stay zero. Gradients are compared by a random projection, so nothing is kept.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._calls: Counter[str] = Counter()

    def begin(self) -> None:
        """Another backward through the same graph."""
        self._calls.clear()

    def note(self, call: Call) -> None:
        """The gradient of one half arrived at a call."""
        key = self._next(call)
        self._sums[key] = self._sums.get(key, torch.zeros(2, dtype=torch.float64)) + _projected(call)

    def check(self, call: Call) -> None:
        """The gradient of the whole arrived.

        Raises:
            PrivacyError: it is not the sum of those of the halves.
        """
        known = self._sums.get(self._next(call)) if self._sums else None
        if known is None:
            return
        whole = _projected(call)
        kind = next(grad.dtype for grad in call.grad_outputs if grad is not None)
        gap, size = (whole[0] - known[0]).abs(), torch.maximum(whole[1], known[1])
        if bool(gap.isfinite() & (gap > _TOLERANCE.get(kind, 1e-3) * size)):
            raise PrivacyError(
                f"{call.path}: the gradient that arrives for the batch is not the sum of those of its records, so each record "
                f"rescales the others (a backward hook or an autograd function that normalises over the batch). Normalise within "
                f"each record, or leave it out: clipping bounds gradients already."
            )

    def _next(self, call: Call) -> tuple[str, int]:
        self._calls[call.path] += 1
        return call.path, self._calls[call.path]


def _projected(call: Call) -> Tensor:
    """A random projection of the gradients of a call's outputs, and their norm."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(2, dtype=torch.float64)
    for grad in call.grad_outputs:
        if grad is not None:
            direction = torch.randn(grad.shape, generator=generator, dtype=torch.float32)
            value = grad.detach().cpu().double()
            total += torch.stack([(value * direction).sum(), value.norm()])
    return total


class Shown(NamedTuple):
    """What a batch was able to show.

    Attributes:
        other_sizes: batches of other sizes could be compared: what the model draws is the same for a record in each of them.
        tells: another record in the place of the first changed its output. In a batch of zeros (a warm-up) or of equal
            records nothing would, and that the others stay says nothing.
    """

    other_sizes: bool
    tells: bool


def check_forward(root: nn.Module, args: Any, kwargs: Any, n: int, *, batch_first: bool) -> Shown:
    """Put another record in the place of one, and leave half of them out, then the other half: the outputs of the others must
    stay, and so must the buffers.

    Finds what gradients cannot see: detached batch statistics, expert capacity, statistics of the model's own input, sums
    of records kept in a buffer; a largest value too, whichever record has it. Runs the model on copies, in training mode and in
    eval mode; its buffers and the random states (torch's, Python's, numpy's) stay untouched. Dropout is left out, and what the
    model draws from torch is constant: other records would get other numbers.

    Raises:
        PrivacyError: when an output of a record, or a buffer, depends on another record.
    """
    shown = Shown(other_sizes=False, tells=False)
    rows = Rows(n, batch_first, type(root).__name__)
    batch = (args, kwargs)
    changed = with_first_replaced(batch, n, batch_first=batch_first)
    halves = range(n // 2, n), range(n - n // 2)  # of two records at least, where there are three
    for training in (True, False):
        with torch.no_grad(), torch.random.fork_rng(), in_mode(root, training=training), NoDraws():
            whole, other, replays = _repeatable(root, batch, changed, rows.path)
            others = [(other, range(1, n))]
            # Batches of another size would get other numbers for each record.
            comparable = whole is not None and not whole.drew and not replays
            if training:
                shown = Shown(comparable, _tells(rows, whole, other))
            if comparable:
                others += [(forward(root, some_of(batch, n, half, batch_first=batch_first)), half) for half in halves]
            for other, kept in others:
                _compare_all(rows, whole, other, kept)
            for seed in SEEDS if whole is not None and whole.drew else ():
                with draws_put_back():
                    seed_others(seed)
                    first, second = (forward(root, records, seeded=replays) for records in (batch, changed))
                _compare_all(rows, first, second, range(1, n))
    return shown


def _tells(rows: Rows, before: Outcome | None, after: Outcome | None) -> bool:
    """Whether the first record's output moved, and there are others of which it can be seen whether theirs did."""
    if before is None or after is None:
        return True  # nothing can be compared, in this batch or in the next
    for one, other in zip(before.outputs, after.outputs, strict=True):
        dim = rows.dim(one)
        if dim is None or one.shape != other.shape:
            continue
        fold = one.shape[dim] // rows.n
        both = one.isfinite() & other.isfinite()
        first, rest = both.narrow(dim, 0, fold), both.narrow(dim, fold, one.shape[dim] - fold)
        moved = (one != other).narrow(dim, 0, fold) & first
        if bool(moved.any()) and bool(rest.any()):
            return True
    return False


def check_alone(root: nn.Module, args: Any, kwargs: Any) -> None:
    """Of a single record: turned round it must leave the same buffers behind. What they keep would meet the records to come.

    Raises:
        PrivacyError: when a buffer depends on the record, or the model remembers something elsewhere.
    """
    batch, path = (args, kwargs), type(root).__name__
    with torch.no_grad(), torch.random.fork_rng(), NoDraws():
        first, second, _ = _repeatable(root, batch, map_tensors(_turned, batch), path)
    if first is not None and second is not None:
        _compare_buffers(path, first.buffers, second.buffers)


def _repeatable(root: nn.Module, batch: Any, other: Any, path: str) -> tuple[Outcome | None, Outcome | None, bool]:
    """Forwards of two batches, after which one of the first gave the same again: nothing of the second was remembered.

    Returns:
        Both, and whether that needed the same seed: the model draws in a way that `Constant` does not know, or does not run
        on constants.
    """
    for seeded, constant in ((False, True), (True, True), (True, False)):
        first, second, again = (
            forward(root, records, seeded=seeded, constant=constant) for records in (batch, other, batch)
        )
        if _same_outcome(first, again) and (first is not None or not constant):
            return first, second, seeded
    raise PrivacyError(
        f"{path}: two forwards of the same records gave different outputs, though the random numbers of torch, numpy and Python "
        f"were the same. It draws from a generator of its own or remembers something, so that records do not mix cannot be "
        f"shown. Draw from torch's default generator, or give the numbers as an input, one for each record."
    )


def _turned(tensor: Tensor) -> Tensor:
    """Other values of the same kind: in reversed order, or where that is the same, smaller ones."""
    turned = tensor.flip(tuple(range(tensor.dim())))
    return tensor * 0.5 if tensor.is_floating_point() and torch.equal(turned, tensor) else turned


def _compare_all(rows: Rows, before: Outcome | None, after: Outcome | None, kept: range) -> None:
    """Hold one forward to another, where the model can run on both."""
    if before is None or after is None:
        return
    for first, second in zip(before.outputs, after.outputs, strict=True):
        _compare(rows, first, second, kept)
    for first, second in zip(before.whole_numbers, after.whole_numbers, strict=True):
        if first.shape == second.shape:  # in a batch of another size rounding can turn a choice
            _compare(rows, first, second, kept)
    _compare_buffers(rows.path, before.buffers, after.buffers)


def _same_outcome(first: Outcome | None, second: Outcome | None) -> bool:
    """Whether two forwards on the same records did the same, but for rounding."""
    if first is None or second is None:
        return first is second
    pairs = list(zip(first.outputs, second.outputs, strict=False))
    return len(first.outputs) == len(second.outputs) and all(a.shape == b.shape and close(a, b) for a, b in pairs)


@contextmanager
def no_gradients() -> Iterator[None]:
    """For a forward that wants none, without the warning of re-entrant checkpointing that it misses them."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        yield


class Outcome(NamedTuple):
    """What a forward did: its outputs, the buffers as it left them, whether it drew from Python or numpy."""

    outputs: list[Tensor]
    """The floating-point ones."""
    whole_numbers: list[Tensor]
    """The others: choices and masks, which a loss may weigh the records by."""
    buffers: dict[str, Tensor]
    drew: bool


def forward(root: nn.Module, batch: Any, *, seeded: bool = False, constant: bool = True) -> Outcome | None:
    """None where the model does not run on these records. ``seeded`` forwards draw the same numbers from torch, or a constant."""
    args, kwargs = map_tensors(lambda t: t.detach().clone(), batch)
    buffers = {name: buffer.clone() for name, buffer in root.named_buffers()}
    if seeded:
        torch.manual_seed(0)
    try:
        with no_gradients(), draws_put_back(), Constant() if constant else nullcontext():  # type: ignore[no-untyped-call]
            before = drawn()
            outputs = tensors(functional_call(root, buffers, args, kwargs))
            drew = drawn() != before
    except DOES_NOT_RUN:
        return None
    floating = [t for t in outputs if t.is_floating_point()]
    return Outcome(floating, [t for t in outputs if not t.is_floating_point()], buffers, drew)


def _compare(rows: Rows, before: Tensor, after: Tensor, records: range) -> None:
    dim = rows.dim(before)
    if dim is None:
        return
    fold = before.shape[dim] // rows.n
    kept = before.narrow(dim, records.start * fold, len(records) * fold)
    same = after.narrow(dim, records.start * fold, kept.shape[dim]) if after.shape == before.shape else after
    equal = close if before.is_floating_point() else torch.equal
    if kept.shape != same.shape or not equal(kept, same):
        raise PrivacyError(
            f"{rows.path}: the output for a record changes when another record leaves the batch or changes, so a record's "
            f"influence is not bounded by clipping its own gradient. Remove what depends on the whole batch (statistics over the "
            f"batch, capacity limits, in-batch comparisons), or compute it within each record; give pad_packed_sequence the "
            f"total_length of its input."
        )


def _compare_buffers(path: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for name, value in before.items():
        same = close if value.is_floating_point() else torch.equal
        if value.shape != after[name].shape or not same(value, after[name]):
            raise PrivacyError(
                f"{path}: the forward writes something of the records into the buffer {name!r}, which is saved with the "
                f"model without any noise. Do not keep statistics of the data in the model, or freeze them (eval mode)."
            )


def close(before: Tensor, after: Tensor) -> bool:
    """Whether nothing moved by more than rounding, relative to the largest value that is of the size of what moved.

    A model that puts -1e9 in the place of what is masked would otherwise be held to no more than that.
    """
    finite = before.isfinite() & after.isfinite()
    gap, size = (before - after)[finite].abs(), torch.maximum(before[finite].abs(), after[finite].abs())
    moved = gap > 0
    if not bool(moved.any()):
        return True
    scale = size[size <= _SAME_KIND.get(before.dtype, 1e3) * size[moved].max()].max()
    return bool(gap.max() <= _TOLERANCE.get(before.dtype, 1e-3) * scale)


@contextmanager
def shaken(root: nn.Module, *, frozen: bool = True) -> Iterator[None]:
    """Moves every parameter a little inside, ``frozen`` ones too: with a zero-initialised head nothing would show that records
    meet."""
    generator = torch.Generator()
    # Of a weight that is split over ranks, this rank's part.
    moved = [p for p in root.parameters() if p.is_floating_point() and (frozen or p.requires_grad)]
    before = [(here, here.clone()) for p in moved for here in [local(p.detach())]]
    try:
        for number, (p, value) in enumerate(before):
            generator.manual_seed(number)  # the same on all ranks, whatever part of other parameters they hold
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
            p.data.add_(noise, alpha=0.02 + 0.1 * float(value.abs().mean()) if p.numel() else 0.0)
        yield
    finally:
        for p, value in before:
            p.data.copy_(value)


@contextmanager
def gradients_set_aside(root: nn.Module) -> Iterator[None]:
    """Puts away what the last step left in ``p.grad``: many loops clear it between the forward and the backward."""
    before = [(p, p.grad) for p in root.parameters()]
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in before:
            p.grad = grad
