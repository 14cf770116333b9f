"""Loops put together at random: whatever happens between two steps, the model is the one that the textbook trains."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, PrivacyEngine

MODES = ["hooks", "ghost", "bk", "functorch"]
C, RATE, STEP = 0.4, 0.3, 0.5
RECORDS = 12


class Network(nn.Module):
    """Tied weights, a norm, dropout that is off, a bare parameter; raises when asked to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x)))
        if self.fails:
            raise RuntimeError("out of memory")
        return self.head(self.first(h * self.scale))


def textbook_update(model: Network, x: Tensor, y: Tensor) -> list[Tensor]:
    """The clipped sum over single records, divided by the expected batch size."""
    plain = Network().double()
    plain.load_state_dict(model.state_dict())
    total = [torch.zeros_like(p) for p in plain.parameters()]
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1]), list(plain.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm().item()
        total = [t + g * min(1.0, C / norm) for t, g in zip(total, grads, strict=True)]
    return [t / (RATE * RECORDS) for t in total]


class Loop:
    """One training loop whose every choice comes from a seed."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.mode = MODES[seed % len(MODES)]
        torch.manual_seed(seed)
        self.data = TensorDataset(torch.randn(RECORDS, 4, dtype=torch.float64), torch.randint(3, (RECORDS,)))
        module = Network().double()
        self.original = torch.optim.SGD(module.parameters(), lr=STEP)
        self.engine = PrivacyEngine(seed=seed)
        workers = {"num_workers": 1, "persistent_workers": True} if seed % 7 == 0 else {}
        self.module, self.optimizer, self.loader = self.engine.make_private(
            module=module, optimizer=self.original, data_loader=DataLoader(self.data, batch_size=4, **workers),
            sample_rate=RATE, noise_multiplier=0.0, max_grad_norm=C, grad_sample_mode=self.mode,
            accumulation_steps=self.choose.choice([1, 1, 2]),
        )  # fmt: skip
        self.seen: list[tuple[Tensor, Tensor]] = []

    def disturb(self, x: Tensor, y: Tensor) -> None:
        """What people do between the steps; none of it may leave a trace."""
        what = self.choose.choice(["nothing", "eval", "saliency", "forward", "error", "copy", "loss backward fails"])
        module = self.module
        if what == "eval":
            module.eval()
            with torch.no_grad():
                module(self.data.tensors[0])
            module.train()
        elif what == "saliency" and len(x):
            inputs = x.clone().requires_grad_()
            torch.autograd.grad(module(inputs).sum(), inputs)
        elif what == "forward":
            module(x)
        elif what == "error":
            module.fails = True
            with pytest.raises(RuntimeError, match="out of memory"):
                module(x)
            module.fails = False
        elif what == "copy":
            copy.deepcopy(module)(x).sum()
        elif what == "loss backward fails" and len(x):
            with pytest.raises(RuntimeError, match="shape"):
                module(x).backward()

    def backward(self, x: Tensor, y: Tensor) -> None:
        """One backward, or several on parts of the batch."""
        parts = self.choose.choice([1, 1, 2, 3]) if len(x) > 2 else 1
        for px, py in zip(x.chunk(parts), y.chunk(parts), strict=True):
            F.cross_entropy(self.module(px), py).backward()

    def take(self, x: Tensor, y: Tensor) -> None:
        """One piece of a logical batch through the loop."""
        if self.choose.random() < 0.5:
            self.optimizer.zero_grad()
        self.disturb(x, y)
        before, steps = [p.detach().clone() for p in self.module.parameters()], self.optimizer.steps
        if len(x) or self.choose.random() < 0.5:
            self.backward(x, y)
        self.disturb(x, y)
        self.seen.append((x, y))
        update = textbook_update(self.module, *(torch.cat(column) for column in zip(*self.seen, strict=True)))
        self.optimizer.step()
        if self.optimizer.steps > steps:
            self.seen.clear()
            for p, old, g in zip(self.module.parameters(), before, update, strict=True):
                torch.testing.assert_close(p, old - STEP * g, rtol=0, atol=1e-9, msg=f"{self.mode}")
        self.optimizer.zero_grad()

    def run(self) -> None:
        """A few passes, each left early or not, with a memory manager or without."""
        for _ in range(3):
            leave = self.choose.choice([None, 2, 5])
            if self.choose.random() < 0.5:
                self.iterate(self.loader, leave)
                if self.choose.random() < 0.5:
                    self.optimizer.discard_partial()
            else:
                size = self.choose.choice([1, 2, 3])
                manager = BatchMemoryManager(
                    data_loader=self.loader, max_physical_batch_size=size, optimizer=self.optimizer
                )
                with manager as pieces:
                    self.iterate(pieces, leave)
            self.seen.clear()

    def iterate(self, loader: Any, leave: int | None) -> None:
        for count, (x, y) in enumerate(loader):
            self.take(x, y)
            if count == leave:
                return


@pytest.mark.parametrize("seed", range(40))
def test_any_loop(seed: int) -> None:
    loop = Loop(seed)
    loop.run()
    assert len(loop.engine.accountant) == loop.engine.steps > 0
