"""What a private model does for each of its modules, as rows and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ghostgrad.clipping import Mode
from ghostgrad.optimizer import DPOptimizer
from ghostgrad.recording import Recorder


@dataclass(frozen=True)
class ModulePlan:
    """One module: its path, its type, the rule that answers for it, the route of its norms, and its parameters."""

    path: str
    module: str
    rule: str
    route: str
    parameters: int
    kept: str


@dataclass(frozen=True)
class Explanation:
    """The plan of a private training; ``str()`` is a table."""

    headline: str
    modules: tuple[ModulePlan, ...]

    def __str__(self) -> str:
        header = ("module", "type", "rule", "norms", "trainable", "kept until the factors are known")
        rows = [header, *((m.path, m.module, m.rule, m.route, f"{m.parameters:,}", m.kept) for m in self.modules)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.headline, *lines])


def explain(sessions: Sequence[tuple[nn.Module, Recorder, Mode, DPOptimizer]]) -> Explanation:
    """Collect the plans of all private models of an engine."""
    headlines, plans = [], []
    for module, recorder, mode, optimizer in sessions:
        headlines.append(
            f"grad_sample_mode={mode.value!r}, {optimizer!r}, noise by {optimizer.noise.name}; "
            f"{optimizer.spending.guarantee}"
        )
        plans += [_plan(path, part, recorder) for path, part in module.named_modules() if _trains(path, part, recorder)]
    return Explanation("\n".join(headlines) or "nothing was made private yet", tuple(plans))


def _trains(path: str, module: nn.Module, recorder: Recorder) -> bool:
    return any(p.requires_grad for p in recorder.modules.plan.claims(path, module).values())


def _plan(path: str, module: nn.Module, recorder: Recorder) -> ModulePlan:
    plan = recorder.modules.plan
    rule, claims, layout = plan.rule(path, module), plan.claims(path, module), plan.layouts.get(path)
    path = path or type(module).__name__
    seen = recorder.observed.get(path)
    route, kept = ("known after a batch",) * 2 if seen is None else (_by_name(seen.routes), _by_name(seen.kept))
    count = sum(p.numel() for p in claims.values() if p.requires_grad)
    name = rule.name if layout is None else f"{rule.name} ({layout.value})"
    return ModulePlan(path, type(module).__name__, name, route, count, kept)


def _by_name(facts: Mapping[str, str]) -> str:
    """One fact for all parameters, or one for each."""
    different = set(facts.values())
    return different.pop() if len(different) == 1 else ", ".join(f"{name}: {fact}" for name, fact in facts.items())
