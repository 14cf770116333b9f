"""Where the squares of gradients vanish in single precision, norms are 0 and nothing would be clipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from leave_one_out import MODES, classifier, cross_entropy

from ghostgrad import ConfigurationError, PrivacyEngine


def step(bound: Any, scale: float, mode: str, dtype: torch.dtype, **options: Any) -> float:
    """The norm of one record's contribution under a GradScaler, in units of the bound."""
    model, x, y = classifier()
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model.to(dtype), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=1.0, noise_multiplier=0.0, max_grad_norm=bound, grad_sample_mode=mode, **options,
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(cross_entropy(model, x[:1].to(dtype), y[:1])).backward()
    scaler.step(optimizer)
    largest = max(bound) if isinstance(bound, list) else bound
    return torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item() / largest


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("bound", "scale"), [(1e-24, 1.0), (1e-2, 1e-22), (1e-9, 1e-6)])
def test_they_are_refused_in_single_precision(bound: float, scale: float, mode: str) -> None:
    with pytest.raises(ConfigurationError, match="squares of numbers that small vanish"):
        step(bound, scale, mode, torch.float32)


def test_one_of_several_bounds_is_enough() -> None:
    with pytest.raises(ConfigurationError, match="max_grad_norm=1e-20"):
        step([1.0, 1.0, 1e-20, 1.0], 1.0, "bk", torch.float32, clipping="per_layer")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("bound", "scale"), [(1e-11, 1.0), (1e-3, 1e-7), (1e-6, 65536.0)])
def test_small_ones_that_can_be_measured_hold(bound: float, scale: float, mode: str) -> None:
    assert 0.9 < step(bound, scale, mode, torch.float32) <= 1 + 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_in_double_precision_smaller_ones_hold(mode: str) -> None:
    assert 0.9 < step(1e-40, 1.0, mode, torch.float64) <= 1 + 1e-6
