"""Copies of an engine, and processes that are forked with one, would draw the same noise for other sums."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interrupted import in_a_process
from torch import nn

from ghostgrad import PrivacyEngine, PrivacyError


def private(engine: PrivacyEngine) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    model, optimizer, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=4.0, noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    return model, optimizer


def step(model: nn.Module, optimizer: Any) -> None:
    F.cross_entropy(model(torch.ones(3, 4)), torch.tensor([0, 1, 0])).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_is_not_copied(duplicate: Callable[[Any], Any]) -> None:
    with pytest.raises(PrivacyError, match="both would add the same noise"):
        duplicate(PrivacyEngine())


def test_a_forked_process_does_not_go_on_with_a_training() -> None:
    model, optimizer = private(PrivacyEngine())
    step(model, optimizer)

    def forked() -> None:
        before = model.weight.clone()
        with pytest.raises(PrivacyError, match="in the process that trains"):
            step(model, optimizer)
        assert torch.equal(model.weight, before)

    assert in_a_process(forked)
    step(model, optimizer)


def test_a_forked_process_does_not_begin_a_training_with_the_engine_of_another() -> None:
    """As in a sweep that starts one process for each learning rate: all would have the noise of the first."""
    engine = PrivacyEngine()

    def forked() -> None:
        with pytest.raises(PrivacyError, match="in the process that trains"):
            private(engine)
        model, optimizer = private(PrivacyEngine())
        step(model, optimizer)

    assert in_a_process(forked)


def test_an_engine_with_a_seed_repeats_its_noise_wherever_it_is() -> None:
    engine = PrivacyEngine(seed=0)
    assert in_a_process(lambda: step(*private(engine)))
