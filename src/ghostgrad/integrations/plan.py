"""What a trainer is asked to keep private, in one object for all trainers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ghostgrad.accounting import Ledger
from ghostgrad.engine import GradSampleMode, PrivacyEngine
from ghostgrad.errors import ConfigurationError
from ghostgrad.optimizer import DPOptimizer
from ghostgrad.sampling import DPDataLoader
from ghostgrad.sampling.poisson import PoissonBatchSampler


@dataclass(frozen=True)
class PrivacyPlan:
    """How much privacy, and how it is reached.

    The guarantee is that of `PrivacyEngine`: the trained parameters are (epsilon, ``target_delta``)-differentially private,
    for neighbouring datasets that differ by one record. What a trainer logs besides (losses, metrics on training data) is
    computed on the data without noise and is not covered.

    Args:
        target_delta: the delta at which epsilon is logged, and reached; well below ``1 / n``.
        target_epsilon: choose the least noise with which the whole training stays within it. Either this or
        noise_multiplier: noise standard deviation divided by the sensitivity.
        clipping, grad_sample_mode, poisson_sampling: as for `PrivacyEngine.make_private`.
        accountant, secure_mode, seed: as for `PrivacyEngine`.

    Raises:
        ConfigurationError: both or neither of ``target_epsilon`` and ``noise_multiplier``.

    >>> PrivacyPlan(target_delta=1e-5, target_epsilon=3.0).noise_multiplier is None
    True
    """

    target_delta: float
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    clipping: str = "flat"
    grad_sample_mode: GradSampleMode = "auto"
    poisson_sampling: bool = True
    accountant: str = "rdp"
    secure_mode: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ConfigurationError(
                f"target_epsilon={self.target_epsilon} and noise_multiplier={self.noise_multiplier}: give exactly one. The "
                f"first chooses the noise for a budget, the second sets it."
            )

    def engine(self) -> PrivacyEngine:
        """A new engine."""
        return PrivacyEngine(self.accountant, self.secure_mode, self.seed)


def new_run() -> str:
    """A name for what one engine spends, by which a checkpoint is told apart from those of other processes."""
    return secrets.token_hex(8)


@dataclass
class PrivateRun:
    """One private training: the engine, and what `make_private` returned.

    Attributes:
        run: name of what the engine spends, from `new_run`; the same for all trainings of one engine.
        noise_multiplier: as planned or as calibrated; fixed for the whole training, also when it is resumed.
    """

    plan: PrivacyPlan
    engine: PrivacyEngine
    run: str
    optimizer: DPOptimizer
    loader: DPDataLoader[Any]
    noise_multiplier: float
    _begun_at: tuple[int, int] = (0, 0)  # pass and logical batch at which a resumed training went on

    @classmethod
    def open(
        cls,
        plan: PrivacyPlan,
        *,
        engine: PrivacyEngine,
        run: str,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        max_grad_norm: float | Sequence[float],
        accumulation_steps: int,
        total_steps: int,
    ) -> PrivateRun:
        """Make the three private.

        Args:
            total_steps: logical steps of the whole training, those before it was resumed included.
        """
        if plan.target_epsilon is not None:
            _, private, loader = engine.make_private_with_epsilon(
                module=module, optimizer=optimizer, data_loader=data_loader, target_epsilon=plan.target_epsilon,
                target_delta=plan.target_delta, total_steps=total_steps, max_grad_norm=max_grad_norm,
                clipping=plan.clipping, grad_sample_mode=plan.grad_sample_mode, poisson_sampling=plan.poisson_sampling,
                accumulation_steps=accumulation_steps,
            )  # fmt: skip
        else:
            assert plan.noise_multiplier is not None
            _, private, loader = engine.make_private(
                module=module, optimizer=optimizer, data_loader=data_loader, noise_multiplier=plan.noise_multiplier,
                max_grad_norm=max_grad_norm, clipping=plan.clipping, grad_sample_mode=plan.grad_sample_mode,
                poisson_sampling=plan.poisson_sampling, accumulation_steps=accumulation_steps,
            )  # fmt: skip
        return cls(plan, engine, run, private, loader, float(private.noise_multiplier))

    def logs(self) -> dict[str, float]:
        """What to log: public numbers only."""
        return {
            "privacy/epsilon": self.engine.get_epsilon(self.plan.target_delta),
            "privacy/delta": self.plan.target_delta,
            "privacy/steps": float(self.engine.steps),
            "privacy/noise_multiplier": self.noise_multiplier,
        }

    def state_dict(self) -> dict[str, Any]:
        """What was spent, and the addresses of the next draws; holds no secret."""
        epoch, step = self._next_draw()
        return {
            "run": self.run,
            "accountant": self.engine.accountant.state_dict(),
            "steps": self.engine.steps,
            "noise_step": self.optimizer.noise_step + self.engine.steps - self.optimizer.steps,
            "epoch": epoch,
            "step": step,
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.optimizer.max_grad_norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: what was spent is spent, and nothing that a seed determines is drawn twice.

        Raises:
            ConfigurationError: the training was planned with other noise.
        """
        if abs(state["noise_multiplier"] - self.noise_multiplier) > 1e-9 * self.noise_multiplier:
            raise ConfigurationError(
                f"the checkpoint was trained with noise_multiplier={state['noise_multiplier']}, and the plan gives "
                f"{self.noise_multiplier}. Resume with the same plan, data and number of steps."
            )
        if state["run"] != self.run:  # else this engine spent it, and knows
            for event, count in Ledger.from_state_dict(state["accountant"]["ledger"]):
                self.engine.accountant.record(event, count)
            self.optimizer.steps += state["steps"]
        self.optimizer.noise_step = max(self.optimizer.noise_step, state["noise_step"])
        if self.plan.clipping == "adaptive":
            self.optimizer.max_grad_norm = state["max_grad_norm"]
        sampler = self.loader.batch_sampler
        if isinstance(sampler, PoissonBatchSampler):
            at = max((sampler.epoch, sampler.first_step), (state["epoch"], state["step"]))
            self._begun_at = sampler.epoch, sampler.first_step = at

    @property
    def within_pass(self) -> bool:
        """Whether the next draw is in the middle of a pass over the loader."""
        return self._next_draw()[1] > 0

    def _next_draw(self) -> tuple[int, int]:
        """The pass and the logical batch within it that come after what was handed out."""
        epoch, step = self.loader.feed.epoch, self.loader.feed.step + 1
        if epoch < self._begun_at[0]:  # nothing was handed out since
            return self._begun_at
        if epoch == self._begun_at[0]:
            step += self._begun_at[1]
        return (epoch, step) if step < self.loader.steps_per_epoch else (epoch + 1, 0)
