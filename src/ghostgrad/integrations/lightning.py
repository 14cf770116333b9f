"""`DPCallback`: private training of an unmodified ``LightningModule``."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from ghostgrad.engine import PrivacyEngine
from ghostgrad.errors import ConfigurationError
from ghostgrad.integrations._base import base_class
from ghostgrad.integrations.plan import PrivacyPlan, PrivateRun

_PACKAGE = "lightning.pytorch"
_Callback: Any = base_class(_PACKAGE, "Callback", "ghostgrad.integrations.lightning.DPCallback")


class DPCallback(_Callback):  # type: ignore[misc]
    """Makes every step of a ``Trainer`` private: ``Trainer(callbacks=[DPCallback(plan, max_grad_norm=1.0)])``.

    When a fit begins, the module's one optimizer and the training loader are exchanged for private ones; both are the
    user's own again when it ends. A logical batch is the loader's batch size times ``accumulate_grad_batches`` records in
    expectation. Guarantee and neighbouring relation: ``callback.engine.guarantee``. Epsilon is logged after each epoch
    (``privacy/epsilon``, ``privacy/delta``, ``privacy/steps``, ``privacy/noise_multiplier``) and what was spent is kept in the
    Trainer's checkpoints. Whatever else the module logs on training data is not covered by the guarantee.

    What is made private is the child that holds all trainable parameters (``self.model``), so that both ``self(x)`` and
    ``self.model(x)`` may be called in ``training_step``; the module itself where there is no such child.

    Args:
        plan: how much privacy.
        max_grad_norm: C, the norm that each record's gradient is clipped to; above 0.

    Raises:
        ConfigurationError: when the fit begins, for a Trainer with several devices, several optimizers, its own gradient
            clipping, or half precision with loss scaling.
        MissingDependencyError: lightning is not installed.
    """

    def __init__(self, plan: PrivacyPlan, *, max_grad_norm: float) -> None:
        super().__init__()
        self.plan, self.max_grad_norm = plan, max_grad_norm
        self.engine: PrivacyEngine = plan.engine()
        self.private: PrivateRun | None = None
        self._spent: dict[str, Any] | None = None
        self._resumes: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Exchange optimizer and loader."""
        _check_trainer(trainer)
        loop = trainer.fit_loop
        loader = loop._data_source.dataloader()
        if not isinstance(loader, DataLoader):
            raise ConfigurationError(f"the training data is a {type(loader).__name__}; give one torch DataLoader.")
        self.private = PrivateRun.open(
            self.plan,
            engine=self.engine,
            module=_holder(pl_module),
            optimizer=trainer.optimizers[0],
            data_loader=loader,
            max_grad_norm=self.max_grad_norm,
            accumulation_steps=trainer.accumulate_grad_batches,
            total_steps=_planned_steps(trainer, len(loader)),
        )
        if self._resumes is not None:
            self.private.load_state_dict(self._resumes)
            self._resumes = None
        trainer.strategy.optimizers = [self.private.optimizer]
        loop._data_source.instance, loop._data_source.name = self.private.loader, ""
        loop._combined_loader = None  # a length that was asked for before may have opened the user's own

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Undo the division of the loss: the parts of a logical batch add up, and each record is clipped as it is."""
        parts = trainer.accumulate_grad_batches
        if parts > 1 and loss.requires_grad:
            loss.register_hook(lambda grad: grad * parts)  # type: ignore[no-untyped-call]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what was spent."""
        if self.private is not None:
            pl_module.log_dict(self.private.logs(), batch_size=1)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The module and its optimizer are the user's own again; what was spent stays spent."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As at the end of the fit."""
        self._close()

    def _close(self) -> None:
        if self.private is not None:
            self._spent = self.private.state_dict()
            self.private = None
            self.engine.detach()

    def state_dict(self) -> dict[str, Any]:
        """What the Trainer's checkpoints keep: what was spent."""
        state = self.private.state_dict() if self.private is not None else self._spent
        return {} if state is None else {"privacy": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Used when the fit begins."""
        self._resumes = state_dict.get("privacy")


def _check_trainer(trainer: Any) -> None:
    if trainer.world_size > 1:
        raise ConfigurationError(f"the Trainer has {trainer.world_size} processes; train on one (devices=1).")
    if len(trainer.optimizers) != 1:
        raise ConfigurationError(
            f"configure_optimizers returned {len(trainer.optimizers)} optimizers; a private step needs all trainable parameters "
            f"in one."
        )
    if trainer.gradient_clip_val:
        raise ConfigurationError(
            f"gradient_clip_val={trainer.gradient_clip_val} would clip the noisy sum of the records. Leave it out; "
            f"max_grad_norm clips each record."
        )
    if str(trainer.precision).startswith("16"):
        raise ConfigurationError(f"precision={trainer.precision!r} scales the loss and skips steps; use 'bf16-mixed'.")
    if trainer.overfit_batches:
        raise ConfigurationError(
            f"overfit_batches={trainer.overfit_batches} repeats batches; they are not fresh draws."
        )


def _planned_steps(trainer: Any, batches: int) -> int:
    limit, parts = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if limit != 1.0:
        batches = min(batches, limit if isinstance(limit, int) else int(batches * limit))
        if batches % parts:
            raise ConfigurationError(
                f"limit_train_batches={limit} stops after {batches} batches, in the middle of a logical batch of "
                f"accumulate_grad_batches={parts}. Make it a multiple."
            )
    bounds = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        bounds.append(trainer.max_epochs * math.ceil(batches / parts))
    if trainer.max_steps >= 0:
        bounds.append(trainer.max_steps)
    if not bounds:
        raise ConfigurationError(
            "max_epochs and max_steps are both unlimited; the steps of a private training are planned."
        )
    return int(min(bounds))


def _holder(module: nn.Module) -> nn.Module:
    """The only child with trainable parameters, if it is called like a module and holds all of them."""
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        return module
    holders = [child for child in module.children() if any(p.requires_grad for p in child.parameters())]
    if len(holders) != 1 or isinstance(holders[0], (nn.ModuleList, nn.ModuleDict)):
        return module
    return holders[0]
