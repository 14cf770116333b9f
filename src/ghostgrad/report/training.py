"""The public facts of one private training, as plain data. Nothing here depends on which records were drawn."""

from __future__ import annotations

from typing import Any

from torch import nn

from ghostgrad.explanation import Explanation
from ghostgrad.layers import find_rule
from ghostgrad.layers.registry import own_parameters
from ghostgrad.optimizer import DPOptimizer
from ghostgrad.report.numbers import UNKNOWN, plain
from ghostgrad.sampling import DPDataLoader
from ghostgrad.schedulers import value_at
from ghostgrad.session import Session
from ghostgrad.spending import PoissonSpending


def training_facts(session: Session) -> dict[str, Any]:
    """What `make_private` decided and how far the training went.

    Left out, because they depend on the records: sizes of batches, which were empty, records that were not finite, routes of
    the norms (they follow the lengths of what came) and everything measured.

    Args:
        session: an open one.
    """
    optimizer, provenance = session.optimizer, session.optimizer.journal.provenance
    function, sigma = optimizer.clip_function, value_at(optimizer.noise_multiplier, max(0, optimizer.steps - 1))
    bound = optimizer.max_grad_norm
    return {
        "model": type(session.recorder.root).__name__,
        "optimizer": type(optimizer.original_optimizer).__name__,
        "steps": optimizer.steps,
        "noise_multiplier": plain(sigma),
        "noise_multiplier_varies": callable(optimizer.noise_multiplier),
        "gradient_noise_multiplier": plain(optimizer.gradient_noise_multiplier(sigma)),
        "clipping": function.name,
        "max_grad_norm": [plain(part) for part in bound] if isinstance(bound, list) else plain(bound),
        "max_grad_norm_varies": optimizer.bound_schedule is not None or function.name == "adaptive",
        "sensitivity": plain(function.sensitivity),
        "also_released": _also_released(optimizer),
        "expected_batch_size": plain(optimizer.expected_batch_size),
        "sample_rate": plain(session.sample_rate),
        "accumulation_steps": UNKNOWN if session.loader is None else session.loader.accumulation_steps,
        "loss_reduction": optimizer.loss_reduction,
        "sampling": _sampling(session.loader, optimizer),
        "clipper": session.mode.value,
        "noise": {"source": provenance.noise, "secure": provenance.secure, "seeded": provenance.seeded},
        "ranks": optimizer.topology.size,
        "trainable_parameters": sum(p.numel() for p in optimizer.params),
        "modules": _modules(session.recorder.root, session.mode.value == "functorch"),
    }


def seen_of_records(explanation: Explanation, not_finite: int) -> dict[str, Any]:
    """What depends on private records: for whoever may see them."""
    modules = [
        {"path": m.path, "type": m.module, "rule": m.rule, "route": m.route, "parameters": m.parameters, "kept": m.kept}
        for m in explanation.modules
    ]
    return {"not_finite_records": not_finite, "modules": modules}


def _sampling(loader: DPDataLoader[Any] | None, optimizer: DPOptimizer) -> dict[str, Any]:
    assumed = "poisson" if isinstance(optimizer.spending, PoissonSpending) else "one batch a pass"
    return {
        "assumed": assumed,
        "observed": optimizer.journal.provenance.sampler,
        "draws": UNKNOWN if loader is None else loader.feed.logical_batch + 1,
        "passes": UNKNOWN if loader is None else loader.feed.epoch + 1,
        "guarantee": optimizer.spending.guarantee,
    }


def _also_released(optimizer: DPOptimizer) -> list[str]:
    found = []
    if optimizer.clip_function.name == "adaptive":
        found.append("a noisy count of unclipped records in each step, within the step's noise multiplier")
    found += [
        f"noisy counts of gradient norms, for {share:.4g} of a step's budget, within the step's noise multiplier"
        for share in sorted(optimizer.measured_shares)
    ]
    return found


def _modules(root: nn.Module, generic_only: bool) -> list[dict[str, Any]]:
    """The rule of each module that trains something, by its type alone; every parameter once."""
    rows, claimed = [], set[nn.Parameter]()
    for path, module in root.named_modules():
        rule = None if generic_only else find_rule(module)
        claims = own_parameters(module) if rule is None else rule.claims(module)
        new = {p for p in claims.values() if p.requires_grad} - claimed
        claimed |= new
        if new:
            name = "generic" if rule is None else rule.name
            count = sum(p.numel() for p in new)
            rows.append({"path": path, "type": type(module).__name__, "rule": name, "parameters": count})
    return rows
