"""Compiled code and autograd functions of one's own show no numbers: such a loss has to be a criterion, taken apart on values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from leave_one_out import MODES, C, Loss, classifier, cross_entropy, made_private, released_sum
from torch import Tensor, nn

from ghostgrad import PrivacyEngine, PrivacyError

pytestmark = [  # all are torch's own while it compiles
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Scaled(torch.autograd.Function):
    """A product with a number that is not saved where anybody could see it."""

    @staticmethod
    def forward(ctx: Any, each: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return each * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def each_and_mask(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    mask = (y != 2).double()
    return F.cross_entropy(out, y, reduction="none") * mask, mask


def scaled_within(out: Tensor, y: Tensor) -> Tensor:
    each, mask = each_and_mask(out, y)
    return Scaled.apply(each, mask.numel() / mask.sum().item()).mean()


def scaled_after(out: Tensor, y: Tensor) -> Tensor:
    each, mask = each_and_mask(out, y)
    return Scaled.apply(each.mean(), mask.numel() / mask.sum().item())


def masked_mean(out: Tensor, y: Tensor) -> Tensor:
    each, mask = each_and_mask(out, y)
    return each.sum() / mask.sum()


def masked_parts(out: Tensor, y: Tensor) -> Tensor:
    each, mask = each_and_mask(out, y)
    return each * len(mask) / mask.sum()


def mean(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y)


def compiled(function: Callable[..., Tensor], backend: str = "aot_eager") -> Callable[..., Tensor]:
    return torch.compile(function, backend=backend)


LOSSES: dict[str, Loss] = {
    "function of one's own, within": lambda m, x, y: scaled_within(m(x), y),
    "function of one's own, after": lambda m, x, y: scaled_after(m(x), y),
    "compiled": lambda m, x, y: compiled(masked_mean)(m(x), y),
    "compiled within": lambda m, x, y: compiled(masked_parts)(m(x), y).mean(),
    "inductor": lambda m, x, y: compiled(masked_mean, "inductor")(m(x), y),
    "compiled, without a count": lambda m, x, y: compiled(mean)(m(x), y),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_they_are_refused_with_the_way_out(mode: str, name: str) -> None:
    model, x, y = classifier()
    with pytest.raises(PrivacyError, match=r"cannot be read \(code that torch.compile made.*pass it as criterion="):
        released_sum(model, LOSSES[name], x, y, mode)


def test_without_the_refusal_one_record_would_move_the_sum_by_more_than_it_adds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is refused is no false alarm: the sixth record rescales the fifth when it comes."""
    monkeypatch.setattr("ghostgrad.recording.loss_terms.is_opaque", lambda node: False)
    model, x, _ = classifier()
    y = torch.tensor([2, 2, 2, 2, 0, 1])
    loss = LOSSES["function of one's own, within"]
    records = [released_sum(model, loss, x[:n], y[:n], "ghost", max_grad_norm=1e6) for n in (5, 6)]
    own = released_sum(model, cross_entropy, x[5:], y[5:], "ghost", max_grad_norm=1e6)
    # Alone with masked ones the fifth weighs five times, and with the sixth three times as much, as both do.
    other = released_sum(model, cross_entropy, x[4:5], y[4:5], "ghost", max_grad_norm=1e6)
    torch.testing.assert_close(records[1] - records[0], 3 * own - 2 * other)


def _criterion_step(mode: str, criterion: Any, **options: Any) -> list[Tensor]:
    model, x, y = classifier()
    model, optimizer, criterion, _ = made_private(model, criterion=criterion, grad_sample_mode=mode, **options)
    criterion(model(x), y).backward()
    optimizer.step()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_criterion_gives_the_step_of_the_plain_one(mode: str, backend: str) -> None:
    found = _criterion_step(mode, compiled(mean, backend))
    module = nn.CrossEntropyLoss()
    module.compile(backend=backend)
    for one, same, expected in zip(
        found, _criterion_step(mode, module), _criterion_step(mode, F.cross_entropy), strict=True
    ):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(same, expected, rtol=1e-9, atol=1e-12)


class WithAnothersGradient(torch.autograd.Function):
    """The value of a mean, and the gradient of a mean that is divided by its own value."""

    @staticmethod
    def forward(ctx: Any, each: Tensor) -> Tensor:
        ctx.save_for_backward(each)
        return each.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (each,) = ctx.saved_tensors
        return (grad / each.numel() / each.mean()).expand_as(each)


def detached_mean(out: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(out, y, reduction="none")
    return (each - each.detach()).mean() / each.detach().mean() + each.detach().mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "criterion",
    [
        lambda out, y: WithAnothersGradient.apply(F.cross_entropy(out, y, reduction="none")),
        lambda out, y: compiled(detached_mean)(out, y),
        lambda out, y: compiled(detached_mean, "inductor")(out, y),
    ],
    ids=["function of one's own", "compiled", "inductor"],
)
def test_a_criterion_of_the_right_value_with_a_gradient_over_the_batch_is_refused(
    mode: str, criterion: Callable[..., Tensor]
) -> None:
    with pytest.raises(PrivacyError, match="the gradient of the criterion is not the mean"):
        _criterion_step(mode, criterion)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_training_step_that_is_compiled_as_one_is_the_step(mode: str, backend: str) -> None:
    """With its noise, bit for bit; the criterion is passed, so what would be compiled of it runs as it is."""

    def trained(*, compile_it: bool) -> dict[str, Tensor]:
        model, x, y = classifier()
        model, optimizer, criterion, _ = PrivacyEngine(seed=0).make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
            expected_batch_size=3.0, noise_multiplier=1.0, max_grad_norm=C, grad_sample_mode=mode, criterion=F.cross_entropy,
        )  # fmt: skip

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(step, backend=backend) if compile_it else step
        for size in (6, 4, 1, 5):
            run(x[:size], y[:size])
        return model.state_dict()

    found, expected = trained(compile_it=True), trained(compile_it=False)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
