"""The noise is that of the bound that every record of the step was clipped to, whoever moves the bound meanwhile."""

from __future__ import annotations

import pytest
import torch
from leave_one_out import MODES, C, classifier, cross_entropy, made_private

from ghostgrad import AdaptiveClipping, FlatClipping, PrivacyError


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moved", [0.01 * C, 100 * C])
def test_a_bound_that_another_training_moves_is_not_released_at(mode: str, moved: float) -> None:
    """Two private optimizers with one clip function: the noise of the first would be that of the second's bound."""
    function, (model, x, y) = FlatClipping(C), classifier()
    _, optimizer, _ = made_private(model, clipping=function, grad_sample_mode=mode)
    _, other, _ = made_private(classifier()[0], clipping=function)
    cross_entropy(model, x[:1], y[:1]).backward()
    other.max_grad_norm = moved
    with pytest.raises(PrivacyError, match="a clip function of its own"):
        cross_entropy(model, x[1:2], y[1:2]).backward()
    with pytest.raises(PrivacyError, match="a clip function of its own"):
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    optimizer.zero_grad()
    cross_entropy(model, x[:1], y[:1]).backward()
    optimizer.step()
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm() <= moved * (1 + 1e-6)


def test_the_step_of_another_training_moves_a_shared_adaptive_bound() -> None:
    function = AdaptiveClipping(C)
    (model, x, y), (second, *_) = classifier(), classifier()
    _, optimizer, _ = made_private(model, clipping=function)
    _, other, _ = made_private(second, clipping=function)
    cross_entropy(model, x, y).backward()
    cross_entropy(second, x, y).backward()
    other.step()
    assert function.bound != C
    with pytest.raises(PrivacyError, match="a clip function of its own"):
        optimizer.step()


def test_a_list_of_bounds_that_is_changed_in_place_is_noticed() -> None:
    model, x, y = classifier()
    _, optimizer, _ = made_private(model, clipping="per_layer")
    cross_entropy(model, x, y).backward()
    optimizer.clip_function.bound[0] /= 10
    with pytest.raises(PrivacyError, match="records of this logical batch were clipped to"):
        optimizer.step()


def test_a_parameter_that_is_listed_twice_later_is_refused() -> None:
    model, x, y = classifier()
    _, optimizer, _ = made_private(model)
    optimizer.param_groups[0]["params"].append(model[0].weight)
    with pytest.raises(PrivacyError, match="in the optimizer more than once"):
        cross_entropy(model, x, y).backward()


class Interrupted(dict):  # type: ignore[type-arg]
    """Lets itself be written once."""

    def __setitem__(self, key: object, value: object) -> None:
        if self:
            raise KeyboardInterrupt
        super().__setitem__(key, value)


@pytest.mark.parametrize("mode", MODES)
def test_records_that_an_interrupt_left_in_a_part_of_the_sum_do_not_come_again(mode: str) -> None:
    model, x, y = classifier()
    _, optimizer, _ = made_private(model, grad_sample_mode=mode)
    optimizer.total._sums = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        cross_entropy(model, x[:1], y[:1]).backward()
    assert len(optimizer.total._sums) == 1
    optimizer.total._sums = dict(optimizer.total._sums)
    with pytest.raises(PrivacyError, match="the same records went through a backward before"):
        cross_entropy(model, x[:1], y[:1]).backward()
