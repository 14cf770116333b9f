"""Noise and clipping bounds that change over steps: schedules as values, and Opacus' schedulers on top.

A schedule is a number or a function of the logical step. The engine asks it once per logical step, so it cannot change
inside one, and records what it answered. The frozen schedules here can be compared, printed and saved; any callable
works. The scheduler classes act on an optimizer's ``noise_multiplier`` and ``max_grad_norm``, as in Opacus.

Formal guarantee: a schedule must not look at the data. What it answers is public.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Union

from ghostgrad.errors import ConfigurationError, as_float

Schedule = Union[float, Callable[[int], float]]  # noqa: UP007
"""A number, or a function from the logical step (from 0) to a number."""


def value_at(schedule: Schedule, step: int, name: str = "schedule") -> float:
    """Return the schedule's value at logical ``step``, checked: finite and not negative.

    Raises:
        ConfigurationError: The value is not a finite number >= 0.

    >>> value_at(1.5, 7), value_at(lambda step: 2.0 / (1 + step), 1)
    (1.5, 1.0)
    """
    value = schedule(step) if callable(schedule) else schedule
    try:
        number = as_float(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{name} gave {value!r} at step {step}; return a number.") from error
    if not math.isfinite(number) or number < 0.0:
        raise ConfigurationError(f"{name} gave {number} at step {step}; it must be finite and at least 0.")
    return number


@dataclass(frozen=True)
class Exponential:
    """``start * gamma ** step``.

    >>> Exponential(2.0, 0.5)(3)
    0.25
    """

    start: float
    gamma: float

    def __call__(self, step: int) -> float:
        return self.start * self.gamma**step


@dataclass(frozen=True)
class Stepped:
    """``start`` multiplied by ``gamma`` after every ``every`` steps.

    >>> [Stepped(1.0, 2, 0.5)(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    start: float
    every: int
    gamma: float

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigurationError(f"every={self.every} must be a number of steps of at least 1.")

    def __call__(self, step: int) -> float:
        return float(self.start * self.gamma ** (step // self.every))


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` over ``steps`` steps, then ``end``.

    >>> [Linear(2.0, 1.0, 4)(step) for step in (0, 2, 9)]
    [2.0, 1.5, 1.0]
    """

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        share = min(step / self.steps, 1.0) if self.steps > 0 else 1.0
        return self.start + (self.end - self.start) * share


class _Scheduled(Protocol):
    noise_multiplier: float
    max_grad_norm: float


class _Scheduler(ABC):
    """Sets one attribute of an optimizer at every `step`, counted like PyTorch's learning-rate schedulers."""

    attribute: str

    def __init__(self, optimizer: _Scheduled, last_epoch: int) -> None:
        if not hasattr(optimizer, self.attribute):
            raise ConfigurationError(
                f"optimizer={type(optimizer).__name__} has no {self.attribute}; pass the optimizer of make_private."
            )
        self.optimizer = optimizer
        self.last_epoch = last_epoch
        self.base = float(getattr(optimizer, self.attribute))
        self.step()

    @abstractmethod
    def factor(self) -> float:
        """What the value at `last_epoch` is, as a multiple of the base."""

    def step(self) -> None:
        """Move to the next epoch (or step) and set the attribute; call it between logical steps."""
        self.last_epoch += 1
        setattr(self.optimizer, self.attribute, value_at(self.base * self.factor(), self.last_epoch, self.attribute))

    def state_dict(self) -> dict[str, Any]:
        """Return ``last_epoch`` and the base value; functions are not saved."""
        return {"last_epoch": self.last_epoch, "base": self.base}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned and set the attribute accordingly."""
        missing = {"last_epoch", "base"} - set(state_dict)
        if missing:
            raise ConfigurationError(f"the scheduler's state lacks {sorted(missing)}; pass what state_dict() returned.")
        self.last_epoch, self.base = int(state_dict["last_epoch"]), float(state_dict["base"])
        setattr(self.optimizer, self.attribute, value_at(self.base * self.factor(), self.last_epoch, self.attribute))


class _ExponentialScheduler(_Scheduler):
    def __init__(self, optimizer: _Scheduled, *, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def factor(self) -> float:
        return float(self.gamma**self.last_epoch)


class _StepScheduler(_Scheduler):
    def __init__(self, optimizer: _Scheduled, *, step_size: int, gamma: float, last_epoch: int = -1) -> None:
        if step_size < 1:
            raise ConfigurationError(f"step_size={step_size} must be at least 1.")
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer, last_epoch)

    def factor(self) -> float:
        return float(self.gamma ** (self.last_epoch // self.step_size))


class ExponentialNoise(_ExponentialScheduler):
    """Multiply ``noise_multiplier`` by ``gamma`` at every `step`.

    >>> from types import SimpleNamespace
    >>> optimizer = SimpleNamespace(noise_multiplier=2.0, max_grad_norm=1.0)
    >>> ExponentialNoise(optimizer, gamma=0.5).step()
    >>> optimizer.noise_multiplier
    1.0
    """

    attribute = "noise_multiplier"


class StepNoise(_StepScheduler):
    """Multiply ``noise_multiplier`` by ``gamma`` every ``step_size`` steps.

    >>> from types import SimpleNamespace
    >>> optimizer = SimpleNamespace(noise_multiplier=2.0, max_grad_norm=1.0)
    >>> scheduler = StepNoise(optimizer, step_size=2, gamma=0.5)
    >>> scheduler.step(); scheduler.step(); optimizer.noise_multiplier
    1.0
    """

    attribute = "noise_multiplier"


class LambdaNoise(_Scheduler):
    """Set ``noise_multiplier`` to its first value times ``noise_lambda(epoch)``; factors do not accumulate.

    >>> from types import SimpleNamespace
    >>> optimizer = SimpleNamespace(noise_multiplier=2.0, max_grad_norm=1.0)
    >>> LambdaNoise(optimizer, noise_lambda=lambda epoch: 1 + epoch).step()
    >>> optimizer.noise_multiplier
    4.0
    """

    attribute = "noise_multiplier"

    def __init__(self, optimizer: _Scheduled, *, noise_lambda: Callable[[int], float], last_epoch: int = -1) -> None:
        self.noise_lambda = noise_lambda
        super().__init__(optimizer, last_epoch)

    def factor(self) -> float:
        return self.noise_lambda(self.last_epoch)


class ExponentialGradClip(_ExponentialScheduler):
    """Multiply ``max_grad_norm`` by ``gamma`` at every `step`; the noise keeps its multiple of it.

    >>> from types import SimpleNamespace
    >>> optimizer = SimpleNamespace(noise_multiplier=2.0, max_grad_norm=1.0)
    >>> ExponentialGradClip(optimizer, gamma=0.5).step()
    >>> optimizer.max_grad_norm
    0.5
    """

    attribute = "max_grad_norm"


class StepGradClip(_StepScheduler):
    """Multiply ``max_grad_norm`` by ``gamma`` every ``step_size`` steps.

    >>> from types import SimpleNamespace
    >>> optimizer = SimpleNamespace(noise_multiplier=2.0, max_grad_norm=1.0)
    >>> StepGradClip(optimizer, step_size=1, gamma=0.5).step()
    >>> optimizer.max_grad_norm
    0.5
    """

    attribute = "max_grad_norm"


class LambdaGradClip(_Scheduler):
    """Set ``max_grad_norm`` to its first value times ``scheduler_function(epoch)``; factors do not accumulate.

    >>> from types import SimpleNamespace
    >>> optimizer = SimpleNamespace(noise_multiplier=2.0, max_grad_norm=1.0)
    >>> LambdaGradClip(optimizer, scheduler_function=lambda epoch: 1 / (1 + epoch)).step()
    >>> optimizer.max_grad_norm
    0.5
    """

    attribute = "max_grad_norm"

    def __init__(
        self, optimizer: _Scheduled, *, scheduler_function: Callable[[int], float], last_epoch: int = -1
    ) -> None:
        self.scheduler_function = scheduler_function
        super().__init__(optimizer, last_epoch)

    def factor(self) -> float:
        return self.scheduler_function(self.last_epoch)
