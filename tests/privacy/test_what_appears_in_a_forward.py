"""A layer that a model makes for itself in a forward has weights that nobody has looked at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ghostgrad import PrivacyEngine, PrivacyError


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.grows = nn.Linear(6, 6), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.grows:
            self.adapter = nn.Linear(6, 6)
            x = self.adapter(x)
        return x


@pytest.mark.parametrize("mode", ["bk", "ghost", "hooks"])
def test_its_gradient_is_noticed_in_the_backward(mode: str) -> None:
    torch.manual_seed(0)
    model = Growing()
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.1,
        expected_batch_size=4.0, noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode=mode,
    )  # fmt: skip
    model(torch.randn(4, 6)).square().mean(1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.grows = True
    with pytest.raises(PrivacyError, match="adapter"):
        model(torch.randn(4, 6)).square().mean(1).mean().backward()
    assert model.adapter.weight.grad is None
