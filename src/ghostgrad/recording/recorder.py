"""Watches a module's forward and backward and hands every use of a weight to a clipper. Hooks and nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ghostgrad.distributed import Shards, TensorParallel
from ghostgrad.errors import PrivacyError, UnsupportedModuleError
from ghostgrad.layers import Call, Rows, Rule
from ghostgrad.recording import proofs
from ghostgrad.recording.backward_proof import check_backward
from ghostgrad.recording.hooks import Hook, calls_under_way, compile_again, leave_uncompiled
from ghostgrad.recording.loss_graph import MOST_NODES
from ghostgrad.recording.losses import LossKnowledge, watch
from ghostgrad.recording.modules import Modules
from ghostgrad.recording.padding_proof import check_gradients, check_padding
from ghostgrad.recording.probe import Boundary, Outline
from ghostgrad.recording.refusals import check_batch_norms, check_same_records
from ghostgrad.recording.rehearsal import Rehearsal
from ghostgrad.recording.rows import count_records, no_rows, one_row, rows_of
from ghostgrad.recording.sharded import Sharded
from ghostgrad.recording.sink import Sink
from ghostgrad.recording.sliced import Sliced
from ghostgrad.recording.tape import Delivery, Recording, Tape
from ghostgrad.sampling import Padding
from ghostgrad.tree import flatten, map_tensors, tensors


class Phase(Enum):
    """What a backward through the recorded graph is for."""

    PASS = auto()
    ISOLATION = auto()
    MEASURE = auto()
    SUM = auto()


@dataclass(frozen=True)
class Observation:
    """What was done for one module, as far as a batch has shown it."""

    rule: str
    routes: Mapping[str, str]
    kept: Mapping[str, str]


class Recorder:
    """Records what the trainable parameters of ``root`` are used for.

    The root's pre-hook opens a tape and its forward hook puts a boundary behind the outputs; in between every call of a
    module that owns trainable parameters gets a probe. Nothing is recorded in eval mode, without grad mode, or inside
    `torch.func.grad` and `vmap`, whose gradients do not become those of the parameters.

    Args:
        root: the module that the user calls.
        sink: the clipper.
        delivery: tells what the private loader handed out last; None where there is no such loader.
        generic_only: let the generic rule answer for every module (the slow cross-check).
        loss_reduction: ``"mean"`` or ``"sum"`` of the records' losses.
        accumulation_steps: loader batches that make up one logical batch.
        shards: the ranks that hold a share of the parameters each, where `fully_shard` split them. They gather each layer's
            weights in its forward and backward, so all of them run as many forwards and backwards, records or none.
        slices: the ranks that hold slices of the same layers, where `parallelize_module` cut them.
        padding: tells which records of the delivery were padded because of others.
    """

    def __init__(
        self,
        root: nn.Module,
        sink: Sink,
        delivery: Callable[[], Delivery] | None,
        *,
        batch_first: bool = True,
        generic_only: bool = False,
        loss_reduction: str = "mean",
        accumulation_steps: int = 1,
        shards: Shards | None = None,
        slices: TensorParallel | None = None,
        padding: Callable[[], Sequence[Padding]] = tuple,
    ) -> None:
        self.root, self.sink, self.delivery, self.padding = root, sink, delivery, padding
        self.batch_first, self.loss_reduction = batch_first, loss_reduction
        self.losses = LossKnowledge(loss_reduction, accumulation_steps)
        self.observed: dict[str, Observation] = {}
        self._observed_now: dict[str, tuple[Observation, Mapping[str, nn.Parameter]]] = {}
        """In the backward under way."""
        self.modules = Modules(root, self._fired, batch_first=batch_first, generic_only=generic_only, shards=shards)
        self._shards = None if shards is None else Sharded(shards, self.modules, sink)
        self._slices = None if slices is None else Sliced(slices, self.modules)
        self._in_step = self._shards or self._slices
        self._rehearsed: set[str] = set()
        """Parameters that trained when a batch was rehearsed. One that was frozen then has not been looked at."""
        self._rehearsed_alone: set[str] = set()
        """The same for a batch of one record, which says how to read others of one, and nothing about several."""
        self._padding_shown: int | None = None
        """The delivery at which it was seen that padding does not show in outputs, nor in the loss."""
        self._phase = Phase.MEASURE
        self._keep: Tensor | None = None
        self._shown: set[str] = set()
        """Modules at which a gradient arrived in the isolation under way."""
        self._linearity = proofs.Linearity()
        self._round: list[Recording] = []
        self._live: weakref.WeakSet[Tape] = weakref.WeakSet()
        self._round_task = -1
        self._outer: list[tuple[Tape | None, bool]] = []
        """For each call of the root under way: the tape outside of it, and whether compiled code was left out."""
        self._handles: list[Any] = []

    # ------------------------------------------------------------------ attaching

    def attach(self) -> None:
        """Put the hooks on the root and on every module that owns parameters."""
        # Where weights are gathered in the root's own hooks, these come in between.
        enter = self.root.register_forward_pre_hook(
            Hook(self._enter_root), with_kwargs=True, prepend=self._shards is not None
        )
        self._handles.append(enter)
        self.modules.attach()
        if self._shards is not None:
            self._handles += self._shards.gates()
        leave = self.root.register_forward_hook(Hook(self._leave_root), with_kwargs=True, always_call=True)
        self._handles.append(leave)
        watch.start()
        self._stop_watching = weakref.finalize(self, watch.stop)

    def detach(self) -> None:
        """Take all hooks away."""
        self._stop_watching()
        self.modules.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._outer:  # interrupted
            compile_again(self._outer[0][1])
            self._outer.clear()

    # ------------------------------------------------------------------ the root's forward

    def _enter_root(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        modules = self.modules
        self._forget_interrupted()
        idle = modules.is_paused or bool(self._outer) or torch._C._are_functorch_transforms_active()
        recorded = not idle and module.training and torch.is_grad_enabled()
        self._outer.append((modules.tape, leave_uncompiled(recorded)))
        if not recorded:
            return None
        modules.restore()
        if self._shards is not None:
            self._shards.recover()
        check_batch_norms(module)
        delivery = self.delivery() if self.delivery else None
        n = count_records(args, kwargs, delivery.records if delivery else None, batch_first=self.batch_first)
        width = n if self._shards is None else max(n, 1)
        tape = Tape(n, delivery, width, rows_of(args, kwargs, n, batch_first=self.batch_first))
        self._live.add(tape)
        self._rehearse(args, kwargs, tape)
        if self._in_step is None:  # else only in a rehearsal, where all ranks run the model together
            self._check_padding(args, kwargs, tape)
        modules.tape = tape
        if n == 0:
            return self._one_row((args, kwargs))
        return self._stand_in(tape, args, kwargs)

    def _forget_interrupted(self) -> None:
        """An interrupt (Ctrl-C) skips the hooks that an error does not: calls that are over would count as under way."""
        still = calls_under_way(self.root) - 1
        if len(self._outer) > still >= 0:
            self.modules.tape, compiling = self._outer[still]
            compile_again(compiling)
            del self._outer[still:]

    def _rehearse(self, args: Any, kwargs: Any, tape: Tape) -> None:
        """On the first batch: prove that records do not meet, and find how the modules' calls are to be read."""
        n = tape.n
        training = {name for name, p in self.modules.note_parameters().items() if p.requires_grad}
        if training <= self._rehearsed or (n == 1 and training <= self._rehearsed_alone):
            return
        with proofs.gradients_set_aside(self.root):
            if self._in_step is not None:
                done, several = self._in_step.rehearse(lambda: self._rehearse_alone(args, kwargs, tape), n), True
            else:
                done, several = bool(n) and self._rehearse_alone(args, kwargs, tape), n > 1
        if done:
            self._padding_shown = None  # while other weights were frozen
            (self._rehearsed if several else self._rehearsed_alone).update(training)

    def _rehearse_alone(self, args: Any, kwargs: Any, tape: Tape) -> bool:
        """Whether it came to an end, on records that show something: else the next batch is rehearsed as well."""
        n, tells = tape.n, True
        if self._in_step is not None:
            self._check_padding(args, kwargs, tape)
        with proofs.shaken(self.root):
            with self.modules.paused():
                if n > 1:
                    sizes, tells = proofs.check_forward(self.root, args, kwargs, n, batch_first=self.batch_first)
                    if self._in_step is None:
                        check_backward(self.modules, args, kwargs, n, other_sizes=sizes)
                else:
                    proofs.check_alone(self.root, args, kwargs)
            rehearsal = Rehearsal(self.modules)
            done = rehearsal.run(args, kwargs, n)
            if done and self._in_step is None:
                self.sink.weigh(lambda: rehearsal.weigh(args, kwargs, n))
            return done and tells

    def _check_padding(self, args: Any, kwargs: Any, tape: Tape) -> None:
        """Until a batch has shown it: where records are padded because of others, none of their outputs depends on that."""
        delivery = tape.delivery
        if delivery is None or not 1 < tape.n == delivery.records or self._padding_shown not in (None, delivery.piece):
            return
        padded = self.padding()
        if padded:
            # Frozen zeros stay zero: the row of an embedding that is put where there are no words.
            with self.modules.paused(), proofs.shaken(self.root, frozen=False):
                tape.padded = check_padding(self.root, args, kwargs, tape.n, padded, batch_first=self.batch_first)

    def _one_row(self, batch: Any) -> Any:
        """What the model runs on in the place of no records; lengths are 1 where it does not run on 0."""
        zeros = one_row(batch, batch_first=self.batch_first)
        if self._in_step is not None:
            return zeros  # ranks run the model equally often
        with self.modules.paused(), torch.random.fork_rng():
            runs = proofs.forward(self.root, zeros, constant=False) is not None
        return zeros if runs else one_row(batch, batch_first=self.batch_first, length=1)

    @staticmethod
    def _stand_in(tape: Tape, args: Any, kwargs: Any) -> Any:
        """Cut inputs that require grad off their own graph; the boundary hands their gradients on."""
        leaves, rebuild = flatten((args, kwargs))
        if not any(leaf.requires_grad for leaf in leaves):
            return None
        for i, leaf in enumerate(leaves):
            if leaf.requires_grad:
                leaves[i] = leaf.detach().requires_grad_()
                tape.inputs.append((leaf, leaves[i]))
        return rebuild(leaves)

    def _leave_root(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if len(self._outer) < calls_under_way(module):
            return None  # a hook of the user's raised before the call was entered
        tape = self.modules.tape
        self.modules.tape, uncompiled = self._outer.pop()
        compile_again(uncompiled)
        if tape is None or tape is self.modules.tape or output is None:
            return None
        if self._in_step is not None:
            tape.isolate = self._in_step.any_of(bool(tape.unproved) and tape.n > 1)
        inner = output
        if tape.n == 0:
            output = no_rows(output, batch_first=self.batch_first)
        pairs = [pair for pair in zip(tensors(output), tensors(inner), strict=True) if pair[0].is_floating_point()]
        places = [i for i, (leaf, _) in enumerate(pairs) if leaf.requires_grad or tape.n == 0]
        chosen = [pairs[i] for i in places]
        if any(leaf.is_complex() for leaf in tensors(output)):
            raise UnsupportedModuleError(
                f"{type(module).__name__}: an output is complex; clipping is defined for gradients of real outputs. Return "
                f"torch.view_as_real of it."
            )
        if not chosen:
            return None
        leaves = [leaf for leaf, _ in chosen]
        # The outputs themselves, logits of many words say, live as long as the user and the loss need them.
        outlines = [Outline.apply(out if tape.width else leaf) for leaf, out in chosen]  # type: ignore[no-untyped-call]
        recording = Recording(tape, outlines, places)
        anchor = torch.zeros((), requires_grad=True)
        originals = [original for original, _ in tape.inputs]
        detached = [leaf.detach() for leaf in leaves]

        def run(grads: tuple[Tensor | None, ...]) -> Sequence[Tensor | None]:
            return self._backward(recording, grads)

        passed = Boundary.apply(  # type: ignore[no-untyped-call]
            run, tape, self.losses, self.batch_first, anchor, len(originals), *originals, *detached
        )
        new = iter(passed)
        return map_tensors(lambda t: next(new) if any(t is leaf for leaf in leaves) else t, output)

    # ------------------------------------------------------------------ backward

    def _fired(self, tape: Tape, rule: Rule, call: Call) -> None:
        if self._phase is Phase.SUM and self._shards is not None:
            self._shards.note(call.parameters.values())
        if self._phase is Phase.PASS:
            return
        if not tape.n:
            with self.modules.whole(rule, call.module):
                return
        if self._phase is Phase.ISOLATION:
            assert self._keep is not None
            self._linearity.note(call)
            if proofs.check_call(rule, call, self._keep):
                self._shown.add(call.path)
            return
        if self._phase is Phase.SUM:
            self._add_up(rule, call)
            return
        self._linearity.check(call)
        uses = self.modules.uses(rule, call)
        routes, kept = {}, {}
        alone = len(self._live) == 1
        for name, p in call.parameters.items():
            parameter = self._owner(p)
            tape.calls[p] = left = tape.calls[p] - 1
            complete = left == 0 and alone
            routes[name], kept[name] = self.sink.measure(parameter, uses[name], complete=complete, held=call.held)
        if routes and call.path not in self.observed:
            self._observed_now[call.path] = Observation(rule.name, routes, kept), call.parameters

    def _add_up(self, rule: Rule, call: Call) -> None:
        wanted = {name: p for name, p in call.parameters.items() if self.sink.wants(self._owner(p))}
        if not wanted:
            return
        uses = self.modules.uses(rule, replace(call, parameters=wanted))
        for name, p in wanted.items():
            self.sink.add(self._owner(p), uses[name])

    def _owner(self, held: nn.Parameter) -> nn.Parameter:
        """The optimizer's parameter, where a module holds a gathered one in its place."""
        return held if self._shards is None else self._shards.owner(held)

    def _backward(self, recording: Recording, grads: tuple[Tensor | None, ...]) -> Sequence[Tensor | None]:
        """Answer the gradients of the root's outputs: measure every use now, add up when the outermost backward ends."""
        tape = recording.tape
        if not watch.depth:
            return self._pass_through(recording, grads)
        if tape.done:
            raise PrivacyError(
                "a second backward went through the same forward. Its records would be clipped twice and count twice. Add "
                "the losses up and call backward once, or run the forward again on other records."
            )
        if not tape.read:
            raise PrivacyError(
                f"a backward reached the model, but its loss could not be read: it has more than {MOST_NODES} operations, or was "
                f"changed after backward was called. How it weighs the records is not known; compute it in fewer operations "
                f"(on whole tensors instead of in a loop)."
            )
        tape.done = True
        if tape.padded is not None and tape.delivery is not None:
            check_gradients(
                tape.padded, dict(zip(recording.places, grads, strict=True)), tape.n, batch_first=self.batch_first
            )
            self._padding_shown = tape.delivery.piece
        self._join_round(recording)
        self._check_foreign_gradients()
        if tape.n:
            self._measure(recording, grads)
        elif tape.width:
            self._go_along(recording, grads)
        return self._take_input_grads(tape, self._scale(tape))

    def _pass_through(self, recording: Recording, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """`torch.autograd.grad` wants gradients of the inputs only: hand them on and record nothing."""
        self.sink.note_pass()
        if recording.tape.n:
            self._run(recording, Phase.PASS, grads, retain=True, passed_on=True)
            self._check_foreign_gradients()
        elif recording.tape.width:
            self._run(recording, Phase.PASS, _zeros(recording, grads), retain=True, passed_on=True)
        return self._take_input_grads(recording.tape, 1.0)

    @staticmethod
    def _take_input_grads(tape: Tape, scale: float) -> list[Tensor | None]:
        found = [None if leaf.grad is None else leaf.grad / scale for _, leaf in tape.inputs]
        for _, leaf in tape.inputs:
            leaf.grad = None
        return found

    def _join_round(self, recording: Recording) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._round_task or not self._round:
            self._round, self._round_task = [], task
            self.sink.reset()
            self._observed_now.clear()
            if self._shards is not None:
                self._shards.recover()
            Variable._execution_engine.queue_callback(self._finish)
        self._round.append(recording)

    def _unit(self, tape: Tape) -> float:
        """What an arriving gradient is to be multiplied by, to be the gradient of each record's own loss."""
        return (tape.width if self.loss_reduction == "mean" else 1.0) / self.losses.scale

    def _scale(self, tape: Tape) -> float:
        """The part of it that the arriving gradients are multiplied by.

        Under a GradScaler none of it: the model's float16 gradients then are what the scale was made for.
        """
        return self._unit(tape) if self.losses.scale == 1.0 else 1.0

    def _measure(self, recording: Recording, grads: tuple[Tensor | None, ...]) -> None:
        tape = recording.tape
        rows = Rows(tape.n, self.batch_first, type(self.root).__name__)
        for grad in grads:
            if grad is not None and rows.dim(grad) is None:
                raise UnsupportedModuleError(
                    f"{rows.path}: a gradient arrived at an output of shape {list(grad.shape)}, which does not lead with the "
                    f"{tape.n} records of the batch. A loss computed inside the model cannot be told apart by record: return "
                    f"the predictions and compute the loss outside."
                )
        recording.grads = [None if grad is None else grad * self._scale(tape) for grad in grads]
        self._linearity = proofs.Linearity()
        if tape.unproved and tape.n > 1:
            self._isolate(recording, rows)
        elif tape.isolate:
            self._pass_twice(recording, _zeros(recording, recording.grads))
        begun = watch.begun
        self._run(recording, Phase.MEASURE, recording.grads, retain=self.sink.begin(tape.n, packed=tape.packed))
        tape.rerun = tape.rerun or watch.begun > begun
        self._check_foreign_gradients()

    def _isolate(self, recording: Recording, rows: Rows) -> None:
        """Show that no record's gradient reaches the rows of another."""
        tape = recording.tape
        self._shown.clear()
        for keep in proofs.random_halves(tape.n):
            self._keep = keep
            self._linearity.begin()
            self._run(recording, Phase.ISOLATION, proofs.mask_records(recording.grads, rows, keep), retain=True)
        self.modules.prove(tape.unproved, self._shown)
        self._take_input_grads(tape, 1.0)
        self._linearity.begin()

    def _go_along(self, recording: Recording, grads: tuple[Tensor | None, ...]) -> None:
        """A rank without records runs backward as often as the others, on zeros: they gather weights together."""
        recording.grads = _zeros(recording, grads)
        if recording.tape.isolate:
            self._pass_twice(recording, recording.grads)
        self._run(recording, Phase.MEASURE, recording.grads, retain=self.sink.begin(0, packed=recording.tape.packed))
        self._check_foreign_gradients()

    def _pass_twice(self, recording: Recording, grads: Sequence[Tensor | None]) -> None:
        """In the time in which other ranks show row isolation."""
        for _ in range(2):
            self._run(recording, Phase.PASS, grads, retain=True)
        self._take_input_grads(recording.tape, 1.0)

    def _run(
        self,
        recording: Recording,
        phase: Phase,
        grads: Sequence[Tensor | None],
        *,
        retain: bool,
        passed_on: bool = False,
    ) -> None:
        """One backward through the model. ``retain`` its graph for another one, of ours or (``passed_on``) of the user's."""
        arrived = [(out, grad) for out, grad in zip(recording.outputs, grads, strict=True) if grad is not None]
        modules = self.modules
        outer, modules.tape, self._phase = modules.tape, recording.tape, phase
        compiling = leave_uncompiled(True)  # checkpointed parts are run again
        again = retain and not passed_on
        # The second backward ends at the last weight it is for, unless others run inside it, which know no such end.
        whole = phase is not Phase.SUM or self._in_step is not None or recording.tape.rerun
        ends = None if whole else self.sink.postponed
        outs, given = ([pair[i] for pair in arrived] for i in (0, 1))
        try:
            with nullcontext() if self._shards is None else self._shards.passing(again=again):
                watch.original(outs, given, retain_graph=retain, inputs=ends)
        finally:
            compile_again(compiling)
            modules.tape, self._phase = outer, Phase.MEASURE

    def _finish(self) -> None:
        """The outermost backward has ended: every use of every weight is known."""
        recordings, self._round = self._round, []
        tapes = [recording.tape for recording in recordings]
        try:
            self._check_foreign_gradients()
            self.modules.note_parameters()  # some may have come since the forward began
            self._check_foreign_gradients()
            self.sink.admit(tapes)
            check_same_records(tapes)
            if tapes[0].width:
                self.sink.settle(tapes[0].n, self._unit(tapes[0]) / self._scale(tapes[0]))
                self._note_observed()
                if self.sink.passes_twice:
                    for recording in recordings:
                        self._run(recording, Phase.SUM, recording.grads, retain=False)
                if self._shards is not None:
                    self._shards.hand_over_rest()
            self.sink.commit(tapes)
        finally:
            self.sink.reset()
            if self._shards is not None:
                self._shards.recover()
            for recording in recordings:
                self._live.discard(recording.tape)
                recording.outputs, recording.grads = [], []

    def _note_observed(self) -> None:
        """Say of modules that were met for the first time what was kept of them in the end."""
        for path, (seen, parameters) in self._observed_now.items():
            kept = {
                name: "norms" if self.sink.wants(self._owner(p)) else seen.kept[name] for name, p in parameters.items()
            }
            self.observed[path] = replace(seen, kept=kept)

    def _check_foreign_gradients(self) -> None:
        """Nothing but the clipper may produce a gradient of a parameter; while it works ``p.grad`` stays None."""
        for name, grad in self.modules.take_gradients().items():
            if bool(grad.count_nonzero()):
                raise PrivacyError(
                    f"{name} received a gradient that did not pass through a call of the module that owns it, so it cannot be "
                    f"clipped: it is used directly (F.linear(h, m.weight)), or penalised in the loss, or a gradient of an "
                    f"earlier backward was not cleared (call optimizer.zero_grad()). Call the module itself, and use the "
                    f"optimizer's weight_decay for a penalty."
                )


def _zeros(recording: Recording, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """No gradient, at the outputs at which one arrived."""
    return [
        None if grad is None or not out.requires_grad else torch.zeros_like(out)
        for out, grad in zip(recording.outputs, grads, strict=True)
    ]
