"""`fix` replaces exactly what was refused and carries everything else over: weights, ties, sharing, dtype, modes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.validation import ModuleValidator, fix, get_compatible_module


def residual_like() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, eps=1e-3),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24)),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_the_affine_weights_are_carried_over():
    model = residual_like()
    fixed = ModuleValidator.fix(model)
    assert isinstance(fixed[1], nn.GroupNorm)
    assert fixed[1].eps == 1e-3
    assert [name for name, _ in fixed.named_parameters()] == [name for name, _ in model.named_parameters()]
    for old, new in zip(model.parameters(), fixed.parameters(), strict=True):
        assert torch.equal(old, new)
        assert old is not new, "a copy, so that the old module is not trained with it"


def test_the_given_module_is_not_touched():
    model = residual_like()
    before = copy.deepcopy(model.state_dict())
    ModuleValidator.fix(model)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_fixed_module_is_valid_runs_and_does_not_mix_records():
    fixed = ModuleValidator.fix_and_validate(residual_like().double())
    assert ModuleValidator.is_valid(fixed)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fixed(x)[:1], fixed(x[:1]))


def test_a_fixed_module_is_left_as_it_is():
    fixed = ModuleValidator.fix(residual_like())
    assert ModuleValidator.changes(fixed) == []
    assert str(ModuleValidator.fix(fixed)) == str(fixed)


@pytest.mark.parametrize(
    ("layer", "groups"),
    [
        (nn.BatchNorm2d(64), 16),
        (nn.BatchNorm2d(256), 32),
        (nn.BatchNorm2d(20), 5),
        (nn.BatchNorm2d(17), 1),
        (nn.BatchNorm2d(3), 1),
        (nn.BatchNorm3d(16), 4),
        (nn.SyncBatchNorm(32), 8),
        (nn.BatchNorm1d(64), 1),
    ],
)
def test_the_number_of_groups_divides_the_channels_and_leaves_enough_in_each(layer, groups):
    fixed = ModuleValidator.fix(layer)
    assert (fixed.num_groups, fixed.num_channels) == (groups, layer.num_features)


@pytest.mark.parametrize("width", [2, 3, 16, 64])
def test_a_fixed_batch_norm_over_plain_features_does_not_wipe_them_out(width):
    fixed = ModuleValidator.fix(nn.BatchNorm1d(width))
    assert fixed(torch.randn(5, width)).abs().min(dim=1).values.max() > 0


def test_a_batch_norm_without_affine_weights_gets_none():
    fixed = ModuleValidator.fix(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)))
    assert list(fixed[1].parameters()) == []
    assert fixed(torch.randn(2, 4)).shape == (2, 4)


def test_training_flag_requires_grad_and_dtype_stay():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, track_running_stats=False)).to(torch.bfloat16)
    model[1].weight.requires_grad_(False)
    model[1].eval()
    fixed = ModuleValidator.fix(model)
    assert not fixed[1].training
    assert fixed[0].training
    assert fixed[1].weight.dtype == torch.bfloat16
    assert (fixed[1].weight.requires_grad, fixed[1].bias.requires_grad) == (False, True)


def test_the_device_stays():
    model = nn.Sequential(nn.Linear(8, 8, device="meta"), nn.BatchNorm1d(8, device="meta"))
    assert {p.device.type for p in ModuleValidator.fix(model).parameters()} == {"meta"}


def test_a_shared_layer_stays_shared():
    norm = nn.BatchNorm1d(8)
    fixed = ModuleValidator.fix(nn.Sequential(norm, nn.Linear(8, 8), nn.Sequential(norm)))
    assert isinstance(fixed[0], nn.GroupNorm)
    assert fixed[0] is fixed[2][0]


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[2].weight = model[0].weight
    model[3].weight = model[1].weight
    fixed = ModuleValidator.fix(model)
    assert fixed[2].weight is fixed[0].weight
    assert fixed[3].weight is fixed[1].weight
    assert fixed[3].bias is not fixed[1].bias


def test_a_batch_norm_frozen_in_eval_mode_stays():
    model = residual_like()
    model[1].eval()
    fixed = ModuleValidator.fix(model)
    assert isinstance(fixed[1], nn.BatchNorm2d)
    assert isinstance(fixed[3][1], nn.GroupNorm)


def test_instance_norm_loses_its_running_statistics_only():
    layer = nn.InstanceNorm2d(6, affine=True, eps=1e-2, track_running_stats=True)
    nn.init.normal_(layer.weight)
    fixed = ModuleValidator.fix(nn.Sequential(layer))[0]
    assert type(fixed) is nn.InstanceNorm2d
    assert (fixed.track_running_stats, fixed.eps) == (False, 1e-2)
    assert torch.equal(fixed.weight, layer.weight)
    x = torch.randn(3, 6, 4, 4)
    torch.testing.assert_close(fixed(x), layer(x))


class NormAndActivation(nn.BatchNorm2d):
    """A subclass whose forward does more than to normalise, as image libraries have."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


class RenamedNorm(nn.BatchNorm2d):
    """A subclass that computes the same."""


def test_a_layer_with_a_forward_of_its_own_is_left_and_reported():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), NormAndActivation(8))
    assert type(ModuleValidator.fix(model)[1]) is NormAndActivation
    with pytest.raises(UnsupportedModuleError, match="NormAndActivation"):
        ModuleValidator.fix_and_validate(model)


def test_a_subclass_that_computes_the_same_is_replaced():
    assert isinstance(ModuleValidator.fix(nn.Sequential(nn.Conv2d(3, 8, 1), RenamedNorm(8)))[1], nn.GroupNorm)


def test_the_module_itself_can_be_the_layer():
    assert isinstance(ModuleValidator.fix(nn.BatchNorm2d(8)), nn.GroupNorm)


def test_changes_say_what_fix_does_to_each_layer():
    changes = ModuleValidator.changes(residual_like())
    assert list(map(str, changes)) == [
        "1: BatchNorm2d(16) -> GroupNorm(4, 16)",
        "3.1: BatchNorm2d(24) -> GroupNorm(6, 24)",
    ]
    assert fix(residual_like()).changes == changes


def test_get_compatible_module_refuses_what_has_no_standard_replacement():
    with pytest.raises(UnsupportedModuleError, match="max_norm"):
        get_compatible_module(nn.Sequential(nn.Embedding(4, 2, max_norm=1.0), nn.BatchNorm1d(2)))


def test_fix_itself_says_what_it_changed_when_asked():
    fixed = ModuleValidator.fix(residual_like(), with_changes=True)
    assert fixed.changes == ModuleValidator.changes(residual_like())
    assert isinstance(fixed.module[1], nn.GroupNorm)


def test_lists_dictionaries_and_shared_blocks_stay_what_they_are():
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.ModuleDict({"list": nn.ModuleList([block, block, nn.BatchNorm1d(4)]), "again": block})
    fixed = ModuleValidator.fix(model)
    assert fixed["list"][0] is fixed["list"][1]
    assert fixed["list"][0] is fixed["again"]
    assert isinstance(fixed["again"][1], nn.GroupNorm)
    assert isinstance(fixed["list"][2], nn.GroupNorm)
    assert list(fixed.state_dict()) == [
        name for name in model.state_dict() if "running" not in name and "num" not in name
    ]
