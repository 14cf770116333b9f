"""One private training: what was decided for it, and how it is opened and closed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ghostgrad import setup
from ghostgrad.accounting import Accountant
from ghostgrad.clipping import ClipFunction, ClippedSum, Clipper, Mode, trainable
from ghostgrad.distributed import Shards, TensorParallel, Topology, facts_of, inner_module, unsynchronised
from ghostgrad.journal import Journal
from ghostgrad.keys import RunKey
from ghostgrad.noise import GeneratorGaussian, KeyedGaussian, NoiseMechanism
from ghostgrad.optimizer import DPOptimizer
from ghostgrad.provenance import UNKNOWN, Provenance
from ghostgrad.recording import Delivery, Recorder
from ghostgrad.sampling import DPDataLoader, Padding
from ghostgrad.schedulers import Schedule, value_at
from ghostgrad.spending import Budget, PoissonSpending, ShuffledSpending, Spending


@dataclass(frozen=True)
class SessionPlan:
    """What `make_private` decided, all of it checked; nothing was changed yet."""

    module: nn.Module
    optimizer: Optimizer
    loader: DPDataLoader[Any] | None
    function: ClipFunction
    mode: Mode
    noise: NoiseMechanism
    noise_multiplier: Schedule
    sample_rate: float
    expected_batch_size: float
    batch_first: bool
    loss_reduction: str
    bound_schedule: Callable[[int], float] | None
    topology: Topology
    shards: Shards | None = None
    max_memory: int | None = None
    number: int = 0
    """How many trainings the engine opened before."""

    bound: Any = field(init=False)
    """``max_grad_norm`` as it is when the training is opened: schedules and adaptive clipping move the function's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", copy.copy(self.function.bound))

    @property
    def spending(self) -> Spending:
        """How its steps are accounted."""
        poisson = self.loader is None or self.loader.poisson_sampling
        return PoissonSpending(self.sample_rate) if poisson else ShuffledSpending()

    @property
    def slices(self) -> TensorParallel | None:
        """The ranks, where each holds slices of the same layers."""
        return self.topology if isinstance(self.topology, TensorParallel) else None

    @property
    def delivery(self) -> Callable[[], Delivery] | None:
        """What the private loader handed out last."""
        if self.loader is None:
            return None
        feed = self.loader.feed
        return lambda: Delivery(feed.delivered, feed.records, feed.logical_batch, feed.last, feed.epoch)

    @property
    def padding(self) -> Callable[[], Sequence[Padding]]:
        """Which records of that were padded because of others."""
        feed = None if self.loader is None else self.loader.feed
        return lambda: () if feed is None else feed.padding()

    def provenance(self, key: RunKey, *, secure: bool) -> Provenance:
        """How its releases are made, with noise of that key where it is not of a generator of the user's."""
        poisson = self.loader is not None and self.loader.poisson_sampling
        return Provenance(
            guarantee=self.spending.guarantee,
            sampler="poisson" if poisson else UNKNOWN if self.loader is None else "own batches",
            noise=self.noise.name,
            secure=secure,
            seeded=self.seeded(key),
        )

    def seeded(self, key: RunKey) -> bool | str:
        """Whether a seed determines the noise."""
        return True if key.seeded else UNKNOWN if isinstance(self.noise, GeneratorGaussian) else False

    def facts(self) -> dict[str, object]:
        """What must be the same on all ranks: data, arguments, optimizer and model."""
        loader, noise = self.loader, self.noise
        names = {p: name for name, p in self.module.named_parameters()}
        groups = [{**group, "params": [names[p] for p in group["params"]]} for group in self.optimizer.param_groups]
        return {
            "the number of records or of batches": None if loader is None else (loader.num_records, len(loader)),
            "sample_rate": self.sample_rate,
            "expected_batch_size": self.expected_batch_size,
            "accumulation_steps": None if loader is None else loader.accumulation_steps,
            "noise_multiplier": value_at(self.noise_multiplier, 0, "noise_multiplier"),
            "the source of the noise": noise.name,
            "noise_generator": noise.state if isinstance(noise, GeneratorGaussian) else None,
            "clipping": self.function.name,
            "max_grad_norm": self.function.bound,
            "loss_reduction": self.loss_reduction,
            "batch_first": self.batch_first,
            "the type of the optimizer": type(self.optimizer).__name__,
            "an option or a parameter of the optimizer": repr(groups),
            # Split ranks run each backward together, as often as the mode needs.
            **({} if self.shards is None else {"grad_sample_mode": self.mode, **self.shards.facts()}),
            **facts_of(inner_module(self.module)),
        }


class Session:
    """One private model with its optimizer, from `make_private` to `detach`.

    Args:
        plan: what was decided.
        accountant: where steps are noted.
        budget: kept by the optimizer, if there is one.
        journal: surrounds its releases.
    """

    def __init__(self, plan: SessionPlan, accountant: Accountant, budget: Budget | None, journal: Journal) -> None:
        self.plan = plan
        self.module, self.mode, self.loader = plan.module, plan.mode, plan.loader
        self.sample_rate = plan.sample_rate
        loader, optimizer, delivery = plan.loader, plan.optimizer, plan.delivery
        total = ClippedSum(
            lambda: trainable(optimizer.param_groups),
            delivery,
            None if loader is None else loader.feed.empty_batches,
            plan.expected_batch_size if loader is None else math.inf,
        )
        self.recorder = Recorder(
            inner_module(plan.module),
            Clipper(plan.function, total, plan.mode, plan.shards, plan.slices, plan.max_memory),
            delivery,
            batch_first=plan.batch_first,
            generic_only=plan.mode is Mode.FUNCTORCH,
            loss_reduction=plan.loss_reduction,
            accumulation_steps=1 if loader is None else loader.accumulation_steps,
            shards=plan.shards,
            slices=plan.slices,
            padding=plan.padding,
        )
        self.recorder.attach()
        self.optimizer = DPOptimizer(
            optimizer,
            function=plan.function,
            total=total,
            noise=plan.noise,
            noise_multiplier=plan.noise_multiplier,
            expected_batch_size=plan.expected_batch_size,
            loss_reduction=plan.loss_reduction,
            accountant=accountant,
            spending=plan.spending,
            budget=budget,
            bound_schedule=plan.bound_schedule,
            topology=plan.topology,
            journal=journal,
        )
        setup.claim(plan.module, optimizer, self.optimizer)
        self.at_close: list[Callable[[], None]] = [
            unsynchronised(plan.module) if plan.shards is None else plan.shards.unsynchronised()
        ]
        """What else has to be turned back."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that the optimizer holds, in its order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def rekey(self, key: RunKey) -> None:
        """Draw noise and batches from the key of a run, of which this training is one."""
        own = RunKey(key.derive("session", self.plan.number), seeded=key.seeded)
        journal = self.optimizer.journal
        journal.provenance = replace(journal.provenance, seeded=self.plan.seeded(key))
        if isinstance(self.plan.noise, KeyedGaussian):
            self.plan.noise.rekey(own)
        if self.loader is not None:
            self.loader.rekey(own)

    def close(self) -> None:
        """Give everything back as it was."""
        self.recorder.detach()
        for turn_back in self.at_close:
            turn_back()
        self.optimizer.release_original()
        self.optimizer.zero_grad()
        setup.release(self.module, self.optimizer.original_optimizer, self.optimizer)
