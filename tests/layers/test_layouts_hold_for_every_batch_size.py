"""Where the records are is found on the first batch and holds for batches of any size, also of sizes that other dimensions have.

Poisson batches have every size sooner or later. Each step is held to the loop over single records.
"""

from __future__ import annotations

import functools

import pytest
import torch
from private_step import MODES, read
from single_record import Gradients, assert_same_gradients, bound_that_clips_some, expected_gradient
from single_record import gradients_of_each_record as one_by_one
from torch import Tensor, nn

from ghostgrad import GhostgradError, PrivacyEngine

SIZES = range(1, 13)


class WindowAttention(nn.Module):
    """Attention within windows, [n * 4, 3, f]: a learned temperature and a mask [4, 3, 3] that is the same for all records."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1, 1, 1))
        self.table, self.qkv = nn.Parameter(torch.ones(4, 3, 3)), nn.Linear(4, 12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.mT * self.temperature).unflatten(0, (-1, len(mask))) + mask + self.table
        return scores.flatten(0, 1).softmax(-1) @ v


class Windows(nn.Module):
    """Images [n, 4, 3, f] cut in 4 windows of 3 positions that are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.attend, self.after = nn.Linear(4, 4), WindowAttention(), nn.Linear(4, 2)
        self.register_buffer("mask", torch.arange(36.0).view(4, 3, 3).cos())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.before(x).flatten(0, 1), self.mask.to(x.dtype)).view_as(x)
        return self.after(x).mean((1, 2))


class TimeFirstInside(nn.Module):
    """[n, 4, f] outside, [4, n, f] inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.attend, self.norm = nn.MultiheadAttention(4, 2), nn.LayerNorm(4)
        self.recur, self.own, self.head = nn.GRU(4, 4), Gate(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(0, 1)
        x = self.norm(x + self.attend(x, x, x)[0] * self.scale)
        return self.head(self.own(self.recur(x)[0], x)).transpose(0, 1).mean(1)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(self.gate * y) * x


class Positions(nn.Module):
    """Learned positions: ids [t] or [1, t], a relative bias [heads, t, t], and a token of its own."""

    def __init__(self, *lead: int) -> None:
        super().__init__()
        self.tokens, self.positions, self.lead = nn.Linear(4, 4), nn.Embedding(4, 4), lead
        self.bias, self.start = nn.Embedding(7, 2), nn.Parameter(torch.ones(1, 1, 4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(4)
        x = torch.tanh(self.tokens(x)) + self.norm(self.positions(place.view(*self.lead, -1)))
        x = torch.cat([self.start.expand(len(x), 1, 4), x[:, 1:]], 1)
        bias = self.bias(place[:, None] - place + 3).permute(2, 0, 1)
        heads = x.unflatten(2, (2, 2)).transpose(1, 2)
        return self.head(((heads @ heads.mT + bias).softmax(-1) @ heads).transpose(1, 2).flatten(2)).mean(1)


class FoldedTokens(nn.Module):
    """[n, 4, f] as [n * 4, f], with a table that all share and a convolution over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.conv = nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 3, padding=1)
        self.mix, self.head = nn.Parameter(torch.ones(4, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(torch.tanh(self.first(x.flatten(0, 1)))).view_as(x)
        rows = self.conv((self.mix @ rows).mT).mT
        return self.head(rows.flatten(0, 1)).view(len(x), 4, 2).mean(1)


class TimeFirst(nn.Module):
    """[4, n, f] outside and inside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer, self.norm = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), nn.LayerNorm(4)
        self.recur, self.turned = nn.LSTM(4, 4), nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.recur(self.norm(torch.tanh(self.layer(x * self.scale))))[0]
        return self.turned(x.transpose(0, 1))[0].transpose(0, 1)


MODELS = {
    "windows": (Windows, (4, 3, 4), True),
    "time first inside": (TimeFirstInside, (4, 4), True),
    "positions [t]": (Positions, (4, 4), True),
    "positions [1, t]": (functools.partial(Positions, 1), (4, 4), True),
    "folded tokens": (FoldedTokens, (4, 4), True),
    "time first": (TimeFirst, (4, 4), False),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return model.double()


def records(name: str) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(max(SIZES), *MODELS[name][1], dtype=torch.float64)
    return x * torch.linspace(0.3, 2.0, max(SIZES), dtype=torch.float64).view(-1, *[1] * (x.dim() - 1))


def run(name: str, model: nn.Module, x: Tensor) -> Tensor:
    """Each record's loss, [n]."""
    batch_first = MODELS[name][2]
    out = model(x if batch_first else x.transpose(0, 1))
    out = out if batch_first else out.transpose(0, 1)
    return (out.flatten(1).cos() * torch.arange(1.0, 1 + out[0].numel())).sum(1)


@functools.cache
def truth(name: str) -> tuple[list[Gradients], float]:
    each = one_by_one(make(name), functools.partial(run, name), [records(name)])
    return each, bound_that_clips_some(each)


@pytest.mark.parametrize(("first", "mode"), [*((n, "bk") for n in (1, 2, 3, 5, 8, 12)), *((4, mode) for mode in MODES)])
@pytest.mark.parametrize("name", MODELS)
def test_every_size_of_batch_is_exact_whatever_the_first_was(name: str, first: int, mode: str) -> None:
    each, bound = truth(name)
    model = make(name)
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=None, sample_rate=0.5,
        expected_batch_size=4, noise_multiplier=0.0, max_grad_norm=bound, grad_sample_mode=mode,
        batch_first=MODELS[name][2],
    )  # fmt: skip
    for n in (first, *SIZES):
        optimizer.zero_grad()
        run(name, model, records(name)[:n]).mean().backward()
        optimizer.step()
        assert_same_gradients(read(model), expected_gradient(each[:n], bound, expected_batch_size=4), relative=1e-9)


class Weighted(nn.Module):
    """Weights that all records share, [1, 4], or that come one for each, [n, 4]; it hides how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        weights = weights if len(weights) == len(x) else weights.mean(0, keepdim=True)
        return torch.sin(x * self.own) * weights


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), Weighted()

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.inner(self.first(x), weights)


@pytest.mark.parametrize("mode", MODES)
def test_what_all_records_shared_and_then_comes_one_for_each_is_not_taken_for_shared(mode: str) -> None:
    torch.manual_seed(0)
    model, x, weights = Outer().double(), torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=None, sample_rate=0.5,
        expected_batch_size=4, noise_multiplier=0.0, max_grad_norm=1.0, grad_sample_mode=mode,
    )  # fmt: skip
    model(x, weights[:1]).sum(1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(GhostgradError, match=r"^inner: "):
        model(x, weights).sum(1).mean().backward()
