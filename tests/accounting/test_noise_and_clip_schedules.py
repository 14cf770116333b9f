"""Schedules are values; Opacus' schedulers move an optimizer's attributes."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from ghostgrad.errors import ConfigurationError
from ghostgrad.schedulers import (
    Exponential,
    ExponentialGradClip,
    ExponentialNoise,
    LambdaGradClip,
    LambdaNoise,
    Linear,
    StepGradClip,
    StepNoise,
    Stepped,
    value_at,
)


def _optimizer() -> Any:
    return SimpleNamespace(noise_multiplier=2.0, max_grad_norm=0.5)


CASES = [
    (lambda o: ExponentialNoise(o, gamma=0.9), "noise_multiplier", [2.0, 1.8, 1.62, 1.458]),
    (lambda o: StepNoise(o, step_size=2, gamma=0.5), "noise_multiplier", [2.0, 2.0, 1.0, 1.0]),
    (lambda o: LambdaNoise(o, noise_lambda=lambda e: 1 / (1 + e)), "noise_multiplier", [2.0, 1.0, 2 / 3, 0.5]),
    (lambda o: ExponentialGradClip(o, gamma=2.0), "max_grad_norm", [0.5, 1.0, 2.0, 4.0]),
    (lambda o: StepGradClip(o, step_size=3, gamma=0.1), "max_grad_norm", [0.5, 0.5, 0.5, 0.05]),
    (lambda o: LambdaGradClip(o, scheduler_function=lambda e: 1.0 + e), "max_grad_norm", [0.5, 1.0, 1.5, 2.0]),
]


@pytest.mark.parametrize(("make", "name", "values"), CASES)
def test_scheduler_sets_the_attribute_at_every_step(make: Any, name: str, values: list[float]) -> None:
    optimizer = _optimizer()
    scheduler = make(optimizer)
    seen = [getattr(optimizer, name)]
    for _ in values[1:]:
        scheduler.step()
        seen.append(getattr(optimizer, name))
    assert seen == pytest.approx(values)


@pytest.mark.parametrize(("make", "name", "values"), CASES)
def test_scheduler_continues_from_its_state(make: Any, name: str, values: list[float]) -> None:
    first = make(_optimizer())
    first.step()
    state = copy.deepcopy(first.state_dict())
    optimizer = _optimizer()
    setattr(optimizer, name, 123.0)  # whatever the resumed run had
    second = make(optimizer)
    second.load_state_dict(state)
    assert getattr(optimizer, name) == pytest.approx(values[1])
    second.step()
    assert getattr(optimizer, name) == pytest.approx(values[2])


@pytest.mark.parametrize("schedule", [Exponential(2.0, 0.99), Stepped(1.0, 5, 0.5), Linear(2.0, 1.0, 10)])
def test_schedules_are_values_that_can_be_saved(schedule: Any) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert all(value_at(schedule, step) > 0 for step in range(20))


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, "much", None])
def test_impossible_values_are_named(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"noise_multiplier gave .* at step 3"):
        value_at(lambda step: wrong, 3, "noise_multiplier")


def test_foreign_optimizers_and_states_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no noise_multiplier"):
        ExponentialNoise(SimpleNamespace(), gamma=0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="lacks"):
        ExponentialNoise(_optimizer(), gamma=0.5).load_state_dict({})
    with pytest.raises(ConfigurationError, match="step_size=0"):
        StepNoise(_optimizer(), step_size=0, gamma=0.5)
