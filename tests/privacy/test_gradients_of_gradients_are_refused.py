"""A term of the loss that is made of gradients would have none of its own, without an error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from leave_one_out import MODES, classifier, cross_entropy, made_private, released_sum

from ghostgrad import PrivacyError


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("again", [False, True])
def test_a_penalty_on_gradients_of_the_inputs_is_refused(mode: str, again: bool) -> None:
    model, x, y = classifier()
    model, optimizer, _ = made_private(model, grad_sample_mode=mode)
    x.requires_grad_()
    out = model(x)
    with pytest.raises(PrivacyError, match="create_graph=True"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(PrivacyError, match="create_graph=True"):
        torch.autograd.grad(F.cross_entropy(model(x) if again else out, y), x, create_graph=True)
    assert not optimizer.total.holds


def test_a_backward_that_is_to_be_differentiated_is_refused() -> None:
    model, x, y = classifier()
    model, optimizer, _ = made_private(model)
    with pytest.raises(PrivacyError, match="create_graph=True"):
        cross_entropy(model, x, y).backward(create_graph=True)
    assert not optimizer.total.holds


@pytest.mark.parametrize("mode", MODES)
def test_inputs_that_their_gradients_perturbed_are_trained_on(mode: str) -> None:
    model, x, y = classifier()
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy(model, leaf, y), leaf)
    perturbed = x + 0.1 * slope.sign()

    def adversarial(private: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(private, inputs, y), inputs)
        return cross_entropy(private, x + 0.1 * slope.sign(), y)

    expected = released_sum(model, cross_entropy, perturbed, y, "bk")
    assert torch.allclose(released_sum(model, adversarial, x, y, mode), expected, rtol=1e-9, atol=0.0)
