"""Layers are frozen and unfrozen between the steps of one training: every step is the textbook's on those that train."""

from __future__ import annotations

import pytest
import torch
from single_record import assert_same_gradients, bound_that_clips_some, expected_gradient, gradients_of_each_record
from small_models import MODES, RECORDS, TinyGPT, drawn, next_word, private, sentences
from torch import nn

TRAINED = [("head", "norm"), ("head", "norm", "blocks.1"), ("",), ("words",), ("blocks",), ("",)]
"""What trains in each step, by the beginnings of names: a fine-tuning that unfreezes from the top, and then skips about."""


def train_only(model: nn.Module, beginnings: tuple[str, ...]) -> set[str]:
    chosen = {name for name, _ in model.named_parameters() if name.startswith(beginnings)}
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    return chosen


@pytest.mark.parametrize("mode", MODES)
def test_each_step_is_the_textbook_step_on_what_trains(mode: str) -> None:
    each = gradients_of_each_record(drawn(TinyGPT), next_word, [sentences()])
    bound = bound_that_clips_some(each)
    model = drawn(TinyGPT)
    model, optimizer = private(model, mode, bound, lr=0.0)
    for beginnings in TRAINED:
        chosen = train_only(model, beginnings)
        assert chosen, beginnings
        next_word(model, sentences()).mean().backward()
        optimizer.step()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.zero_grad()
        those = [{name: record[name] for name in chosen} for record in each]
        assert found.keys() == chosen
        assert_same_gradients(found, expected_gradient(those, bound, expected_batch_size=RECORDS), relative=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_frozen_keeps_its_bits_and_what_is_not_gets_noise(mode: str) -> None:
    model, optimizer = private(drawn(TinyGPT), mode, 1.0, noise_multiplier=1.0, lr=0.1)
    for beginnings in TRAINED:
        chosen = train_only(model, beginnings)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        next_word(model, sentences()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == chosen
