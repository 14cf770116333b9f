"""What a trainer is asked to keep private, in one object for all trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ghostgrad.engine import GradSampleMode, PrivacyEngine
from ghostgrad.errors import ConfigurationError
from ghostgrad.optimizer import DPOptimizer
from ghostgrad.sampling import DPDataLoader


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


@dataclass
class PrivateRun:
    """One private training: the engine, and what `make_private` returned.

    Attributes:
        noise_multiplier: as planned or as calibrated; fixed for the whole training, also when it is resumed.
    """

    plan: PrivacyPlan
    engine: PrivacyEngine
    optimizer: DPOptimizer
    loader: DPDataLoader[Any]
    noise_multiplier: float

    @classmethod
    def open(
        cls,
        plan: PrivacyPlan,
        *,
        engine: PrivacyEngine,
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
        return cls(plan, engine, private, loader, float(private.noise_multiplier))

    def logs(self) -> dict[str, float]:
        """What to log: public numbers only."""
        return {
            "privacy/epsilon": self.engine.get_epsilon(self.plan.target_delta),
            "privacy/delta": self.plan.target_delta,
            "privacy/steps": float(self.engine.steps),
            "privacy/noise_multiplier": self.noise_multiplier,
        }

    def state_dict(self) -> dict[str, Any]:
        """The engine's state without its key: plain values that can be written as JSON, and no secret."""
        return self.engine.state_dict(keep_key=False)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: what was spent is spent, and nothing random is drawn twice.

        Trainers count their own passes, so a pass of which nothing is left is over.

        Raises:
            CheckpointError: the training was planned otherwise, or the state is damaged.
        """
        self.engine.load_state_dict(state)
        self.loader.finish_pass()
