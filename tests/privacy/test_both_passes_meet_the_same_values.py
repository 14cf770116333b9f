"""A mode that takes norms in one backward and sums in another refuses a model whose second backward is not the first again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from leave_one_out import C, classifier, cross_entropy, made_private
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghostgrad import PrivacyError


class DrawnAnew(nn.Module):
    """Dropout that a checkpoint draws again, differently, in each backward."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(5, 8), nn.Dropout(rate), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self._hidden, x, use_reentrant=False, preserve_rng_state=False))  # type: ignore[no-any-return]

    def _hidden(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.first(x)))  # type: ignore[no-any-return]


TWO_PASSES = [{"grad_sample_mode": "ghost"}, {"max_memory": 0}]


def norms_of_steps(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> list[float]:
    found = []
    for _ in range(20):
        cross_entropy(model, x.clone(), y).backward()
        optimizer.step()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("options", TWO_PASSES)
def test_a_checkpoint_that_draws_anew_is_refused_for_single_records(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    _, x, y = classifier()
    model, optimizer, _ = made_private(DrawnAnew(0.5).double(), **options)
    with pytest.raises(PrivacyError, match="preserve_rng_state=False"):
        norms_of_steps(model, optimizer, x[:1], y[:1])
    assert not optimizer.total.holds


@pytest.mark.parametrize("options", TWO_PASSES)
@pytest.mark.parametrize("records", [1, 6])
def test_dropout_that_is_turned_on_later_is_refused(options: dict[str, Any], records: int) -> None:
    torch.manual_seed(0)
    _, x, y = classifier()
    model, optimizer, _ = made_private(DrawnAnew(0.0).double(), **options)
    assert max(norms_of_steps(model, optimizer, x[:records], y[:records])) <= records * C * (1 + 1e-6)
    model.dropout.p = 0.5
    with pytest.raises(PrivacyError, match="preserve_rng_state=False"):
        norms_of_steps(model, optimizer, x[:records], y[:records])


def test_one_pass_bounds_what_it_met() -> None:
    torch.manual_seed(0)
    _, x, y = classifier()
    model, optimizer, _ = made_private(DrawnAnew(0.5).double())
    assert max(norms_of_steps(model, optimizer, x[:1], y[:1])) <= C * (1 + 1e-6)


@pytest.mark.parametrize("options", TWO_PASSES)
def test_a_hook_that_counts_is_refused(options: dict[str, Any]) -> None:
    """Small at first, when norms are taken; it begins after the first batch."""
    calls: list[int] = []

    def growing(grad: Tensor) -> Tensor:
        calls[:] = [calls[0] + 1] if calls else []
        return grad * calls[0] if calls else grad

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            if hidden.requires_grad:
                hidden.register_hook(growing)
            return self.last(torch.relu(hidden))  # type: ignore[no-any-return]

    _, x, y = classifier()
    model, optimizer, _ = made_private(Hooked().double(), **options)
    cross_entropy(model, x[:1], y[:1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    calls.append(1)
    with pytest.raises(PrivacyError, match="draws or counts"):
        cross_entropy(model, x[:1], y[:1]).backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_records_that_are_not_finite_are_no_difference(dtype: torch.dtype) -> None:
    model, x, y = classifier()
    x[0, 0] = torch.inf
    model, optimizer, _ = made_private(model.to(dtype), grad_sample_mode="ghost")
    cross_entropy(model, x.to(dtype), y).backward()
    optimizer.step()
    assert optimizer.total.not_finite == 1
