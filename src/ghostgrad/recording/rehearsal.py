"""Runs the model on its first batch to find how the calls of its modules are to be read, before anything counts.

A batch with one record more goes through the model first: what grows with it is where the records are in each module's
tensors. The plain reading (every weight is used in its own module's call, on tensors that hold the records) is tried first.
Where it fails, in this order: the module's output is the same for all records and is expanded to the batch; the next module
above answers for the parameters as a whole, recomputed one record at a time. That also goes for a module whose rows are chosen
by their content, though this batch may suit it: the next one would not. A reading is kept only if the model's outputs
stay the same, the gradient of no record reaches the rows of another, and all of them add up to the batch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ghostgrad._generators import draws_put_back
from ghostgrad.distributed import is_split
from ghostgrad.errors import ConfigurationError, GhostgradError, PrivacyError, UnsupportedModuleError
from ghostgrad.layers import Call, Rows, Rule
from ghostgrad.recording import proofs
from ghostgrad.recording.losses import watch
from ghostgrad.recording.modules import Modules
from ghostgrad.recording.places import Known, Observed
from ghostgrad.recording.plan import Layout
from ghostgrad.recording.rows import with_one_more
from ghostgrad.recording.tape import Tape
from ghostgrad.recording.totals import Totals
from ghostgrad.recording.weighing import Footprint, Weighing
from ghostgrad.tree import map_tensors, tensors

_MOST_ATTEMPTS = 64
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Problem:
    """Where a reading failed; ``names`` are parameters that were used outside the calls that answer for them."""

    path: str
    error: GhostgradError
    names: frozenset[str] | None = None


class Rehearsal:
    """Finds a plan for a model. The parameters, buffers and the random state are left as they were."""

    def __init__(self, modules: Modules) -> None:
        self._modules, self._root = modules, modules.root
        self._problems: list[_Problem] = []
        self._keep: Tensor | None = None
        self._first: dict[str, GhostgradError] = {}
        self._not_expandable: set[str] = set()
        self._totals = Totals()
        self._by_content: set[str] = set()
        """Modules of which the rows were seen to be chosen by content, also those that others answer for by now."""
        self._new_holders: set[str] = set()
        """Modules that came to answer for others after the last attempt, and had no chance to yet."""

    def run(self, args: Any, kwargs: Any, n: int) -> bool:
        """Change the plan of the modules until nothing fails.

        Returns:
            Whether it came to an end. The model may fail by itself (out of memory, an interrupted loop): its own forward
            will say so, and the next batch is to be rehearsed again.

        Raises:
            GhostgradError: what failed first, where no reading of the module or of any above it holds; the plan is as before.
        """
        before, fired = self._modules.plan, self._modules.fired
        self._modules.plan, self._modules.fired = before.copy(), self._fired
        try:
            return self._search((args, kwargs), n)
        except GhostgradError:
            self._modules.plan = before
            raise
        finally:
            self._modules.fired = fired

    def weigh(self, args: Any, kwargs: Any, n: int) -> Footprint | None:
        """Once more under the plan that was found, to see what the graph holds and what uses take.

        None where the model does not run with hooks on what autograd saves (`torch.func.grad` inside it).
        """
        modules, weighing = self._modules, Weighing([*self._root.parameters(), *self._root.buffers()])

        def fired(tape: Tape, rule: Rule, call: Call) -> None:
            for use in modules.uses(rule, call).values():
                weighing.keep(use)

        before, modules.fired = modules.fired, fired
        try:
            with self._recorded(n):
                with torch.autograd.graph.saved_tensors_hooks(weighing.pack, lambda tensor: tensor):
                    found = self._forward((args, kwargs))
                outs, grads = _directions(found, Rows(n, modules.batch_first, type(self._root).__name__))
                if outs:
                    watch.original(outs, grads)
        except GhostgradError:
            raise
        except Exception:
            return None
        finally:
            modules.fired = before
            modules.take_gradients()
        return weighing.of_a_record(n)

    def _search(self, batch: Any, n: int) -> bool:
        plain: list[Tensor] | None = None
        for _ in range(_MOST_ATTEMPTS):
            try:
                outputs = self._try(batch, n)
            except GhostgradError:
                raise
            except Exception:
                if not self._give_up_expanding():
                    return False
                continue
            plain = outputs if plain is None else plain
            if self._problems:
                self._treat_all(unchanged=_same(plain, outputs))
            elif not _same(plain, outputs) and self._give_up_expanding():
                continue
            elif self._adds_up(batch, n, outputs):
                return True
            else:
                self._treat_all(unchanged=True)
        raise next(iter(self._first.values()))

    # ------------------------------------------------------------------ one attempt

    def _try(self, batch: Any, n: int) -> list[Tensor]:
        """Run the model forward and backward under the present plan; problems are noted, not raised."""
        self._problems, modules = [], self._modules
        self._new_holders.clear()
        modules.plan.known, modules.observed = Known(), self._observe(batch, n)
        try:
            with self._recorded(n):
                found = self._forward(batch)
                rows = Rows(n, modules.batch_first, type(self._root).__name__)
                outs, grads = _directions(found, rows)
                if outs:
                    self._backward(outs, grads, rows)
            self._note_rows_by_content()
        finally:
            modules.observed = None
        return [t.detach() for t in found]

    def _observe(self, batch: Any, n: int) -> Observed | None:
        """The calls of a batch with the first record once more; None where the model does not run on that."""
        modules = self._modules
        modules.observed, modules.observing = Observed(), True
        try:
            with self._recorded(n + 1), torch.no_grad():
                self._forward(with_one_more(batch, n, batch_first=modules.batch_first))
        except GhostgradError:
            raise
        except Exception:
            return None
        finally:
            modules.observing = False
        return modules.observed

    def _forward(self, batch: Any) -> list[Tensor]:
        """The floating-point outputs, with copies of the inputs and the buffers."""
        buffers = {name: buffer.clone() for name, buffer in self._root.named_buffers()}
        args, kwargs = map_tensors(lambda t: t.detach().clone(), batch)
        return [t for t in tensors(functional_call(self._root, buffers, args, kwargs)) if t.is_floating_point()]

    @contextmanager
    def _recorded(self, n: int) -> Iterator[None]:
        """Calls inside are recorded as those of ``n`` records, always under the same random numbers."""
        modules = self._modules
        outer, modules.tape = modules.tape, Tape(n, None)
        try:
            with torch.random.fork_rng(), draws_put_back():
                torch.manual_seed(0)
                yield
        finally:
            modules.restore()
            modules.tape = outer

    def _backward(self, outs: Sequence[Tensor], grads: Sequence[Tensor], rows: Rows) -> None:
        if rows.n > 1:
            for keep in proofs.random_halves(rows.n):
                self._keep = keep
                watch.original(outs, proofs.mask_records(grads, rows, keep), retain_graph=True)
                self._note_foreign_gradients()
        self._keep, self._totals = None, Totals()
        watch.original(outs, grads)
        self._note_foreign_gradients()

    def _fired(self, tape: Tape, rule: Rule, call: Call) -> None:
        path = "" if call.module is self._root else call.path
        inputs = tensors((call.args, dict(call.kwargs)))
        if not inputs:
            self._not_expandable.add(path)  # it hands out a weight (a parametrization), not values for the records
        if any(problem.path == path for problem in self._problems):
            return
        try:
            if self._keep is not None:
                proofs.check_call(rule, call, self._keep)
            else:
                self._totals.add(call, self._modules.uses(rule, call))
        except ConfigurationError:
            raise  # a registered rule that does not do what it owes: no other reading helps
        except GhostgradError as error:
            self._problems.append(_Problem(path, error))

    def _note_foreign_gradients(self) -> None:
        for name, grad in self._modules.take_gradients().items():
            path, _, local = name.rpartition(".")
            if bool(grad.count_nonzero()) and not any(
                local in (problem.names or ()) and problem.path == path for problem in self._problems
            ):
                error = PrivacyError(
                    f"{name} is used outside the call of its module, and no module above it can be run on one record alone. "
                    f"Call the module itself."
                )
                self._problems.append(_Problem(path, error, frozenset({local})))

    def _adds_up(self, batch: Any, n: int, outputs: Sequence[Tensor]) -> bool:
        """Whether what the rules answered is all that plain autograd finds; what it is not is noted as a problem."""
        parameters = {name: p for name, p in self._root.named_parameters() if p.requires_grad}
        if self._modules.shards is not None or any(is_split(p) for p in parameters.values()):
            return True
        with self._modules.paused(), self._recorded(n):
            found = self._forward(batch)
            outs, grads = _directions(found, Rows(n, self._modules.batch_first, type(self._root).__name__))
            if not outs or not _same(outputs, found):
                return True  # a model that draws by itself: nothing to compare
            watch.original(outs, grads)
            plain = {
                parameters[name]: grad for name, grad in self._modules.take_gradients().items() if name in parameters
            }
        missing = set(
            self._totals.missing({p: grad.to_dense() if grad.is_sparse else grad for p, grad in plain.items()})
        )
        for name, p in ((name, p) for name, p in parameters.items() if p in missing):
            if p in self._totals.registered:
                kind = self._totals.registered[p].__name__
                raise ConfigurationError(
                    f"{name}: the gradients that the registered rule of {kind} answers with do not add up to the gradient of the "
                    f"batch. Correct the rule; engine.check(batch, loss_fn) compares it record by record, and "
                    f"ghostgrad.layers.unregister_rule({kind}) leaves the module to the generic rule."
                )
            path, _, local = name.rpartition(".")
            kind = type(self._root.get_submodule(path)).__name__
            error = UnsupportedModuleError(
                f"{name}: the gradients of the records do not add up to the gradient of the batch, so a part of what this {kind} "
                f"computes leaves it in another way than in the real tensors that it returns (complex tensors, values inside an "
                f"object, on itself or in an argument). Return real tensors (torch.view_as_real), or register a rule for it."
            )
            self._not_expandable.add(path)
            self._problems.append(_Problem(path, error, frozenset({local})))
        return not missing

    def _note_rows_by_content(self) -> None:
        """Modules that see as many rows as the records' content gives them, and those beside them that see the others."""
        plan = self._modules.plan
        self._by_content |= plan.known.by_content - {""}
        routed = set(self._by_content)
        for path in self._by_content:
            beside = path.rpartition(".")[0]
            if type(self._root.get_submodule(beside)).forward is nn.Module.forward:  # one of a list of experts
                routed |= {name for name in self._modules.watched if name.startswith(f"{beside}.")}
        for path in sorted(routed):
            module = self._root.get_submodule(path)
            if plan.rule(path, module).shuffled is not Rule.shuffled:
                continue  # a rule that knows packed rows
            if all(plan.holder(p) not in (None, path) for p in plan.claims(path, module).values()):
                continue  # a module above it answers for it by now
            error = UnsupportedModuleError(
                f"{path}: how many rows this {type(module).__name__} sees depends on what is in the records (tokens sent to "
                f"experts), so they cannot be attributed to records. Let a module above it treat a batch of one record as any "
                f"other, or send every record's tokens through all experts, weighted."
            )
            self._not_expandable.add(path)
            self._problems = [problem for problem in self._problems if problem.path != path]
            self._problems.append(_Problem(path, error))

    # ------------------------------------------------------------------ the next reading

    def _treat_all(self, *, unchanged: bool) -> None:
        for problem in self._problems:
            self._first.setdefault(problem.path, problem.error)
        enclosing = set(self._modules.plan.enclosing)
        # A module that answers for others may fail only because of how one inside it was read: that one goes first.
        inner = [problem for problem in self._problems if problem.path not in enclosing]
        if not inner and not unchanged and self._give_up_expanding():
            return
        for problem in inner or self._problems:
            if problem.names is not None:
                self._enclose_parameter(problem)
            elif not self._other_layout(problem.path):
                self._enclose(problem.path, problem.error)

    def _other_layout(self, path: str) -> bool:
        """Whether another place of the records can be tried for a module."""
        plan = self._modules.plan
        layout = plan.layouts.get(path, Layout.PLAIN)
        if layout is not Layout.EXPANDED and path and path not in self._not_expandable and path not in plan.enclosing:
            plan.layouts[path] = Layout.EXPANDED
            return True
        return False

    def _enclose_parameter(self, problem: _Problem) -> None:
        names = set(problem.names or ())
        owner = self._root.get_submodule(problem.path)
        for name in names:
            holder = self._modules.plan.holder(owner._parameters[name])  # type: ignore[arg-type]
            if holder is None:
                self._enclose(problem.path, problem.error, {name})
            else:
                self._enclose(holder, problem.error)

    def _enclose(self, path: str, error: GhostgradError, names: set[str] | None = None) -> None:
        plan = self._modules.plan
        claims = plan.claims(path, self._root.get_submodule(path))
        held = {plan.holder(p) for name, p in claims.items() if names is None or name in names} - {None, path}
        for holder in held:
            # It answered for them already, yet they were not off: it is never called itself. Go on above it.
            if holder is not None and holder not in self._new_holders:
                self._enclose(holder, error)
        if held:
            return
        above = plan.enclose(path, names)
        if above is None:
            raise self._first.get(path, error)
        self._first.setdefault(above, self._first.get(path, error))
        self._new_holders.add(above)
        self._modules.watch(above)

    def _give_up_expanding(self) -> bool:
        """The model did not bear an expanded output: let the modules above answer instead. False if nothing was expanded."""
        expanded = [path for path, layout in self._modules.plan.layouts.items() if layout is Layout.EXPANDED]
        for path in expanded:
            self._not_expandable.add(path)
            error = self._first.get(path, PrivacyError(f"{path}: its output has no batch dimension."))
            self._enclose(path, error)
        return bool(expanded)


def _directions(found: Sequence[Tensor], rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that hold records, and gradients for them: the same ones each time."""
    chosen = [(i, out) for i, out in enumerate(found) if out.requires_grad and rows.dim(out) is not None]
    grads = []
    for i, out in chosen:
        drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float32)
        grads.append(drawn.to(out))
    return [out for _, out in chosen], grads


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )
