"""Layers that normalise by other records' statistics are found, in whatever mode and place, and others are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.validation import (
    IllegalModuleConfigurationError,
    ModuleValidator,
    ShouldReplaceModuleError,
    mixes_records,
)

BATCH_NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]


def beside_something_trainable(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), layer)


@pytest.mark.parametrize("kind", BATCH_NORMS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_batch_norm_in_train_mode_is_refused_whether_or_not_it_trains(kind, affine, trainable):
    model = beside_something_trainable(kind(8, affine=affine).requires_grad_(trainable))
    (fault,) = ModuleValidator.validate(model)
    assert isinstance(fault, ShouldReplaceModuleError)
    assert fault.path == "1"
    assert not ModuleValidator.is_valid(model)


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_batch_norm_in_eval_mode_is_allowed(kind):
    assert ModuleValidator.is_valid(beside_something_trainable(kind(8).eval()))


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_batch_norm_without_running_statistics_is_refused_in_eval_mode_too(kind):
    (fault,) = ModuleValidator.validate(beside_something_trainable(kind(8, track_running_stats=False).eval()))
    assert "without running statistics" in str(fault)
    assert ".eval()" not in fault.remedy, "freezing cannot help here"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_the_verdict_is_what_the_layer_does(kind, tracked, training):
    layer = kind(3, track_running_stats=tracked).double().train(training)
    x = torch.randn(4, 3, *([5] * (2 if kind is nn.BatchNorm2d else 1)), dtype=torch.float64)
    together = layer(x)[:1]
    alone = layer(torch.cat([x[:1], 10 * x[1:] ** 2]))[:1]
    assert mixes_records(layer) == (not torch.allclose(together, alone))


def test_instance_norm_with_running_statistics_is_refused_and_without_is_allowed():
    (fault,) = ModuleValidator.validate(beside_something_trainable(nn.InstanceNorm2d(8, track_running_stats=True)))
    assert fault.path == "1"
    assert "track_running_stats=True" in str(fault)
    assert ModuleValidator.is_valid(beside_something_trainable(nn.InstanceNorm2d(8, affine=True)))


def test_an_embedding_that_renormalises_its_table_is_refused():
    (fault,) = ModuleValidator.validate(nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)))
    assert isinstance(fault, IllegalModuleConfigurationError)
    assert "max_norm" in str(fault)


def test_attention_that_bypasses_its_own_sub_module_passes():
    assert ModuleValidator.is_valid(nn.TransformerEncoderLayer(8, 2, 16))


def test_a_module_without_trainable_parameters_is_refused():
    for module in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        (fault,) = ModuleValidator.validate(module)
        assert "no trainable parameter" in str(fault)


def test_a_module_whose_shapes_are_not_known_yet_is_refused():
    faults = ModuleValidator.validate(nn.Sequential(nn.LazyLinear(3)))
    assert [fault.path for fault in faults] == ["0"]
    assert "forward pass" in str(faults[0])


def test_every_fault_names_its_path_what_was_found_and_the_way_out():
    model = nn.ModuleDict({"stem": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "norm": nn.BatchNorm1d(4)})
    texts = [str(fault) for fault in ModuleValidator.validate(model)]
    assert len(texts) == 2
    for text, path, layer in zip(texts, ["stem.1", "norm"], ["BatchNorm2d(8)", "BatchNorm1d(4)"], strict=True):
        assert repr(path) in text
        assert layer in text
        assert "ModuleValidator.fix" in text
        assert f".get_submodule({path!r}).eval()" in text


def test_strict_raises_one_error_with_every_fault():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(UnsupportedModuleError, match=r"(?s)2 fault.*'0'.*'2'"):
        ModuleValidator.validate(model, strict=True)


def test_strict_is_silent_for_a_valid_module():
    assert ModuleValidator.validate(nn.Linear(2, 2), strict=True) == []


def test_a_layer_in_two_places_is_reported_once():
    norm = nn.BatchNorm1d(4)
    assert len(ModuleValidator.validate(nn.Sequential(norm, nn.Linear(4, 4), norm))) == 1


def test_validation_leaves_the_module_alone():
    model = beside_something_trainable(nn.BatchNorm1d(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ModuleValidator.validate(model)
    ModuleValidator.changes(model)
    assert isinstance(model[1], nn.BatchNorm1d)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
