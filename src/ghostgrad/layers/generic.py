"""The rule for any module: recompute it one record at a time, under `vmap` where that works, in a loop where not.

Random numbers that the call drew are those of the batch again, each record's own (see `replay`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.gradients import Explicit, Use
from ghostgrad.layers.call import Call
from ghostgrad.layers.replay import Drawn, NotReplayableError
from ghostgrad.tree import flatten, map_numbers, tensors

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far a record recomputed alone may be from the same record in the batch, relative to the largest output."""

_NOT_BATCHABLE = (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError, LookupError)
"""What `vmap` raises for a module that it cannot batch (in-place tricks, data-dependent control flow, missing rules)."""

Gradients = dict[str, Tensor]


def generic(call: Call) -> dict[str, Use]:
    """Per-sample gradients of a module's own parameters by running it on each record as a batch of one.

    On a call that is still to be proved, the outputs recomputed record by record must be those of the batch; this finds
    random numbers that were not replayed, changes of the input in place, and mixing of records.

    Raises:
        UnsupportedModuleError: when inputs or outputs do not lead with the batch, or the recomputation differs.
    """
    kind = type(call.module).__name__
    module = _Recomputed(call)
    try:
        found, recomputed = module.gradients()
    except NotReplayableError as error:
        raise UnsupportedModuleError(
            f"{call.path}: this {kind} draws random numbers that cannot be told apart by record: {error}. Draw them outside of "
            f"it, or register a rule for it."
        ) from error
    except _NOT_BATCHABLE as error:
        raise UnsupportedModuleError(
            f"{call.path}: this {kind} could not be run on a record alone ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}), so there is no gradient of each record's own loss. Let it treat a batch of one "
            f"as any other, or register a rule for it."
        ) from error
    if call.outputs is not None:
        _compare(call, recomputed, [module.rows(call.outputs[i], module.out_dims[i]) for i in module.arrived])
    return {name: Explicit(grad) for name, grad in module.by_name(found).items()}


class _Recomputed:
    """A call that is run again, on single records.

    Attributes:
        dims: which dimension of each input tensor holds the records; None where it is the same for all of them.
        out_dims: the same for the floating-point outputs.
        arrived: the outputs at which a gradient arrived.
    """

    def __init__(self, call: Call) -> None:
        self._call, self._n = call, call.rows.n
        self._leaves, self._rebuild = flatten((call.args, dict(call.kwargs)))
        self._lists: list[list[float]] = []
        map_numbers(self._lists.append, (call.args, dict(call.kwargs)), self._n)
        self.dims = [call.rows.input(i, leaf) for i, leaf in enumerate(self._leaves)]
        self._batched = [i for i, dim in enumerate(self.dims) if dim is not None]
        if not self._batched:
            raise UnsupportedModuleError(
                f"{call.path}: no input of this {type(call.module).__name__} leads with the {self._n} records of the batch, so "
                f"its gradient cannot be attributed to them. Compute it inside a module whose inputs lead with the batch."
            )
        self.out_dims = {i: call.rows.output(i, grad) for i, grad in enumerate(call.grad_outputs) if grad is not None}
        self.arrived = list(self.out_dims)

    def rows(self, tensor: Tensor, dim: int | None) -> Tensor:
        """[n, fold, ...]: each record's rows by themselves."""
        if dim is None:
            raise UnsupportedModuleError(
                f"{self._call.path}: an output of shape {list(tensor.shape)} has no dimension for the {self._n} records of this "
                f"batch, so its rows cannot be attributed to records. Return it with the batch in front."
            )
        rows = tensor.movedim(dim, 0)
        return rows.reshape(self._n, len(rows) // self._n, *rows.shape[1:])

    def gradients(self) -> tuple[Gradients, Sequence[Tensor]]:
        """Of every record, [n, *p], and the outputs at which gradients arrived, [n, fold, ...]."""
        inputs = [self.rows(self._leaves[i], self.dims[i]) for i in self._batched]
        grads = [
            self.rows(grad, self.out_dims[i]) for i, grad in enumerate(self._call.grad_outputs) if grad is not None
        ]
        drawn = self._drawn()
        if not self._lists:  # `vmap` has no lists of which each record gets its own number
            try:
                with warnings.catch_warnings(), _replayed(drawn, None):
                    # An operator that `vmap` has to run in a loop of its own is slow, not wrong.
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    batched = vmap(self._transformed, randomness="error" if drawn is None else "different")
                    found: tuple[Gradients, tuple[Tensor, ...]] = batched(inputs, grads)
                    return found
            except _NOT_BATCHABLE:
                pass
        try:
            return self._loop(inputs, grads, drawn)
        except NotReplayableError as error:
            assert drawn is not None
            try:
                return self._loop(inputs, grads, drawn.by_turns())
            except NotReplayableError:
                raise error from None

    def _drawn(self) -> Drawn | None:
        randomness = self._call.randomness
        if randomness is None or not randomness.drew:
            return None
        copies = [leaf.clone() for leaf in self._leaves]
        return Drawn.again(lambda: self._run(self._parameters(), copies), self._n, randomness)

    def _transformed(self, record: list[Tensor], grads: list[Tensor]) -> tuple[Gradients, tuple[Tensor, ...]]:
        """For `vmap`: one record's gradients, and its outputs."""
        outputs, pull, *_ = vjp(lambda p: self._outputs(p, record), self._parameters())
        return pull(tuple(grads))[0], outputs

    def _loop(self, inputs: list[Tensor], grads: list[Tensor], drawn: Drawn | None) -> tuple[Gradients, list[Tensor]]:
        """By plain autograd, which also runs what no transform of `torch.func` does (checkpoints, fused recurrent layers)."""
        each: list[Gradients] = []
        outs: list[tuple[Tensor, ...]] = []
        for i in range(self._n):
            leaves = {name: p.requires_grad_() for name, p in self._parameters().items()}
            with _replayed(drawn, i), torch.enable_grad():
                outputs = self._outputs(leaves, [rows[i] for rows in inputs], i)
                seen = [j for j, out in enumerate(outputs) if out.requires_grad]
                found = torch.autograd.grad(
                    [outputs[j] for j in seen], list(leaves.values()), [grads[j][i].reshape(outputs[j].shape) for j in seen],
                    allow_unused=True, materialize_grads=True,
                )  # fmt: skip
            each.append({name: grad.to_dense() for name, grad in zip(leaves, found, strict=True)})
            outs.append(tuple(out.detach() for out in outputs))
        stacked = {name: torch.stack([gradients[name] for gradients in each]) for name in each[0]}
        return stacked, [torch.stack(column) for column in zip(*outs, strict=True)]

    def _parameters(self) -> Gradients:
        """Each parameter once, though it may have several names."""
        names = {p: name for name, p in reversed(list(self._call.parameters.items()))}
        return {name: p.detach() for name, p in self._call.parameters.items() if names[p] == name}

    def by_name(self, found: Gradients) -> Gradients:
        """Gradients under every name of the call's parameters: the whole of it under the first, nothing under the others."""
        return {
            name: found[name] if name in found else p.new_zeros(self._n, *p.shape)
            for name, p in self._call.parameters.items()
        }

    def _run(self, parameters: Gradients, leaves: Sequence[Tensor], record: int | None = None) -> list[Tensor]:
        """The floating-point outputs for these inputs, of all records or of one."""
        module = self._call.module
        args, kwargs = self._rebuild(leaves)
        if record is not None:
            args, kwargs = map_numbers(lambda numbers: [numbers[record]], (args, kwargs), self._n)
        # Copies of the buffers as the call met them: what a second run of the forward does to them must not show.
        buffers = {name: self._call.buffers.get(name, buffer).clone() for name, buffer in module.named_buffers()}
        with self._call.autocast or nullcontext():
            result = tensors(functional_call(module, (parameters, buffers), args, kwargs))
        return [leaf for leaf in result if leaf.is_floating_point()]

    def _outputs(self, parameters: Gradients, record: Sequence[Tensor], place: int | None = None) -> tuple[Tensor, ...]:
        """The outputs at which a gradient arrived, for one record, [fold, ...]."""
        leaves = list(self._leaves)
        for i, tensor in zip(self._batched, record, strict=True):
            leaves[i] = tensor.movedim(0, self.dims[i] or 0)
        outputs = self._run(parameters, leaves, place)
        return tuple(self._led(outputs[i], i) for i in self.arrived)

    def _led(self, output: Tensor, index: int) -> Tensor:
        """Records first; an output that knows no batch at all gets that dimension."""
        grad = self._call.grad_outputs[index]
        assert grad is not None
        return output.unsqueeze(0) if output.dim() < grad.dim() else output.movedim(self.out_dims[index] or 0, 0)


def _replayed(drawn: Drawn | None, record: int | None) -> AbstractContextManager[None]:
    return nullcontext() if drawn is None else drawn.replayed(record)


def _compare(call: Call, recomputed: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    for alone, together in zip(recomputed, outputs, strict=True):
        scale = together[together.isfinite()].abs().max() if together.isfinite().any() else together.new_zeros(())
        gap = (alone.reshape(together.shape) - together).abs()
        both = alone.reshape(together.shape).isfinite() & together.isfinite()
        if bool((gap[both] > _TOLERANCE.get(together.dtype, 1e-3) * scale.clamp(min=1e-6)).any()):
            raise UnsupportedModuleError(
                f"{call.path}: this {type(call.module).__name__} gives a record another output when it is run on that record "
                f"alone. It mixes records, draws from a random generator of its own, changes its input in place, or has hooks "
                f"that change it (the old torch.nn.utils.spectral_norm; take torch.nn.utils.parametrizations.spectral_norm), so "
                f"a record's gradient cannot be told from the others'. Move the parameters {sorted(call.parameters)} into a "
                f"sub-module that does none of these, or register a rule for it."
            )
