"""Eval-mode passes, saliency, failed and interrupted passes between steps: the training is that without them, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import MODES, TinyGPT, drawn, next_word, private, sentences, step
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.optim import Optimizer

from ghostgrad import PrivacyError

Between = Callable[[nn.Module, Optimizer], None]


class Net(nn.Module):
    """A convolution, a norm, dropout and a frozen batch norm, for images [n, 1, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.frozen = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4).eval()
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu_(self.frozen(self.norm(self.conv(x))), 0.2)
        return self.head(self.drop(h.flatten(1)))


def images(seed: int, n: int = 6) -> Tensor:
    return torch.randn(n, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1).mean()


def eval_mode(model: nn.Module) -> None:
    model.eval()


def train_mode(model: nn.Module) -> None:
    model.train()
    model.frozen.eval()


def evaluate(model: nn.Module, optimizer: Optimizer) -> None:
    eval_mode(model)
    with torch.no_grad():
        model(images(90))
    model(images(91))
    train_mode(model)


def saliency_by_autograd(model: nn.Module, optimizer: Optimizer) -> None:
    eval_mode(model)
    x = images(92).requires_grad_()
    (found,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    assert found.count_nonzero()
    train_mode(model)


def saliency_by_backward(model: nn.Module, optimizer: Optimizer) -> None:
    eval_mode(model)
    x = images(93).requires_grad_()
    model(x)[:, 0].sum().backward()
    assert x.grad.count_nonzero()
    optimizer.zero_grad()
    train_mode(model)


def saliency_cleared_on_the_model(model: nn.Module, optimizer: Optimizer) -> None:
    eval_mode(model)
    loss_of(model, images(93).requires_grad_()).backward()
    model.zero_grad()
    train_mode(model)


def adversarial_example(model: nn.Module, optimizer: Optimizer) -> None:
    eval_mode(model)
    x = images(94)
    for _ in range(2):
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(loss_of(model, x), x)
        x = x + 0.1 * found.sign()
    train_mode(model)


def forward_without_backward(model: nn.Module, optimizer: Optimizer) -> None:
    state = torch.get_rng_state()
    model(images(95))
    kept.append(model(images(96)))
    torch.set_rng_state(state)


def gradient_of_the_inputs_in_training_mode(model: nn.Module, optimizer: Optimizer) -> None:
    state = torch.get_rng_state()
    x = images(97).requires_grad_()
    torch.autograd.grad(loss_of(model, x), x)
    torch.set_rng_state(state)


def per_sample_gradients_by_functorch(model: nn.Module, optimizer: Optimizer) -> None:
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss_of_one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(partial(functional_call, model, weights), (x[None],))

    state = torch.get_rng_state()
    found = vmap(grad(loss_of_one), in_dims=(None, 0), randomness="different")(weights, images(98))
    assert found["conv.weight"].shape == (6, 4, 1, 3, 3)
    torch.set_rng_state(state)


def jacobian_of_the_inputs_by_functorch(model: nn.Module, optimizer: Optimizer) -> None:
    state = torch.get_rng_state()
    assert jacrev(model, chunk_size=1)(images(99)).shape == (6, 3, 6, 1, 6, 6)
    torch.set_rng_state(state)


kept: list[Tensor] = []


def failing(where: str, error: BaseException) -> Between:
    """A pass that fails inside the model's forward, at its end, or in its backward."""

    def fail(*_: Any) -> None:
        raise error

    def between(model: nn.Module, optimizer: Optimizer) -> None:
        state = torch.get_rng_state()
        part = {"forward": model.norm, "backward": model.drop, "end": model, "start": model}[where]
        register = {
            "forward": part.register_forward_hook,
            "end": part.register_forward_hook,
            "start": part.register_forward_pre_hook,
            "backward": part.register_full_backward_hook,
        }[where]
        handle = register(fail)
        with pytest.raises(type(error)):
            loss_of(model, images(98)).backward()
        handle.remove()
        optimizer.zero_grad()
        torch.set_rng_state(state)

    return between


BETWEEN: dict[str, Between] = {
    "evaluation": evaluate,
    "saliency by autograd.grad": saliency_by_autograd,
    "saliency by backward": saliency_by_backward,
    "saliency cleared on the model": saliency_cleared_on_the_model,
    "adversarial example": adversarial_example,
    "per-sample gradients by torch.func": per_sample_gradients_by_functorch,
    "jacobian of the inputs by torch.func": jacobian_of_the_inputs_by_functorch,
    "forward without backward": forward_without_backward,
    "input gradients in training mode": gradient_of_the_inputs_in_training_mode,
    **{
        f"{type(error).__name__} in {where}": failing(where, error)
        for error in (ValueError("no"), torch.OutOfMemoryError("out of memory"), KeyboardInterrupt())
        for where in ("start", "forward", "end", "backward")
    },
}


def training(mode: str, between: Between | None) -> dict[str, Tensor]:
    """Three noisy steps, with something in front of, between and behind them."""
    torch.manual_seed(0)
    model, optimizer = private(drawn(Net), mode, 0.5, noise_multiplier=1.0)
    for number in range(3):
        if between is not None:
            between(model, optimizer)
        torch.manual_seed(number)
        loss_of(model, images(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    if between is not None:
        between(model, optimizer)
    kept.clear()
    evaluate(model, optimizer)  # an interrupt, which runs no hooks, is forgotten by the next forward
    assert all(p.requires_grad for p in model.parameters())
    assert not torch._dynamo.config.disable
    return model.state_dict()


@pytest.mark.filterwarnings("ignore:module forward hook with ``always_call=True``")
@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("mode", MODES)
def test_the_steps_are_those_of_an_undisturbed_training(mode, name):
    undisturbed, disturbed = training(mode, None), training(mode, BETWEEN[name])
    assert all(torch.equal(undisturbed[key], disturbed[key]) for key in undisturbed)


@pytest.mark.parametrize("mode", MODES)
def test_an_eval_mode_backward_that_is_not_cleared_is_refused(mode):
    model, optimizer = private(drawn(Net), mode, 0.5)
    model.eval()
    loss_of(model, images(0)).backward()
    train_mode(model)
    with pytest.raises(PrivacyError, match="did not produce"):
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_a_penalty_on_a_gradient_by_functorch_is_refused(mode):
    """It reaches the weights through a graph that is not recorded."""
    model, optimizer = private(drawn(Net), mode, 0.5)
    train_mode(model)
    slopes = vmap(grad(lambda x: model(x[None]).sum()), randomness="different")(images(100))
    with pytest.raises(PrivacyError, match="cannot be clipped"):
        (loss_of(model, images(101)) + slopes.square().mean()).backward()
    slopes = vmap(grad(lambda x: model(x[None]).sum()), randomness="different")(images(100))
    slopes.square().mean().backward()
    with pytest.raises(PrivacyError, match="the clipper did not produce"):
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_zero_grad_on_the_model_keeps_the_sum_and_clears_after_a_step(mode):
    found = []
    for clear_on_model in (False, True):
        model, optimizer = private(drawn(TinyGPT), mode, 0.5)
        next_word(model, sentences()).mean().backward()
        if clear_on_model:
            model.zero_grad()
        optimizer.step()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
        next_word(model, sentences(seed=1)).mean().backward()
        optimizer.step()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_of_a_private_model_is_a_plain_model_and_can_be_made_private(mode, how):
    model, optimizer = private(drawn(TinyGPT), mode, 0.5)
    step(model, optimizer)
    twin = COPIES[how](model)
    next_word(twin, sentences()).mean().backward()
    assert all(p.grad is not None for p in twin.parameters()), "plain autograd"
    assert all(p.grad is None for p in model.parameters())
    twin.zero_grad()
    again, its = private(twin, mode, 0.5)
    ours, theirs = step(model, optimizer, sentences(seed=3)), step(again, its, sentences(seed=3))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_private_optimizer_is_not_copied(how):
    """A copy would step on the same clipped sum, with the same noise, and note nothing in the ledger."""
    _, optimizer = private(drawn(TinyGPT), "bk", 0.5)
    with pytest.raises(PrivacyError, match="state_dict"):
        COPIES[how](optimizer)


def test_the_state_of_a_private_optimizer_is_saved_by_its_state_dict():
    model, optimizer = private(drawn(TinyGPT), "bk", 0.5)
    step(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file))


@pytest.mark.parametrize("mode", MODES)
def test_sub_modules_in_eval_mode_are_trained_like_any_other(mode):
    """Only a root in eval mode is not recorded."""
    model, optimizer = private(drawn(TinyGPT), mode, 0.5)
    model.blocks[0].eval()
    found = step(model, optimizer)
    twin, its = private(drawn(TinyGPT), mode, 0.5)
    expected = step(twin, its)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
