"""What makes two trainings one plan: a checkpoint goes on only where all of it is the same, or the difference is acknowledged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ghostgrad.clipping import ClipFunction, Mode
from ghostgrad.distributed import inner_module
from ghostgrad.layers import find_rule
from ghostgrad.schedulers import Schedule, value_at
from ghostgrad.session import SessionPlan

Fingerprint = dict[str, Any]
"""Plain values by name."""


def fingerprint(plan: SessionPlan, *, steps: int) -> Fingerprint:
    """The facts of one private training that has made ``steps`` logical steps; none of them is secret.

    It holds what the noise-free sums and the accounting depend on, and what their last bits depend on, as far as it is known
    here: two sums that differ in the last bit under one noise vector show their difference.
    """
    loader, module = plan.loader, inner_module(plan.module)
    trained = {id(p) for group in plan.optimizer.param_groups for p in group["params"] if p.requires_grad}
    return {
        "max_grad_norm": _schedule(plan.bound_schedule, plan.bound, steps),
        "noise_multiplier": _schedule(plan.noise_multiplier, plan.noise_multiplier, steps),
        "sample_rate": plan.sample_rate,
        "expected_batch_size": plan.expected_batch_size,
        "clipping": _options(plan.function),
        "grad_sample_mode": plan.mode.value,
        "rules": {path: _rule(part, plan.mode) for path, part in module.named_modules() if part._parameters},
        "batch_first": plan.batch_first,
        "loss_reduction": plan.loss_reduction,
        "accumulation_steps": 1 if loader is None else loader.accumulation_steps,
        "sampler": "by hand" if loader is None else ("poisson" if loader.poisson_sampling else "own batches"),
        "steps_per_epoch": None if loader is None else loader.steps_per_epoch,
        "num_records": None if loader is None else loader.num_records,
        "records": None if loader is None else loader.records,
        "noise": plan.noise.name,
        "optimizer": type(plan.optimizer).__name__,
        "parameters": {
            name: [list(p.shape), str(p.dtype), p.device.type, id(p) in trained]
            for name, p in module.named_parameters()
        },
        "ranks": [plan.topology.size, _layout(plan)],
        "torch": str(torch.__version__),
    }


def _layout(plan: SessionPlan) -> str:
    """Sums are added up in another order where it is another."""
    return "split by fully_shard" if plan.shards else "slices of layers" if plan.slices else "whole weights"


def _schedule(schedule: Schedule | None, constant: Any, step: int) -> Any:
    if schedule is None or not callable(schedule):
        return constant
    kind = getattr(schedule, "__qualname__", type(schedule).__qualname__)
    return [kind, *(value_at(schedule, at, "a schedule") for at in sorted({0, step}))]


def _options(function: ClipFunction) -> dict[str, Any]:
    """The name and the settings of a clip function, but for its bound, which moves."""
    settings = {name: value for name, value in vars(function).items() if isinstance(value, (int, float, str))}
    return {"name": function.name, "type": type(function).__name__} | {
        name: value for name, value in sorted(settings.items()) if name != "bound"
    }


def _rule(module: torch.nn.Module, mode: Mode) -> str:
    rule = None if mode is Mode.FUNCTORCH else find_rule(module)
    return "generic" if rule is None else rule.name


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """The facts that differ, each with both values in words."""
    found = {}
    for name in sorted({*saved, *now}, key=str):
        if not _same(saved.get(name), now.get(name)):
            found[name] = _in_words(saved.get(name), now.get(name))
    return found


def _same(saved: Any, now: Any) -> bool:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        return saved.keys() == now.keys() and all(_same(saved[name], now[name]) for name in saved)
    if isinstance(saved, (list, tuple)) and isinstance(now, (list, tuple)):
        return len(saved) == len(now) and all(map(_same, saved, now))
    if isinstance(saved, float) and isinstance(now, (int, float)) and not isinstance(now, bool):
        return math.isclose(saved, now, rel_tol=1e-9)
    return type(saved) is type(now) and bool(saved == now)


def _in_words(saved: Any, now: Any) -> str:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        inner = differences(saved, now)
        first = next(iter(inner))
        return f"{first}: {inner[first]}" + (f" (and {len(inner) - 1} more)" if len(inner) > 1 else "")
    return f"{saved!r:.60} in the checkpoint, {now!r:.60} here"
