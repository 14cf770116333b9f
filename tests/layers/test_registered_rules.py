"""Rules and grad samplers of users: exact in every mode, and held to what they owe, by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from single_record import assert_same_gradients, bound_that_clips_some, expected_gradient, gradients_of_each_record
from small_models import MODES, drawn, private
from torch import Tensor, nn

import ghostgrad
from ghostgrad import ConfigurationError, register_rule
from ghostgrad.grad_sample import register_grad_sampler, unregister_rule
from ghostgrad.gradients import Explicit, Lookup, Matmul, Use
from ghostgrad.layers import Call, find_rule, registered_rule


class Mixer(nn.Module):
    """``y = gain * (x W^T) + table[ids]``: three parameters and two inputs, one of them by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.gain = nn.Parameter(torch.empty(4, 3)), nn.Parameter(torch.empty(4))
        self.table = nn.Parameter(torch.empty(6, 4))

    def forward(self, x: Tensor, *, ids: Tensor) -> Tensor:
        return self.gain * (x @ self.matrix.T) + self.table[ids]


def mixer(call: Call) -> dict[str, Use]:
    module = call.module
    x, dy, ids = (
        call.rows.split(t).flatten(1, -2) for t in (call.input, call.grad_output, call.kwargs["ids"][..., None])
    )
    uses: dict[str, Use] = {}
    if "matrix" in call.parameters:
        uses["matrix"] = Matmul(x.unsqueeze(1), (dy * module.gain).unsqueeze(1), module.matrix.shape)
    if "gain" in call.parameters:
        uses["gain"] = Explicit((dy * (x @ module.matrix.T)).sum(1))
    if "table" in call.parameters:
        uses["table"] = Lookup(ids.squeeze(-1), dy, module.table.shape)
    return uses


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixer, self.head = nn.Linear(3, 3), Mixer(), nn.Linear(4, 1)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mixer(self.stem(x), ids=ids))).squeeze(-1)


def losses(model: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return model(x, ids).square().mean(1)


def batch() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 3, dtype=torch.float64, generator=generator)
    return [x, torch.randint(6, (5, 7), generator=generator)]


def one_step(model: nn.Module, mode: str, bound: float, loss_reduction: str = "mean") -> dict[str, Tensor]:
    model, optimizer = private(model, mode, bound, loss_reduction=loss_reduction)
    getattr(losses(model, *batch()), loss_reduction)().backward()
    optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def truth(loss_reduction: str = "mean", frozen: str | None = None) -> tuple[dict[str, Tensor], float]:
    model = drawn(Model)
    if frozen:
        model.get_parameter(frozen).requires_grad_(False)
    each = gradients_of_each_record(model, losses, batch())
    bound = bound_that_clips_some(each)
    return expected_gradient(each, bound, expected_batch_size=5, loss_reduction=loss_reduction), bound


@pytest.fixture
def rule() -> Iterator[None]:
    with registered_rule(Mixer, mixer):
        yield


@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("rule")
def test_a_registered_rule_gives_the_textbook_step(mode, loss_reduction):
    expected, bound = truth(loss_reduction)
    found = one_step(drawn(Model), mode, bound, loss_reduction)
    assert_same_gradients(found, expected, relative=1e-9)


@pytest.mark.parametrize("frozen", ["mixer.matrix", "mixer.gain", "mixer.table"])
@pytest.mark.usefixtures("rule")
def test_it_is_asked_for_what_trains(frozen):
    expected, bound = truth(frozen=frozen)
    model = drawn(Model)
    model.get_parameter(frozen).requires_grad_(False)
    assert_same_gradients(one_step(model, "bk", bound), expected, relative=1e-9)


@pytest.mark.usefixtures("rule")
def test_explain_names_it_and_it_is_what_answers():
    engine = ghostgrad.PrivacyEngine(seed=0)
    model = drawn(Model)
    model, _, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=5, noise_multiplier=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    losses(model, *batch()).mean().backward()
    (plan,) = [plan for plan in engine.explain().modules if plan.path == "mixer"]
    assert plan.rule == "mixer"
    assert "table: grouped ids" in plan.route


def test_it_can_be_a_decorator_with_a_name_and_be_taken_away():
    @register_rule(Mixer, name="mine")
    def decorated(call: Call) -> dict[str, Use]:
        return mixer(call)

    try:
        assert find_rule(Mixer()).name == "mine"
        with pytest.raises(ConfigurationError, match=r"Mixer has a rule already.*replace=True"):
            register_rule(Mixer, mixer)
        register_rule(Mixer, mixer, replace=True)
        assert find_rule(Mixer()).name == "mixer"
    finally:
        unregister_rule(Mixer)
    assert find_rule(Mixer()) is None
    with pytest.raises(ConfigurationError, match="no registered rule"):
        unregister_rule(Mixer)


def test_a_built_in_rule_is_replaced_only_on_demand_and_comes_back():
    before = find_rule(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="Linear has a rule already"):
        register_rule(nn.Linear, mixer)
    with registered_rule(nn.Linear, mixer, replace=True):
        assert find_rule(nn.Linear(2, 2)).name == "mixer"
    assert find_rule(nn.Linear(2, 2)) is before


class Plus(Mixer):
    """Adds nothing to forward."""


class Overridden(Mixer):
    def forward(self, x: Tensor, *, ids: Tensor) -> Tensor:
        return 2 * super().forward(x, ids=ids)


@pytest.mark.usefixtures("rule")
def test_a_subclass_inherits_it_unless_it_computes_something_else():
    assert find_rule(Plus()).name == "mixer"
    assert find_rule(Overridden()) is None


@pytest.mark.parametrize(
    ("module_class", "function", "match"),
    [
        (Mixer(), mixer, "not for Mixer"),
        (int, mixer, "not for <class 'int'>"),
        (Mixer, "mixer", r"Mixer is 'mixer', which is not callable"),
    ],
)
def test_what_cannot_be_a_rule_is_refused_at_once(module_class, function, match):
    with pytest.raises(ConfigurationError, match=match):
        register_rule(module_class, function)
    with pytest.raises(ConfigurationError, match=match):
        register_grad_sampler(module_class)(function)
    assert find_rule(Mixer()) is None


def without_gain(call: Call) -> dict[str, Use]:
    return {name: use for name, use in mixer(call).items() if name != "gain"}


def one_too_many(call: Call) -> dict[str, Use]:
    return {**mixer(call), "bias": Explicit(torch.zeros(5, 4))}


def summed_over_records(call: Call) -> dict[str, Use]:
    return {**mixer(call), "gain": Explicit(mixer(call)["gain"].grad_samples().sum(0, keepdim=True))}


def transposed(call: Call) -> dict[str, Use]:
    return {**mixer(call), "matrix": Explicit(mixer(call)["matrix"].grad_samples().mT)}


def plain_tensors(call: Call) -> dict[str, Use]:
    return {name: use.grad_samples() for name, use in mixer(call).items()}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (without_gain, r"mixer: the rule registered for Mixer answered for \['matrix', 'table'\]"),
        (one_too_many, r"'bias'"),
        (summed_over_records, r"shape \[1, 4\] for 'gain'; with 5 records they have shape \[5, 4\]"),
        (transposed, r"shape \[5, 3, 4\] for 'matrix'"),
        (plain_tensors, r"returned a Tensor for 'matrix'; wrap"),
        (lambda call: None, r"returned a NoneType"),
    ],
)
@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
def test_an_answer_that_does_not_fit_is_refused_by_name(mode, wrong, match):
    with registered_rule(Mixer, wrong), pytest.raises(ConfigurationError, match=match):
        one_step(drawn(Model), mode, 1.0)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.05, 2.0])
@pytest.mark.parametrize("wrong", ["matrix", "gain", "table"])
@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
def test_an_answer_with_wrong_numbers_is_refused_on_the_first_batch(mode, wrong, factor):
    def rule(call: Call) -> dict[str, Use]:
        uses = mixer(call)
        return {**uses, wrong: Explicit(factor * uses[wrong].grad_samples())}

    model = drawn(Model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with registered_rule(Mixer, rule), pytest.raises(ConfigurationError, match=rf"mixer\.{wrong}: .*rule of Mixer"):
        one_step(model, mode, 1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------------- samplers as Opacus has them


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Thrice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Twice(3, 4), Thrice(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


seen: list[tuple[list[Tensor], Tensor]] = []


def compute_grad_sample(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    seen.append((activations, backprops))
    backprops = (2 if isinstance(layer, Twice) else 3) * backprops
    found = {layer.bias: torch.einsum("n...k->nk", backprops)}
    if layer.weight.requires_grad:
        found[layer.weight] = torch.einsum("n...i,n...j->nij", backprops, activations[0])
    return found


@pytest.fixture
def samplers() -> Iterator[None]:
    assert register_grad_sampler([Twice, Thrice])(compute_grad_sample) is compute_grad_sample
    seen.clear()
    yield
    unregister_rule(Twice)
    unregister_rule(Thrice)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("samplers")
def test_a_sampler_written_for_opacus_gives_the_textbook_step(mode, loss_reduction, batch_first):
    dim = 0 if batch_first else 1

    def records(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean((1 - dim, 2))

    x = torch.randn(5, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).movedim(0, dim)
    each = gradients_of_each_record(drawn(Stack), records, [x], [dim])
    bound = bound_that_clips_some(each)
    expected = expected_gradient(each, bound, expected_batch_size=5, loss_reduction=loss_reduction)
    model, optimizer = private(drawn(Stack), mode, bound, loss_reduction=loss_reduction, batch_first=batch_first)
    getattr(records(model, x), loss_reduction)().backward()
    optimizer.step()
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, expected, relative=1e-9)
    assert bool(seen) == (mode != "functorch")


@pytest.mark.usefixtures("samplers")
def test_it_is_given_what_opacus_gives_it():
    """Activations with the batch first, and backprops multiplied by the records for a mean loss."""
    x = torch.randn(5, 3, dtype=torch.float64)
    model, _ = private(drawn(Stack), "bk", 1.0)
    model(x).sum(1).mean().backward()
    activations, backprops = seen[-1]
    assert torch.equal(activations[0], x)
    assert backprops.shape == (5, 4)
    activations, backprops = next(pair for pair in reversed(seen) if pair[1].shape == (5, 2))
    torch.testing.assert_close(backprops, torch.ones(5, 2, dtype=torch.float64))


@pytest.mark.usefixtures("samplers")
def test_a_frozen_weight_may_be_left_out_or_answered():
    model = drawn(Stack)
    model.first.weight.requires_grad_(False)
    model.second.bias.requires_grad_(False)
    model, optimizer = private(model, "bk", 1.0)
    model(torch.randn(5, 3, dtype=torch.float64)).sum(1).mean().backward()
    optimizer.step()
    assert model.second.bias.grad is None
    assert model.second.weight.grad is not None


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda layer, a, b: None, "grad sampler registered for Twice returned a NoneType"),
        (lambda layer, a, b: {layer.weight: torch.zeros(5, 4, 3)}, r"answered for \['weight'\]"),
        (
            lambda layer, a, b: {layer.weight: torch.zeros(4, 3), layer.bias: torch.zeros(5, 4)},
            r"\[4, 3\] for 'weight'",
        ),
        (lambda layer, a, b: {"weight": 1}, "not its parameter"),
    ],
)
def test_a_sampler_that_does_not_answer_is_refused_by_name(wrong, match):
    register_grad_sampler(Twice)(wrong)
    try:
        model, _ = private(nn.Sequential(Twice(3, 4)), "bk", 1.0)
        with pytest.raises(ConfigurationError, match=match):
            model(torch.randn(5, 3)).sum(1).mean().backward()
    finally:
        unregister_rule(Twice)


class Folds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Twice(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.usefixtures("samplers")
def test_folded_rows_are_not_taken_for_records():
    def records(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean((1, 2))

    x = torch.randn(5, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each = gradients_of_each_record(drawn(Folds), records, [x])
    bound = bound_that_clips_some(each)
    model, optimizer = private(drawn(Folds), "bk", bound)
    records(model, x).mean().backward()
    optimizer.step()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=5), relative=1e-9)
