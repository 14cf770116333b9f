"""The hooks on the modules inside the root: parameters off during a call, a probe behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghostgrad.distributed import Shards, is_split, local, on_this_rank
from ghostgrad.errors import PrivacyError, UnsupportedModuleError
from ghostgrad.gradients import Use
from ghostgrad.layers import Buffers, Call, Randomness, Rows, Rule
from ghostgrad.recording.hooks import Hook
from ghostgrad.recording.packing import packs
from ghostgrad.recording.places import Observed
from ghostgrad.recording.plan import GENERIC, Layout, Plan, with_batch
from ghostgrad.recording.probe import Probe
from ghostgrad.recording.tape import Tape
from ghostgrad.tree import flatten, map_tensors, tensors

Fired = Callable[[Tape, Rule, Call], None]
"""Answers a probe that fired."""


class _Entered(NamedTuple):
    """A call under way.

    Attributes:
        rule: what answers for it.
        claimed: the trainable parameters it answers for, by name within the module, which are switched off.
        began: the random state and the buffers before it, where the rule asks for them.
    """

    rule: Rule
    claimed: Mapping[str, nn.Parameter]
    began: tuple[Randomness, Buffers] | None


_UNRECORDED = _Entered(GENERIC, {}, None)


class Modules:
    """Watches the calls of all modules that own parameters, and of those that the plan lets answer for others.

    Args:
        root: the root module.
        fired: answers a probe.
        batch_first: whether the root's tensors lead with the batch.
        generic_only: let the generic rule answer for every module.
        shards: the ranks that hold a share of the parameters each, where `fully_shard` split them.
    """

    def __init__(
        self, root: nn.Module, fired: Fired, *, batch_first: bool, generic_only: bool, shards: Shards | None = None
    ) -> None:
        self.root, self.fired, self.batch_first, self.shards = root, fired, batch_first, shards
        self.plan = Plan(root, generic_only)
        self.proved: set[object] = set()
        """Layouts of calls for which row isolation was shown."""
        self.tape: Tape | None = None
        """The forward that is being recorded, or whose graph is being run backward."""
        self.observed: Observed | None = None
        """In a rehearsal: the calls of a batch with one record more."""
        self.observing = False
        """Whether that larger batch is running now."""
        self._paused = False
        self._open: list[_Entered] = []
        self._named: dict[str, nn.Parameter] = {}
        """The root's parameters, as the forward under way found them."""
        self._watched: dict[str, list[Any]] = {}

    # ------------------------------------------------------------------ attaching

    def attach(self) -> None:
        """Put hooks on every module that owns parameters, and on the root: while it runs it would be too late for it."""
        for path, module in self.root.named_modules():
            if not path or self.plan.claims(path, module):
                self.watch(path)

    def detach(self) -> None:
        """Take all hooks away."""
        for handles in self._watched.values():
            for handle in handles:
                handle.remove()
        self._watched.clear()

    @property
    def watched(self) -> frozenset[str]:
        """The paths of the modules that have hooks."""
        return frozenset(self._watched)

    def watch(self, path: str) -> None:
        """Put hooks on one module, once."""
        if path in self._watched:
            return
        module = self.root.get_submodule(path)

        def before(module: nn.Module, args: Any) -> None:
            self._enter(path, module)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return self._leave(path, module, args, kwargs, output)

        # In front of the user's own hooks: the rule is about what the module itself returned.
        self._watched[path] = [
            module.register_forward_pre_hook(Hook(before)),
            module.register_forward_hook(Hook(after), with_kwargs=True, always_call=True, prepend=True),
        ]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls of modules inside are not recorded."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def is_paused(self) -> bool:
        """Whether calls are not recorded now."""
        return self._paused

    def prove(self, signatures: set[Any], shown: set[str]) -> None:
        """Row isolation held for these calls; it counts for the modules at which there was a gradient to see."""
        self.proved |= {signature for signature in signatures if (signature[0] or type(self.root).__name__) in shown}

    def uses(self, rule: Rule, call: Call) -> Mapping[str, Use]:
        """What a call used; of weights that are cut into slices, this rank's slice."""
        if any(map(is_split, call.parameters.values())):
            here: dict[str, Any] = {name: local(p) for name, p in call.parameters.items()}
            call = replace(call, parameters=here)
        with self.paused(), self.whole(rule, call.module):
            return rule.uses(call)

    def whole(self, rule: Rule, module: nn.Module) -> AbstractContextManager[None]:
        """What all ranks enter where the rule runs the module again, though weights of its parts are split."""
        if self.shards is None or rule is not GENERIC or not self.shards.inside(module):
            return nullcontext()
        return self.shards.whole(module)

    def take_gradients(self) -> dict[str, Tensor]:
        """What autograd left in ``p.grad``, by name of the parameter; it is None then. Of one that is split, this rank's part."""
        found = {} if self.shards is None else self.shards.take_gradients()
        # Where weights are gathered and let go, modules do not hold the same ones all the time.
        named = self._named if self.shards is None else dict(self.root.named_parameters())
        for name, p in named.items():
            if p.grad is not None:
                found[name] = local(p.grad)
                p.grad = None
        return found

    def note_parameters(self) -> Mapping[str, nn.Parameter]:
        """Look what parameters the root has now, by name."""
        self._named = dict(self.root.named_parameters())
        return self._named

    # ------------------------------------------------------------------ a module's call

    def _enter(self, path: str, module: nn.Module) -> None:
        """Switch off the parameters the module answers for, so that autograd does not work out their gradients."""
        if self._paused or self.tape is None or not self.tape.width:
            self._open.append(_UNRECORDED)
            return
        rule, began = self.plan.rule(path, module), None
        # One that is off already belongs to an enclosing call, which answers for it.
        claimed = {name: p for name, p in self.plan.claims(path, module, rule).items() if p.requires_grad}
        if claimed and rule.draws(module):
            began = Randomness.now(next(iter(claimed.values())).device), Buffers.now(module)
        self._open.append(_Entered(rule, claimed, began))
        for p in claimed.values():
            p.requires_grad_(False)

    def restore(self) -> None:
        """Switch on what an interrupted forward left off (an interrupt skips the hooks that an error does not)."""
        while self._open:
            for p in self._open.pop().claimed.values():
                p.requires_grad_(True)

    def _leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._open:
            return None
        entered = self._open.pop()
        for p in entered.claimed.values():
            p.requires_grad_(True)
        tape = self.tape
        if not entered.claimed or tape is None or output is None:
            return None
        if self.plan.layouts.get(path) is Layout.EXPANDED:
            args, kwargs, output = map_tensors(lambda t: with_batch(t, tape.width), (args, kwargs, output))
        outs = [leaf for leaf in tensors(output) if leaf.is_floating_point()]
        if not outs:
            return None
        passed = iter(self._probe(tape, path, module, entered, (args, kwargs), outs))
        return map_tensors(lambda t: next(passed) if t.is_floating_point() else t, output)

    def _probe(
        self, tape: Tape, path: str, module: nn.Module, entered: _Entered, inputs: Any, outs: list[Tensor]
    ) -> Any:
        rule, parameters, began = entered
        shown = path or type(module).__name__
        reason = rule.refuses(module)
        if reason:
            raise UnsupportedModuleError(f"{path}: {type(module).__name__}: {reason}.")
        randomness, buffers = (None, {}) if began is None else (began[0].until_now(), began[1].changed(module))
        found, rebuild = flatten(inputs)
        keep = tuple([tensor.detach() for tensor in found])
        rows, settled = self._rows(path, tape.width, shown, keep, outs)
        rows = rule.rows(module, rows)
        signature = (path, *_places(rows, keep, outs))
        copies = None
        if signature not in self.proved or not settled or rule.shuffled(inputs):
            tape.unproved.add(signature)
            copies = tuple(out.detach().clone() for out in outs) if rule.compares else None
        split = any(map(is_split, parameters.values()))
        if not split and not rule.reads(parameters):
            keep = tuple(tensor.new_zeros(()).expand(tensor.shape) for tensor in keep)
        as_it_is = torch.is_grad_enabled() and not packs() and not tape.done
        if tape.done:
            # While the backward runs, a checkpointed part is run once more: the same call, counted already.
            tape.rerun = True
        else:
            tape.calls.update(parameters.values())
            tape.packed = tape.packed or not as_it_is
        precision = _autocast(outs[0].device.type)

        def fired(kept: Callable[[], tuple[Tensor, ...]], grads: tuple[Tensor | None, ...]) -> None:
            if self.tape is not tape:
                raise PrivacyError(
                    f"{shown}: a gradient entered the model other than through what its forward returned (a loss on a value "
                    f"that a module kept, such as an auxiliary loss). Return that value from the root's forward."
                )
            arrived: Sequence[Tensor] = kept()
            if split:
                arrived, grads = on_this_rank(shown, module, arrived, grads)
            args, kwargs = rebuild(arrived)
            call = Call(
                module, shown, parameters, args, kwargs, tuple(grads), copies, rows, randomness, buffers, precision,
                as_it_is,
            )  # fmt: skip
            self.fired(tape, rule, call)

        return Probe.apply(fired, keep, len(outs), *outs, *parameters.values())  # type: ignore[no-untyped-call]

    def _rows(
        self, path: str, n: int, shown: str, inputs: Sequence[Tensor], outs: Sequence[Tensor]
    ) -> tuple[Rows, bool]:
        """Where the records are in a call's tensors, and whether that was shown."""
        if self.observed is not None and self.observing:
            self.observed.note(path, n, inputs, outs)
        elif self.observed is not None:
            self.observed.teach(self.plan.known, path, n, inputs, outs)
        expanded = self.plan.layouts.get(path) is Layout.EXPANDED
        places, settled = self.plan.known.of(path, inputs, outs)
        return Rows(n, self.batch_first or expanded, shown, places=places), settled or self.observed is not None


def _places(
    rows: Rows, inputs: Sequence[Tensor], outs: Sequence[Tensor]
) -> Iterator[tuple[int, int | None, int | bool]]:
    """What the proof of a call is about: how many dimensions each tensor has, which one the records are in, and its rows of each.

    Another number of rows of each record is looked at again: rows that are chosen by their content can come in whole numbers.
    One tensor in which there are no records, but could be, is too: what all records shared may have come one for each.
    """
    for find, found in ((rows.input, inputs), (rows.output, outs)):
        for i, tensor in enumerate(found):
            dim = find(i, tensor)
            could = bool(tensor.dim()) and tensor.shape[0] % rows.n == 0
            yield tensor.dim(), dim, could if dim is None else tensor.shape[dim] // rows.n


def _autocast(device: str) -> torch.autocast | None:
    """The mixed precision that is on now, to be entered again; without its cache, which outlives no forward."""
    if not torch.is_autocast_enabled(device):
        return None
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
