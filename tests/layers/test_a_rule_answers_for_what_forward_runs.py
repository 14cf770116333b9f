"""Which rule a module gets, how it reads its rows, and that recomputation leaves no trace."""

from __future__ import annotations

import types

import pytest
import torch
from all_cases import BY_NAME
from generic_cases import NamedLinear, OwnLinear
from private_step import MODES, step_by_hand
from torch import Tensor, nn

from ghostgrad import PrivacyEngine, UnsupportedModuleError
from ghostgrad.layers import Call, Rows, find_rule

N = 5


def call(module: nn.Module, *args: Tensor, grad: Tensor, batch_first: bool) -> Call:
    parameters = dict(module.named_parameters(recurse=False))
    return Call(module, "layer", parameters, args, {}, (grad,), None, Rows(N, batch_first, "layer"))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, nn.ConvTranspose1d, nn.Embedding, nn.LayerNorm, nn.GroupNorm])
def test_layers_of_torch_have_a_rule_of_their_own(kind):
    arguments = {nn.Linear: (2, 2), nn.Conv2d: (2, 2, 1), nn.ConvTranspose1d: (2, 2, 1), nn.Embedding: (2, 2),
                 nn.LayerNorm: (2,), nn.GroupNorm: (1, 2)}  # fmt: skip
    assert find_rule(kind(*arguments[kind])) is not None


def test_a_subclass_with_the_forward_of_its_base_keeps_the_rule():
    rule = find_rule(NamedLinear(2, 2))
    assert rule is not None
    assert rule.name == "linear"


def test_another_forward_or_another_parameter_takes_the_rule_away():
    assert find_rule(OwnLinear(2, 2)) is None
    patched = nn.Linear(2, 2)
    patched.forward = types.MethodType(lambda layer, x: x @ layer.weight, patched)
    assert find_rule(patched) is None
    extended = nn.Linear(2, 2)
    extended.scale = nn.Parameter(torch.ones(()))
    assert find_rule(extended) is None


def features_as_many_as_records() -> dict[str, Call]:
    """Time-first models with a layer that sees [n, f], f being n."""
    square, ids = torch.randn(N, N, dtype=torch.float64), torch.arange(N)
    grad = torch.randn(N, N, dtype=torch.float64)
    images = torch.randn(N, N, 3, 3, dtype=torch.float64)
    return {
        "linear": call(nn.Linear(N, N).double(), square, grad=grad, batch_first=False),
        "layer norm": call(nn.LayerNorm(N).double(), square, grad=grad, batch_first=False),
        "embedding": call(nn.Embedding(N, N).double(), ids, grad=grad, batch_first=False),
        "group norm": call(nn.GroupNorm(1, N).double(), images, grad=torch.randn_like(images), batch_first=False),
        "convolution": call(nn.Conv2d(N, N, 1).double(), images, grad=torch.randn_like(images), batch_first=False),
    }


@pytest.mark.parametrize("name", features_as_many_as_records())
def test_features_are_not_taken_for_records_in_a_time_first_model(name):
    seen = features_as_many_as_records()[name]
    rule = find_rule(seen.module)
    assert rule is not None
    assert rule.rows(seen.module, seen.rows).dim(seen.grad_output) == 0
    uses = rule.uses(seen)
    for i in range(N):
        module, grad = seen.module, seen.grad_output[i : i + 1]
        alone = torch.autograd.grad(module(seen.input[i : i + 1]), list(seen.parameters.values()), grad)
        for parameter, expected in zip(seen.parameters, alone, strict=True):
            torch.testing.assert_close(uses[parameter].grad_samples()[i], expected)


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_does_not_show_in_buffers(mode):
    case = BY_NAME["counting-buffer"]
    model = case.model()
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=7.0, noise_multiplier=0.0, max_grad_norm=1.0, grad_sample_mode=mode,
    )  # fmt: skip
    for steps in (1, 2):
        case.losses(model, *case.batch()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert model[0].calls == steps


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_does_not_move_the_random_state(mode):
    case = BY_NAME["class-token"]
    case.batch()
    before = torch.get_rng_state()
    torch.manual_seed(1)
    after_batch = (case.batch(), torch.get_rng_state())[1]
    torch.set_rng_state(before)
    step_by_hand(case, mode, max_grad_norm=1.0)
    assert torch.equal(torch.get_rng_state(), after_batch)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(2, 2, 1), (2, 4, 4)), (nn.InstanceNorm1d(2, affine=True), (2, 4))]
)
def test_an_input_without_a_batch_dimension_is_refused(layer, shape):
    seen = call(layer, torch.randn(*shape), grad=torch.randn(*shape), batch_first=True)
    rule = find_rule(layer)
    assert rule is not None
    with pytest.raises(UnsupportedModuleError, match=r"^layer: met a tensor of shape \[2, 4"):
        rule.uses(seen)


def test_bags_that_are_not_a_whole_number_for_each_record_are_refused():
    ids = torch.randint(5, (N + 1, 2))
    seen = call(nn.EmbeddingBag(5, 3), ids, grad=torch.randn(N + 1, 3), batch_first=True)
    rule = find_rule(seen.module)
    assert rule is not None
    with pytest.raises(UnsupportedModuleError, match=r"^layer: 6 bags in a batch of 5 records"):
        rule.uses(seen)
