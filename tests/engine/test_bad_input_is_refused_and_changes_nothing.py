"""Every kind of bad input: an error of ours that says what was found, and all arguments as they were."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from ghostgrad import (
    BudgetExhausted,
    ConfigurationError,
    FlatClipping,
    GhostgradError,
    PrivacyEngine,
    PrivacyError,
    UnsupportedModuleError,
)


def arguments() -> dict[str, Any]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    data = TensorDataset(torch.randn(20, 4), torch.randint(2, (20,)))
    return {
        "module": module,
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.1),
        "data_loader": DataLoader(data, batch_size=5),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
    }


def assert_refused(arguments: dict[str, Any], match: str, kind: type[Exception] = ConfigurationError) -> None:
    """It raises, and the module, its hooks, the optimizer and the loader are untouched."""
    module, optimizer = arguments["module"], arguments["optimizer"]
    before = copy.deepcopy(module.state_dict()) if isinstance(module, nn.Module) else None
    engine = PrivacyEngine(seed=0)
    with pytest.raises(kind, match=match) as caught:
        engine.make_private(**arguments)
    assert isinstance(caught.value, GhostgradError)
    assert engine.steps == 0
    assert engine.grad_sample_mode == "none"
    if before is not None:
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    if isinstance(optimizer, torch.optim.Optimizer):
        assert "step" not in vars(optimizer)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "1.0", None, True])
def test_noise_multiplier(value: Any) -> None:
    assert_refused(arguments() | {"noise_multiplier": value}, "noise_multiplier")


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1", None, [1.0, 2.0]])
def test_max_grad_norm(value: Any) -> None:
    assert_refused(arguments() | {"max_grad_norm": value}, "max_grad_norm")


def test_per_layer_bounds_need_one_for_each_parameter() -> None:
    assert_refused(arguments() | {"max_grad_norm": [1.0, 2.0], "clipping": "per_layer"}, "2 bounds for 4")


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [("clipping", "flatt", "flat"), ("grad_sample_mode", "gost", "ghost"), ("loss_reduction", "men", "mean")],
)
def test_unknown_names_come_with_the_nearest_valid_one(name: str, value: str, nearest: str) -> None:
    assert_refused(arguments() | {name: value}, f"did you mean '{nearest}'")


def test_unknown_accountant() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'rdp'"):
        PrivacyEngine(accountant="rpd")


def test_unknown_argument_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="max_gradnorm"):
        PrivacyEngine().make_private(**arguments(), max_gradnorm=1.0)


def test_module_without_trainable_parameters() -> None:
    given = arguments()
    given["module"].requires_grad_(False)
    assert_refused(given, "no trainable parameters")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_a_scripted_module() -> None:
    module = torch.jit.script(nn.Linear(4, 2))
    changed = {"module": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.1)}
    assert_refused(arguments() | changed, "torch[.]jit", UnsupportedModuleError)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters(kind: str) -> None:
    given = arguments()
    getattr(given["module"][0].weight, kind)(lambda value: None)
    assert_refused(given, "0.weight has a hook of its own")


def test_something_that_is_not_a_module() -> None:
    assert_refused(arguments() | {"module": lambda x: x}, "must be a torch.nn.Module")


def test_optimizer_of_another_module() -> None:
    other = nn.Linear(3, 3)
    assert_refused(arguments() | {"optimizer": torch.optim.SGD(other.parameters(), lr=0.1)}, "are not the module's")


def test_trainable_parameters_that_no_optimizer_has() -> None:
    given = arguments()
    given["optimizer"] = torch.optim.SGD(given["module"][0].parameters(), lr=0.1)
    assert_refused(given, r"2\.weight")


def test_optimizers_that_evaluate_several_times() -> None:
    given = arguments()
    assert_refused(given | {"optimizer": torch.optim.LBFGS(given["module"].parameters())}, "several times")


def test_private_twice() -> None:
    given = arguments()
    PrivacyEngine(seed=0).make_private(**given)
    with pytest.raises(ConfigurationError, match="private already"):
        PrivacyEngine(seed=0).make_private(**given)
    part = {**arguments(), "module": given["module"][0]}
    part["optimizer"] = torch.optim.SGD(part["module"].parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="private already"):
        PrivacyEngine(seed=0).make_private(**part)


def test_private_optimizer_and_private_loader_do_not_go_in_again() -> None:
    given = arguments()
    engine = PrivacyEngine(seed=0)
    _, optimizer, loader = engine.make_private(**given)
    engine.detach()
    with pytest.raises(ConfigurationError, match="already private"):
        engine.make_private(**{**given, "data_loader": loader})
    with pytest.raises(ConfigurationError):
        engine.make_private(**{**given, "optimizer": optimizer})
    engine.make_private(**given)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(10))


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        (lambda data: DataLoader(data, batch_size=None), "batch_size"),
        (lambda data: DataLoader(data, batch_size=21), "21"),
        (lambda data: DataLoader(data, batch_size=5, sampler=WeightedRandomSampler([1.0] * 20, 20)), "Weighted"),
        (lambda data: DataLoader(Stream(), batch_size=5), "Iterable"),
        (lambda data: [1, 2, 3], "must be a torch DataLoader"),
    ],
)
@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_loaders_that_cannot_be_sampled_privately(loader: Any, match: str, poisson_sampling: bool) -> None:
    given = arguments()
    given |= {"data_loader": loader(given["data_loader"].dataset), "poisson_sampling": poisson_sampling}
    assert_refused(given, match)


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_accumulation_steps(value: Any) -> None:
    assert_refused(arguments() | {"accumulation_steps": value}, "accumulation_steps")


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_expected_batch_size(value: float) -> None:
    assert_refused(arguments() | {"expected_batch_size": value}, "expected_batch_size")


@pytest.mark.parametrize("value", [0.0, 1.5, -0.1, math.nan])
def test_sample_rate(value: float) -> None:
    assert_refused(arguments() | {"sample_rate": value}, "sample_rate")


def test_no_loader_means_poisson_sampling() -> None:
    given = arguments() | {"data_loader": None, "sample_rate": 0.1, "expected_batch_size": 2.0}
    assert_refused(given | {"poisson_sampling": False}, "which records share a pass is not known")


def test_the_accountant_of_an_engine_cannot_be_replaced() -> None:
    engine = PrivacyEngine()
    with pytest.raises(AttributeError):
        engine.accountant = None


def test_the_bound_stays_while_records_are_held_without_a_loader() -> None:
    given = arguments() | {"data_loader": None, "sample_rate": 0.1, "expected_batch_size": 2.0}
    module, optimizer, _ = PrivacyEngine(seed=0).make_private(**given)
    nn.functional.cross_entropy(module(torch.randn(3, 4)), torch.tensor([0, 1, 0])).backward()
    with pytest.raises(PrivacyError, match="while a logical batch"):
        optimizer.max_grad_norm = 0.1


def test_no_loader_needs_rate_and_size() -> None:
    assert_refused(arguments() | {"data_loader": None}, "sample_rate and expected_batch_size")


def test_losses_that_are_not_scalar() -> None:
    module, _, loader = PrivacyEngine(seed=0).make_private(**arguments())
    before = copy.deepcopy(module.state_dict())
    x, y = next(iter(loader))
    with pytest.raises(PrivacyError, match="not a scalar"):
        nn.functional.cross_entropy(module(x), y, reduction="none").backward(torch.ones(len(x)))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_seed_is_not_secret() -> None:
    with pytest.raises(ConfigurationError, match="secret"):
        PrivacyEngine(secure_mode=True, seed=1)
    with pytest.raises(ConfigurationError, match="cryptographic"):
        PrivacyEngine(secure_mode=True).make_private(**arguments(), noise_generator=torch.Generator())


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta(delta: float) -> None:
    with pytest.raises(ConfigurationError, match="delta"):
        PrivacyEngine().get_epsilon(delta)


@pytest.mark.parametrize(
    "target",
    [
        {"target_epsilon": 0.0, "target_delta": 1e-5, "epochs": 1},
        {"target_epsilon": 1.0, "target_delta": 0.0, "epochs": 1},
        {"target_epsilon": 1.0, "target_delta": 1e-5},
        {"target_epsilon": 1.0, "target_delta": 1e-5, "epochs": 1, "total_steps": 3},
        {"target_epsilon": 1.0, "target_delta": 1e-5, "epochs": 0},
    ],
)
def test_targets(target: dict[str, Any]) -> None:
    given = arguments()
    del given["noise_multiplier"]
    with pytest.raises(ConfigurationError):
        PrivacyEngine().make_private_with_epsilon(**given, **target)
    PrivacyEngine().make_private(**given, noise_multiplier=1.0)


def test_a_spent_budget_raises_before_it_touches_the_parameters() -> None:
    given = arguments()
    del given["noise_multiplier"]
    engine = PrivacyEngine(seed=0)
    module, optimizer, loader = engine.make_private_with_epsilon(
        **given, target_epsilon=2.0, target_delta=1e-3, total_steps=6
    )

    def step() -> None:
        optimizer.zero_grad()
        x, y = next(iter(loader))
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()

    for _ in range(6):
        step()
    spent = engine.get_epsilon(1e-3)
    assert 2.0 * (1 - 1e-3) < spent <= 2.0
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(BudgetExhausted, match=r"target_epsilon=2\.0"):
        step()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert engine.steps == 6
    assert engine.get_epsilon(1e-3) == spent


def test_the_budget_counts_what_other_models_of_the_engine_spend() -> None:
    given = arguments()
    del given["noise_multiplier"]
    engine = PrivacyEngine(seed=0)
    _, optimizer, _ = engine.make_private_with_epsilon(**given, target_epsilon=2.0, target_delta=1e-3, total_steps=40)
    optimizer.step()
    optimizer.zero_grad()
    _, other, _ = engine.make_private(**arguments() | {"noise_multiplier": optimizer.noise_multiplier})
    for _ in range(30):
        other.step()
        other.zero_grad()
    for _ in range(9):
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(BudgetExhausted):
        optimizer.step()
    assert engine.get_epsilon(1e-3) <= 2.0
    assert engine.steps == 40


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample_rate": "a"}, {"expected_batch_size": "a"}, {"expected_batch_size": True}, {"poisson_sampling": "no"},
        {"batch_first": None}, {"criterion": nn.CrossEntropyLoss(reduction="none")}, {"clipping": FlatClipping(10.0)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_values_of_the_wrong_kind(wrong: dict[str, Any]) -> None:
    assert_refused(arguments() | wrong, next(iter(wrong)).replace("clipping", "max_grad_norm"))


@pytest.mark.parametrize("seed", ["a", 1.5, True])
def test_seeds_that_are_not_integers(seed: Any) -> None:
    with pytest.raises(ConfigurationError, match="seed"):
        PrivacyEngine(seed=seed)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_optimizers_and_parameters_that_noise_does_not_fit() -> None:
    given = arguments()
    assert_refused(given | {"optimizer": torch.optim.SparseAdam(given["module"].parameters())}, "SparseAdam")
    lazy = nn.LazyLinear(3)
    with pytest.raises(ConfigurationError, match="no shape yet"):
        PrivacyEngine().make_private(
            **given | {"module": lazy, "optimizer": torch.optim.SGD(lazy.parameters(), lr=0.1)}
        )


def test_the_budget_can_be_turned_off() -> None:
    given = arguments()
    del given["noise_multiplier"]
    engine = PrivacyEngine(seed=0)
    _, optimizer, _ = engine.make_private_with_epsilon(
        **given, target_epsilon=2.0, target_delta=1e-3, total_steps=2, keep_budget=False
    )
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
    assert engine.get_epsilon(1e-3) > 2.0


def test_a_parameter_that_is_in_the_optimizer_twice() -> None:
    """Torch only warns; the second place would be trained on noise alone, and the norm would count it twice."""
    given = arguments()
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([*tied[0].parameters(), *tied[2].parameters()], lr=0.1)
    assert_refused(given | {"module": tied, "optimizer": optimizer}, r"0\.weight is in the optimizer more than once")
