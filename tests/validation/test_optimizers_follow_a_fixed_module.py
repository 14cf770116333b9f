"""An optimizer that was built before `fix` can go on with the fixed module, groups and state kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ghostgrad import PrivacyEngine
from ghostgrad.errors import ConfigurationError, UnsupportedModuleError
from ghostgrad.validation import ModuleValidator, remap_optimizer


def model_and_optimizer() -> tuple[nn.Sequential, torch.optim.SGD]:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    groups = [
        {"params": [model[0].weight, model[0].bias], "lr": 0.5},
        {"params": [*model[1].parameters(), *model[2].parameters()], "weight_decay": 0.01},
    ]
    return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(16, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_groups_keep_their_order_and_options():
    model, optimizer = model_and_optimizer()
    fixed = ModuleValidator.fix(model)
    assert remap_optimizer(optimizer, model, fixed) is optimizer
    expected = [[fixed[0].weight, fixed[0].bias], [*fixed[1].parameters(), *fixed[2].parameters()]]
    for group, parameters in zip(optimizer.param_groups, expected, strict=True):
        assert len(group["params"]) == len(parameters)
        assert all(a is b for a, b in zip(group["params"], parameters, strict=True))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0), (0.1, 0.01)]


def test_momentum_and_schedulers_go_on():
    model, optimizer = model_and_optimizer()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    train(model, optimizer)
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    fixed = ModuleValidator.fix(model)
    remap_optimizer(optimizer, model, fixed)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.01])
    assert len(optimizer.state) == len(momentum)
    for parameter, kept in zip(fixed.parameters(), momentum, strict=True):
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], kept)


def test_steps_move_the_new_module_only():
    model, optimizer = model_and_optimizer()
    fixed = ModuleValidator.fix(model)
    remap_optimizer(optimizer, model, fixed)
    old = [p.detach().clone() for p in model.parameters()]
    train(fixed, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True))
    assert not torch.equal(fixed[0].weight, model[0].weight)


def test_tied_weights_are_one_parameter_still():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fixed = ModuleValidator.fix(model)
    remap_optimizer(optimizer, model, fixed)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    assert optimizer.param_groups[0]["params"][0] is fixed[2].weight


def test_a_foreign_parameter_is_refused_and_nothing_changed():
    model, optimizer = model_and_optimizer()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    before = [list(map(id, group["params"])) for group in optimizer.param_groups]
    with pytest.raises(ConfigurationError, match=r"param_groups\[2\].*\(3,\).*not a parameter of old_module"):
        remap_optimizer(optimizer, model, ModuleValidator.fix(model))
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == before


def test_a_module_of_another_shape_is_refused():
    model, optimizer = model_and_optimizer()
    other = nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(1, 8), nn.Linear(8, 3))
    with pytest.raises(ConfigurationError, match=r"'2.weight'.*\(2, 8\).*\(3, 8\)"):
        remap_optimizer(optimizer, model, other)


def test_fix_moves_an_optimizer_that_was_built_before_and_it_trains_privately():
    model, optimizer = model_and_optimizer()
    train(model, optimizer)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    fixed = ModuleValidator.fix(model, optimizer=optimizer)
    assert optimizer.param_groups[0]["params"][0] is fixed[0].weight
    assert torch.equal(optimizer.state[fixed[0].weight]["momentum_buffer"], momentum)
    private, steps, _ = PrivacyEngine(seed=0).make_private(
        module=fixed, optimizer=optimizer, data_loader=None, sample_rate=0.5, expected_batch_size=4, noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    before = fixed[1].weight.detach().clone()
    private(torch.randn(4, 6)).square().sum(1).mean().backward()
    steps.step()
    assert not torch.equal(fixed[1].weight, before)


@pytest.mark.parametrize("method", [ModuleValidator.fix, ModuleValidator.fix_and_validate])
def test_an_optimizer_of_another_module_is_refused_and_stays(method):
    model, _ = model_and_optimizer()
    _, foreign = model_and_optimizer()
    before = [p for group in foreign.param_groups for p in group["params"]]
    with pytest.raises(ConfigurationError, match="not a parameter of old_module"):
        method(model, optimizer=foreign)
    after = [p for group in foreign.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_an_optimizer_stays_where_the_fixed_module_is_not_valid():
    model = nn.Sequential(nn.Embedding(4, 6, max_norm=1.0), nn.BatchNorm1d(6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModuleError, match="max_norm"):
        ModuleValidator.fix_and_validate(model, optimizer=optimizer)
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
