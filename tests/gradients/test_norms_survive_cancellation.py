"""A record whose positions cancel must not get a smaller norm than its gradient has: it would pass unclipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ghostgrad import PrivacyEngine
from ghostgrad.gradients import Joined, Lookup, Matmul

FEATURES, OUTPUTS = 48, 64


def cancelling(size: float) -> tuple[Tensor, Tensor]:
    """Two positions with the same input and (nearly) opposite gradients, [n, 2, i] and [n, 2, o]."""
    torch.manual_seed(0)
    x, dy = size * torch.randn(4, 1, FEATURES), torch.randn(4, 1, OUTPUTS)
    return x.expand(-1, 2, -1), torch.cat([dy, -dy + 1e-4 * torch.randn(4, 1, OUTPUTS)], 1)


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_a_gram_does_not_lose_what_is_left(size):
    x, dy = cancelling(size)
    use = Matmul(x.unsqueeze(1), dy.unsqueeze(1), torch.Size([OUTPUTS, FEATURES]))
    exact = Matmul(use.x.double(), use.dy.double(), use.shape).grad_samples().flatten(1).norm(dim=1)
    assert use.route == "gram"
    torch.testing.assert_close(use.sq_norms().sqrt().double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_cross_terms_do_not_lose_what_is_left(size):
    torch.manual_seed(0)
    hidden, error = size * torch.randn(4, 1, 1, FEATURES), torch.zeros(4, 1, 1, OUTPUTS)
    error[..., 7] = 1.0
    head = Matmul(hidden, error, torch.Size([OUTPUTS, FEATURES]))
    table = Lookup(torch.full((4, 1), 7), -hidden[:, 0] + size * 1e-4 * torch.randn(4, 1, FEATURES), head.shape)
    exact = (hidden[:, 0, 0].double() + table.dy[:, 0].double()).norm(dim=1)
    found = Joined([head, table]).sq_norms().sqrt().double()
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0)


def test_ordinary_gradients_keep_the_cheap_route(monkeypatch):
    monkeypatch.setattr(Matmul, "_chunked_norms", lambda use: pytest.fail("materialised"))
    torch.manual_seed(0)
    for t in (2, 10, 20):
        use = Matmul(torch.randn(8, 1, t, FEATURES), torch.randn(8, 1, t, OUTPUTS), torch.Size([OUTPUTS, FEATURES]))
        assert use.route == "gram"
        use.sq_norms()


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk", "functorch"])
def test_a_record_that_cancels_is_clipped_through_the_public_api(mode):
    x, dy = cancelling(1e4)
    model = nn.Linear(FEATURES, OUTPUTS, bias=False)
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=1.0, noise_multiplier=0.0, max_grad_norm=0.01, loss_reduction="sum", grad_sample_mode=mode,
    )  # fmt: skip
    (model(x[:1]) * dy[:1]).sum().backward()
    optimizer.step()
    assert 0.0099 < float(model.weight.grad.double().norm()) < 0.0101
