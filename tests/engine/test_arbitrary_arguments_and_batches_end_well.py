"""Whatever is given to `make_private` and a step ends in an error of ours with nothing changed, or in a step that is right."""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from single_record import clipped_sum, gradients_of_each_record
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BudgetExhausted, GhostgradError, PrivacyEngine

HUGE = 10**400
MANY = 100 if os.environ.get("GHOSTGRAD_LONG_TESTS") == "1" else 6
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([HUGE, -HUGE, 1 << 70]), st.floats(), st.text(max_size=6),
    st.sampled_from([math.nan, math.inf, -0.0, 1e-320, 1e308, 1j, b"1", (), {}, set()]),
    st.lists(st.one_of(st.floats(), st.none(), st.text(max_size=2)), max_size=5),
    st.builds(lambda value: torch.tensor(value), st.floats(width=32)),
    st.just(torch.zeros(2)), st.builds(object), st.just(print), st.just(float),
    st.builds(lambda value: lambda step: value, st.one_of(st.none(), st.floats(), st.text(max_size=2), st.just(HUGE))),
)  # fmt: skip
NAMES = (
    "noise_multiplier", "max_grad_norm", "criterion", "batch_first", "loss_reduction", "poisson_sampling", "clipping",
    "grad_sample_mode", "sample_rate", "expected_batch_size", "accumulation_steps", "noise_generator", "module", "optimizer",
    "data_loader",
)  # fmt: skip
RIGHT = {
    "clipping": ["flat", "per_layer", "automatic"], "grad_sample_mode": ["auto", "hooks", "ghost", "bk", "functorch"],
    "loss_reduction": ["mean", "sum"], "poisson_sampling": [False], "max_grad_norm": [0.1, 3, [0.5, 0.2]],
    "sample_rate": [0.25, 1], "expected_batch_size": [7, 0.5], "accumulation_steps": [2], "noise_multiplier": [0, 2],
}  # fmt: skip


def parts() -> dict[str, Any]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    data = TensorDataset(torch.randn(12, 3).double(), torch.arange(12) % 2)
    return {
        "module": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.1),
        "data_loader": DataLoader(data, batch_size=4), "noise_multiplier": 1.0, "max_grad_norm": 0.5,
    }  # fmt: skip


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def state(given: dict[str, Any]) -> str:
    module, optimizer = given["module"], given["optimizer"]
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks), sorted(vars(part))) for part in module.modules()]
    return repr((module.state_dict(), hooks, optimizer.state_dict(), "step" in vars(optimizer)))


def assert_right_step(private: tuple[Any, ...], given: dict[str, Any]) -> None:
    """One step without its noise is the loop over single records."""
    module, optimizer, loader = private[0], private[1], private[-1]
    optimizer.noise.add_all_ = lambda *_, **__: None
    reduction, held = given.get("loss_reduction", "mean"), list[tuple[Tensor, Tensor]]()
    batches = iter(loader)
    before = copy.deepcopy(module)
    while not optimizer.steps:
        x, y = next(batches)
        if len(held) and loader.accumulation_steps == 1:
            raise AssertionError("no step was made")
        held.append((x, y))
        loss = losses(module, x, y)
        (loss.sum() if reduction == "sum" else loss.sum() / max(1, len(x))).backward()
        optimizer.step()
    x, y = (torch.cat(column) for column in zip(*held, strict=True))
    each = gradients_of_each_record(before, losses, [x, y])
    expected = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    if each:
        expected = clipped_sum(each, optimizer.max_grad_norm, clipping=given.get("clipping", "flat"))
    divisor = 1.0 if reduction == "sum" else float(optimizer.expected_batch_size)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, expected[name] / divisor, rtol=1e-8, atol=1e-12)


@given(data=st.data())
@settings(max_examples=10 * MANY, deadline=None, suppress_health_check=list(HealthCheck))
def test_arbitrary_arguments(data: st.DataObject) -> None:
    given = parts()
    good, before = dict(given), state(given)
    for name in data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)):
        right = RIGHT.get(name)
        given[name] = data.draw(st.one_of(st.sampled_from(right), JUNK) if right else JUNK, label=name)
    engine = PrivacyEngine(seed=0)
    try:
        private = engine.make_private(**given)
    except GhostgradError:
        assert state(good) == before
        assert engine.steps == 0
        assert_right_step(PrivacyEngine(seed=0).make_private(**good), good)
        return
    if given["data_loader"] is None:
        return
    weights = copy.deepcopy(good["module"].state_dict())
    try:
        assert_right_step(private, given)
    except GhostgradError:
        assert all(torch.equal(value, weights[name]) for name, value in good["module"].state_dict().items())
    engine.detach()
    assert "step" not in vars(good["optimizer"])


@pytest.mark.filterwarnings("ignore::ghostgrad.accounting.AccountingWarning")
@given(data=st.data())
@settings(max_examples=4 * MANY, deadline=None, suppress_health_check=list(HealthCheck))
def test_arbitrary_targets(data: st.DataObject) -> None:
    given = parts()
    del given["noise_multiplier"]
    before = state(given)
    target = {"target_epsilon": 3.0, "target_delta": 1e-3, "total_steps": 4}
    for name in data.draw(st.lists(st.sampled_from([*target, "epochs", "keep_budget"]), min_size=1, unique=True)):
        target[name] = data.draw(JUNK, label=name)
    engine = PrivacyEngine(seed=0)
    try:
        _, optimizer, _ = engine.make_private_with_epsilon(**given, **target)
    except GhostgradError:
        assert state(given) == before
        return
    for _ in range(2):
        try:
            optimizer.step()
        except BudgetExhausted:
            break
        optimizer.zero_grad()
    assert target.get("keep_budget") is False or engine.get_epsilon(target["target_delta"]) <= target["target_epsilon"]


BATCHES = st.one_of(
    st.builds(
        lambda shape, dtype, fill: torch.full(shape, 1).to(dtype) * (fill if dtype.is_floating_point else 1),
        st.lists(st.integers(0, 4), max_size=3).filter(lambda shape: len(shape) < 3 or shape[1] or not shape[0]),
        st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
        st.sampled_from([0.0, 1.0, -3.5, math.nan, math.inf, 1e30]),
    ),
    st.none(), st.just([]), st.just({}), st.floats(),
)  # fmt: skip


class Nested(nn.Module):
    """Takes rows wherever they are in what it is given; other types and shapes fail in it as they do in any model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, batch: Any) -> Tensor:
        while not isinstance(batch, Tensor):
            batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
        return self.linear(batch.double())


@given(data=st.data())
@settings(max_examples=10 * MANY, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("mode", ["bk", "ghost", "hooks"])
def test_arbitrary_batches(mode: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    module = Nested()
    engine = PrivacyEngine(seed=0)
    _, optimizer, _ = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=None, sample_rate=0.1,
        expected_batch_size=3.0, noise_multiplier=1.0, max_grad_norm=0.5, grad_sample_mode=mode,
    )  # fmt: skip
    optimizer.noise.add_all_ = lambda *_, **__: None
    inner = data.draw(BATCHES)
    batch = data.draw(
        st.sampled_from([inner, [inner], (inner, 1), {"x": inner}, [{"x": [inner]}], {"n": 2, "x": inner}])
    )
    before = copy.deepcopy(module)
    try:
        # What a model says of inputs that it cannot take is its own.
        copy.deepcopy(module.linear)(_rows(batch).double())
    except Exception:
        fits = False
    else:
        fits = True
    try:
        module(batch).pow(2).sum(dim=-1).sum().div(3).backward()
    except GhostgradError:
        trained = None
    except Exception:
        assert not fits
        trained = None
    else:
        trained = _rows(batch)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in module.state_dict().items())
    try:
        optimizer.step()
    except GhostgradError:
        assert trained is not None
        return
    assert engine.steps == 1
    for p, expected in zip(module.parameters(), _expected(before, trained), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-8, atol=1e-12)


def _rows(batch: Any) -> Tensor:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return batch


def _expected(module: nn.Module, rows: Tensor | None) -> list[Tensor]:
    total = [torch.zeros_like(p) for p in module.parameters()]
    for row in () if rows is None else rows:
        alone = copy.deepcopy(module)
        alone(row.unsqueeze(0)).pow(2).sum().backward()
        grads = [p.grad for p in alone.parameters()]
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        if math.isfinite(norm):
            total = [part + grad * min(1.0, 0.5 / max(norm, 1e-300)) for part, grad in zip(total, grads, strict=True)]
    return [part / 3.0 for part in total]


@pytest.mark.parametrize("mode", ["bk", "ghost", "hooks", "functorch"])
def test_records_of_no_positions_make_a_step_of_zeros(mode: str) -> None:
    module = Nested()
    _, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=None, sample_rate=0.1,
        expected_batch_size=3.0, noise_multiplier=0.0, max_grad_norm=0.5, grad_sample_mode=mode,
    )  # fmt: skip
    module(torch.zeros(3, 0, 3)).pow(2).sum(dim=-1).sum().div(3).backward()
    optimizer.step()
    assert not any(p.grad.any() for p in module.parameters())
