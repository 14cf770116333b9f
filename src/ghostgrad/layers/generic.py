"""The rule for any module: recompute it one record at a time, under `vmap` where that works, in a loop where not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.gradients import Explicit, Use
from ghostgrad.layers.call import Call
from ghostgrad.tree import flatten, tensors

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far a record recomputed alone may be from the same record in the batch, relative to the largest output."""

_NOT_BATCHABLE = (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError)
"""What `vmap` raises for a module that it cannot batch (in-place tricks, data-dependent control flow, missing rules)."""


def generic(call: Call) -> dict[str, Use]:
    """Per-sample gradients of a module's own parameters by running it on each record as a batch of one.

    On a call that is still to be proved, the outputs recomputed record by record must be those of the batch; this finds
    randomness inside the module, changes of the input in place, and mixing of records.

    Raises:
        UnsupportedModuleError: when inputs or outputs do not lead with the batch, or the recomputation differs.
    """
    leaves, rebuild = flatten((call.args, dict(call.kwargs)))
    batched = [i for i, leaf in enumerate(leaves) if _is_batched(call, leaf)]
    if not batched:
        raise UnsupportedModuleError(
            f"{call.path}: no input of this {type(call.module).__name__} leads with the {call.rows.n} records of the batch, "
            f"so its gradient cannot be attributed to them. Compute it inside a module whose inputs lead with the batch."
        )
    rows = [call.rows.split(leaves[i]) for i in batched]
    grads = [None if g is None else call.rows.split(g) for g in call.grad_outputs]
    arrived = [i for i, g in enumerate(grads) if g is not None]

    def outputs(parameters: dict[str, Tensor], record: list[Tensor]) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, tensor in zip(batched, record, strict=True):
            filled[i] = tensor.movedim(0, call.rows.dim(leaves[i]) or 0)
        args, kwargs = rebuild(filled)
        # Copies of the buffers: what a second run of the forward does to them must not show.
        buffers = {name: buffer.clone() for name, buffer in call.module.named_buffers()}
        with call.autocast or nullcontext():
            result = tensors(functional_call(call.module, (parameters, buffers), args, kwargs))
        floating = [leaf for leaf in result if leaf.is_floating_point()]
        return tuple(_led(floating[i], call, i) for i in arrived)

    def record_gradient(record: list[Tensor], grad: list[Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        parameters = {name: p.detach() for name, p in call.parameters.items()}
        result, pull, *_ = vjp(lambda p: outputs(p, record), parameters)
        return pull(tuple(grad))[0], result

    try:
        found, recomputed = _each_record(record_gradient, rows, [grads[i] for i in arrived])
    except _NOT_BATCHABLE as error:
        raise UnsupportedModuleError(
            f"{call.path}: this {type(call.module).__name__} could not be run on a record alone ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}), so there is no gradient of each record's own loss. Let it treat a batch of one "
            f"as any other, or register a rule for it."
        ) from error
    if call.outputs is not None:
        _compare(call, recomputed, [call.rows.split(call.outputs[i]) for i in arrived])
    return {name: Explicit(grad.to_dense() if grad.is_sparse else grad) for name, grad in found.items()}


def _is_batched(call: Call, leaf: Tensor) -> bool:
    return leaf.dim() > 0 and call.rows.dim(leaf) is not None


def _led(output: Tensor, call: Call, index: int) -> Tensor:
    """An output for one record as [fold, ...]; one that knows no batch at all gets that dimension."""
    grad = call.grad_outputs[index]
    if grad is None or output.dim() < grad.dim():
        return output.unsqueeze(0)
    return output.movedim(call.rows.dim(grad) or 0, 0)


def _each_record(gradient: Callable[..., Any], rows: list[Tensor], grads: list[Any]) -> Any:
    try:
        with warnings.catch_warnings():
            # An operator that `vmap` has to run in a loop of its own is slow, not wrong.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return vmap(gradient)(rows, grads)
    except _NOT_BATCHABLE:
        return _loop(gradient, rows, grads)


def _loop(gradient: Callable[..., Any], rows: list[Tensor], grads: list[Any]) -> Any:
    with _without_onednn():
        results = [gradient([r[i] for r in rows], [g[i] for g in grads]) for i in range(len(rows[0]))]
    spec = tree_flatten(results[0])[1]
    columns = zip(*(tree_flatten(result)[0] for result in results), strict=True)
    return tree_unflatten([torch.stack(column) for column in columns], spec)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """oneDNN's recurrent layers have no derivative under `torch.func`; torch's own have one."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _compare(call: Call, recomputed: tuple[Tensor, ...], outputs: list[Tensor]) -> None:
    for alone, together in zip(recomputed, outputs, strict=True):
        scale = together[together.isfinite()].abs().max() if together.isfinite().any() else together.new_zeros(())
        gap = (alone.reshape(together.shape) - together).abs()
        both = alone.reshape(together.shape).isfinite() & together.isfinite()
        if bool((gap[both] > _TOLERANCE.get(together.dtype, 1e-3) * scale.clamp(min=1e-6)).any()):
            raise UnsupportedModuleError(
                f"{call.path}: this {type(call.module).__name__} gives a record another output when it is run on that record "
                f"alone. It mixes records, draws random numbers, or changes its input in place, so a record's gradient "
                f"cannot be told from the others'. Move the parameters {sorted(call.parameters)} into a sub-module "
                f"that does none of these, or register a rule for it."
            )
