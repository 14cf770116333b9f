"""Scores of a canary: how much a training looks as if it had it among its records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ghostgrad.audit.records import Score
from ghostgrad.errors import ConfigurationError
from ghostgrad.optimizer import DPOptimizer

LossOfRecord = Callable[[nn.Module, Any], Tensor]
"""``loss(module, record)``: the scalar loss of one record, as the dataset gives it (add the batch dimension yourself)."""


def loss_score(module: nn.Module, loss: LossOfRecord) -> Score:
    """Minus the loss of a canary under the trained module, in eval mode: what an attacker can use who has the model.

    >>> score = loss_score(nn.Linear(1, 1), lambda module, x: (module(x) ** 2).sum())
    >>> score(torch.ones(1)) <= 0
    True
    """

    def score(record: Any) -> float:
        with _evaluating(module), torch.no_grad():
            return -float(loss(module, record))

    return score


class Releases:
    """Watches a private optimizer and keeps what each logical step released: ``p.grad`` after ``optimizer.step()``.

    The attacker of the accounting sees exactly these. They are private gradients with noise: they may be published as far as
    the training itself may.

    Args:
        optimizer: as `PrivacyEngine.make_private` returned it.

    Attributes:
        steps: for each step the gradients of all trainable parameters in one flat tensor, on the CPU, in float64.
    """

    def __init__(self, optimizer: DPOptimizer) -> None:
        check_optimizer(optimizer)
        self.steps: list[Tensor] = []
        self._optimizer = optimizer

    def __enter__(self) -> Releases:
        self._handle = self._optimizer.register_step_post_hook(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handle.remove()

    def _keep(self, *_: object) -> None:
        grads = [p.grad for p in self._optimizer.params if p.grad is not None]
        self.steps.append(torch.cat([grad.detach().flatten().to("cpu", torch.float64) for grad in grads]))


def gradient_score(releases: Releases, module: nn.Module, loss: LossOfRecord) -> Score:
    """The inner product of a canary's own gradient with the sum of all releases: for an attacker who sees every step.

    The canary's gradient is taken under the module as it is now, in eval mode; it is most telling where gradients hardly
    change (a small learning rate, few steps).
    """

    def score(record: Any) -> float:
        with _evaluating(module), torch.enable_grad():
            own = torch.autograd.grad(
                loss(module, record), [p for p in module.parameters() if p.requires_grad], materialize_grads=True
            )
        flat = torch.cat([grad.flatten().to("cpu", torch.float64) for grad in own])
        return float(flat @ torch.stack(releases.steps).sum(0))

    return score


def check_optimizer(optimizer: object) -> None:
    """Refuse what does not release through the library's own step."""
    if not isinstance(optimizer, DPOptimizer):
        raise ConfigurationError(
            f"optimizer is a {type(optimizer).__name__}; give the private one that make_private returned."
        )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
