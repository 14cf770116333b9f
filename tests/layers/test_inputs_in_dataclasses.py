"""Records that come in a dataclass: into the model, and from one module to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from leave_one_out import MODES
from torch import Tensor, nn

from ghostgrad import PrivacyEngine

ROWS, C = 5, 0.3


@dataclass
class Batch:
    tokens: Tensor
    weights: Tensor
    note: str = "kept"

    def rows(self, rows: slice) -> Batch:
        return replace(self, tokens=self.tokens[rows], weights=self.weights[rows])


class Inner(nn.Module):
    """Answered for by the generic rule: a parameter of its own, and a dataclass in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4).double())

    def forward(self, batch: Batch) -> Batch:
        return replace(batch, weights=batch.weights * torch.sigmoid(self.gain))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(7, 4).double(), Inner(), nn.Linear(4, 3).double()

    def forward(self, batch: Batch) -> Tensor:
        scaled = self.inner(batch)
        assert scaled.note == "kept"
        return self.head((self.embed(scaled.tokens) * scaled.weights.unsqueeze(1)).mean(1))


@pytest.mark.parametrize("mode", MODES)
def test_they_are_trained_like_the_loop_over_records(mode: str) -> None:
    torch.manual_seed(0)
    batch, y = Batch(torch.randint(7, (ROWS, 6)), torch.randn(ROWS, 4).double()), torch.randint(3, (ROWS,))
    model = Model()
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(ROWS):
        grads = torch.autograd.grad(
            F.cross_entropy(model(batch.rows(slice(i, i + 1))), y[i : i + 1]), model.parameters()
        )
        factor = min(1.0, C / torch.cat([grad.flatten() for grad in grads]).norm().item())
        expected = [total + factor * grad for total, grad in zip(expected, grads, strict=True)]
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=1.0, noise_multiplier=0.0, max_grad_norm=C, grad_sample_mode=mode,
    )  # fmt: skip
    F.cross_entropy(model(batch), y).backward()
    optimizer.step()
    for p, total in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, total, rtol=1e-9, atol=1e-12)
