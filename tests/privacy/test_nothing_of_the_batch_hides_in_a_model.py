"""What a model takes from the batch beside what it shows: a scale of gradients alone, or values beside much larger ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from leave_one_out import MODES, C, classifier, cross_entropy, made_private, released_sum, sensitivity
from torch import Tensor, nn

from ghostgrad import PrivacyError
from ghostgrad.recording import proofs


class ScaledBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Any) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def by_statistics(x: Tensor) -> Any:
    return 1 / x.detach().abs().mean()


def by_size(x: Tensor) -> Any:
    return 1 / len(x)


def by_largest(x: Tensor) -> Any:
    return 1 / x.detach().abs().max()


def by_record(x: Tensor) -> Any:
    return 1 / (0.1 + x.detach().abs().mean(1, keepdim=True))


def by_constant(x: Tensor) -> Any:
    return 0.25


class Scaled(nn.Module):
    def __init__(self, factor: Any, *, hook: bool = False) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 3)
        self.factor, self.hook = factor, hook

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.relu(self.first(x)))
        factor = self.factor(hidden)
        if not self.hook:
            hidden = ScaledBackward.apply(hidden, factor)
        elif hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * factor)
        return self.last(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("factor", [by_statistics, by_size, by_largest])
@pytest.mark.parametrize("mode", ["bk", "ghost"])
def test_gradients_scaled_by_the_batch_inside_the_model_are_refused(mode: str, factor: Any, hook: bool) -> None:
    model, (_, x, y) = Scaled(factor, hook=hook).double(), classifier()
    with pytest.raises(PrivacyError, match="scales gradients by something of the batch"):
        released_sum(model, cross_entropy, x, y, mode)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("factor", [by_record, by_constant])
def test_gradients_scaled_by_the_record_are_trained(factor: Any, hook: bool) -> None:
    model, (_, x, y) = Scaled(factor, hook=hook).double(), classifier()
    model.dropout.p = 0.0
    assert sensitivity(model, cross_entropy, x, y, "bk") <= C * (1 + 1e-6)


class Masked(nn.Module):
    """Logits of what is not allowed are a large constant."""

    def __init__(self, fill: float, *, centred: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 4)
        self.fill, self.centred = fill, centred

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.centred:
            hidden = hidden - hidden.mean(0).detach()
        logits: Tensor = self.last(torch.relu(hidden))
        return logits.masked_fill(torch.tensor([False, False, False, True]), self.fill)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", [-1e4, -1e9, -float("inf")])
def test_a_mask_of_large_numbers_hides_no_mixing(fill: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, (_, x, y) = Masked(fill, centred=True).to(dtype), classifier()
    with pytest.raises(PrivacyError, match="output for a record changes"):
        released_sum(model, cross_entropy, x.to(dtype), y, "bk")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fill", [-1e4, -1e9, -float("inf")])
def test_masked_logits_are_trained(fill: float, mode: str) -> None:
    torch.manual_seed(0)
    model, (_, x, y) = Masked(fill, centred=False).double(), classifier()
    assert sensitivity(model, cross_entropy, x, y, mode) <= C * (1 + 1e-6)


class Centred(nn.Module):
    """By the mean of the batch, where no gradient shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = hidden - hidden.nanmean(0).detach()
        return self.last(torch.tanh(hidden))  # type: ignore[no-any-return]


def _equal(x: Tensor) -> Tensor:
    return x[:1].expand_as(x).clone()


def _all_but_one_nan(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x[1:], torch.nan), x[:1]])


FIRST = [torch.zeros_like, _equal, _all_but_one_nan, lambda x: torch.full_like(x, torch.nan), lambda x: _equal(x[:2])]


@pytest.mark.parametrize("first", FIRST, ids=["zeros", "equal", "all but one nan", "nan", "two that are equal"])
@pytest.mark.parametrize("forward_only", [False, True])
def test_a_first_batch_that_shows_nothing_does_not_vouch_for_the_next(first: Any, forward_only: bool) -> None:
    """A warm-up on zeros, or records that happen to be equal."""
    model, (_, x, y) = Centred().double(), classifier()
    model, optimizer, _ = made_private(model)
    shows_nothing = first(x)
    if forward_only:
        model(shows_nothing)
    else:
        cross_entropy(model, shows_nothing, y[: len(shows_nothing)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(PrivacyError, match="output for a record changes"):
        cross_entropy(model, x, y).backward()


def test_a_first_batch_that_shows_something_is_rehearsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed = []
    real = proofs.check_forward
    monkeypatch.setattr(proofs, "check_forward", lambda *a, **o: rehearsed.append(0) or real(*a, **o))
    model, x, y = classifier()
    model, optimizer, _ = made_private(model)
    for batch in (torch.zeros_like(x), x, 2 * x, torch.zeros_like(x)):
        cross_entropy(model, batch, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(rehearsed) == 2


class DrawsAMatrix(Centred):
    """Does not run where all that is drawn is one constant."""

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.randn(3, 3, dtype=torch.float64)
        root = torch.linalg.cholesky(drawn @ drawn.mT)
        return super().forward(x) + 0.0 * root.sum()


def test_a_model_that_does_not_run_on_constant_draws_is_looked_at_with_a_seed() -> None:
    model, (_, x, y) = DrawsAMatrix().double(), classifier()
    model, *_ = made_private(model)
    with pytest.raises(PrivacyError, match="output for a record changes"):
        cross_entropy(model, x, y).backward()


DRAWS = {
    "bernoulli": lambda h: torch.bernoulli(h.sigmoid()),
    "bernoulli_": lambda h: torch.empty_like(h).bernoulli_(h.sigmoid()),
    "normal": lambda h: torch.normal(h, 0.1),
    "normal of both": lambda h: torch.normal(h, h.abs() + 0.1),
    "poisson": lambda h: torch.poisson(4 * h.exp()),
    "gamma": lambda h: torch._standard_gamma(h.exp()),
    "dirichlet": lambda h: torch._sample_dirichlet(h.exp()),
    "multinomial": lambda h: torch.multinomial(h.softmax(1), 2, replacement=True).repeat(1, 4).to(h),
    "rrelu": lambda h: torch.rrelu(h, training=True).detach(),
}


class Drawing(nn.Module):
    """Trains on what is drawn from a distribution of its own first layer, which may be taken over the batch."""

    def __init__(self, draw: Any, *, centred: bool) -> None:
        super().__init__()
        self.draw, self.centred = draw, centred
        self.frozen, self.last = nn.Linear(5, 8).requires_grad_(requires_grad=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = 3 * self.frozen(x)
        if self.centred:
            hidden = hidden - hidden.mean(0)
        return self.last(self.draw(hidden.detach()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", DRAWS)
def test_what_a_distribution_is_taken_over_is_seen_through_its_draws(name: str) -> None:
    torch.manual_seed(0)
    _, x, y = classifier()
    model, *_ = made_private(Drawing(DRAWS[name], centred=True).double())
    with pytest.raises(PrivacyError, match="output for a record changes"):
        cross_entropy(model, x, y).backward()


@pytest.mark.parametrize("name", DRAWS)
def test_distributions_of_each_record_are_drawn_from(name: str) -> None:
    torch.manual_seed(0)
    _, x, y = classifier()
    model, optimizer, _ = made_private(Drawing(DRAWS[name], centred=False).double())
    cross_entropy(model, x, y).backward()
    optimizer.step()
    assert 0 < sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None) ** 0.5 <= 6 * C * (1 + 1e-6)


class Choosing(nn.Module):
    """Puts out a mask beside its scores; a loss may count the records in it."""

    def __init__(self, choose: Any) -> None:
        super().__init__()
        self.first, self.last, self.choose = nn.Linear(5, 8), nn.Linear(8, 3), choose

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden), self.choose(hidden.detach().sum(1))


def _chosen_only(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    scores, chosen = model(x)
    return (torch.nn.functional.cross_entropy(scores, y, reduction="none") * chosen).mean()


def test_a_mask_that_the_model_takes_over_the_batch_is_refused() -> None:
    torch.manual_seed(0)
    _, x, y = classifier()
    x[0], x[1] = 10 * x[0].abs(), -10 * x[1].abs()
    model, *_ = made_private(Choosing(lambda sums: sums > sums.mean()).double())
    with pytest.raises(PrivacyError, match="output for a record changes"):
        _chosen_only(model, x, y).backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_of_each_record_is_trained_with(mode: str) -> None:
    torch.manual_seed(0)
    _, x, y = classifier()
    assert sensitivity(Choosing(lambda sums: sums > 0).double(), _chosen_only, x, y, mode) <= C * (1 + 1e-6)
