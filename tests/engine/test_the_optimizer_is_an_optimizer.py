"""`DPOptimizer` as people use optimizers: groups, state, hooks, schedulers, closures, checkpoints, detach."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import DPOptimizer, PrivacyEngine, PrivacyError
from ghostgrad.schedulers import LambdaGradClip


def data(n: int = 16) -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(n, 4), torch.randint(3, (n,)))


def make(optimizer_type: Any = torch.optim.SGD, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    original = optimizer_type(module.parameters(), lr=0.1)
    engine = PrivacyEngine(seed=0)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=original, data_loader=DataLoader(data(), batch_size=4), **options
    )
    return engine, module, optimizer, loader, original


def train(module: nn.Module, optimizer: Any, loader: Any) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_of_one_gradient_a_step(optimizer_type: Any) -> None:
    engine, module, optimizer, loader, original = make(optimizer_type)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is original.param_groups
    assert optimizer.state is original.state
    before = copy.deepcopy(module.state_dict())
    train(module, optimizer, loader)
    assert engine.steps == 4
    assert all(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_state_dicts_are_those_of_the_original() -> None:
    _, module, optimizer, loader, original = make(torch.optim.Adam)
    train(module, optimizer, loader)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"].keys() == original.state_dict()["state"].keys()
    assert len(saved["state"]) == 4
    plain = torch.optim.Adam(module.parameters(), lr=0.5)
    plain.load_state_dict(saved)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups is original.param_groups
    assert optimizer.param_groups[0]["lr"] == 0.1
    train(module, optimizer, loader)


def test_hooks_run_around_logical_steps() -> None:
    _, module, optimizer, loader, _ = make()
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: called.append("pre"))
    optimizer.register_step_post_hook(lambda *args: called.append("post"))
    train(module, optimizer, loader)
    assert called == ["pre", "post"] * 4


@pytest.mark.parametrize("on_original", [False, True])
def test_learning_rate_schedulers(on_original: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    original = torch.optim.SGD(module.parameters(), lr=1.0)
    before = torch.optim.lr_scheduler.StepLR(original, 1, gamma=0.5) if on_original else None
    module, optimizer, loader = PrivacyEngine(seed=0).make_private(
        module=module, optimizer=original, data_loader=DataLoader(data(), batch_size=4), noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    scheduler = before or torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(module, optimizer, loader)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    train(module, optimizer, loader)


def test_a_closure_is_evaluated_once() -> None:
    engine, module, optimizer, loader, _ = make()
    x, y = next(iter(loader))
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == engine.steps == 1


def test_stepping_without_clearing_is_refused() -> None:
    _, module, optimizer, loader, _ = make()
    batches = iter(loader)
    x, y = next(batches)
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    with pytest.raises(PrivacyError, match="zero_grad"):
        optimizer.step()
    x, y = next(batches)
    with pytest.raises(PrivacyError, match="zero_grad"):
        F.cross_entropy(module(x), y).backward()


@pytest.mark.parametrize("clear", ["optimizer", "module", "module_to_zero"])
def test_every_way_to_clear_gradients(clear: str) -> None:
    engine, module, optimizer, loader, _ = make()
    for x, y in loader:
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        if clear == "optimizer":
            optimizer.zero_grad(set_to_none=False)
        else:
            module.zero_grad(set_to_none=clear == "module")
    assert engine.steps == 4


def test_zero_grad_after_a_backward_drops_its_records() -> None:
    engine, module, optimizer, loader, _ = make(noise_multiplier=0.0)
    x, y = next(batch for batch in loader if len(batch[0]))
    F.cross_entropy(module(x), y).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(p.grad.count_nonzero() == 0 for p in module.parameters())
    assert engine.steps == 1


def test_detach_gives_everything_back() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    original = torch.optim.SGD(module.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    untouched = (vars(module).keys(), torch.autograd.backward)
    engine = PrivacyEngine(seed=0)
    engine.make_private(
        module=module, optimizer=original, data_loader=DataLoader(data(), batch_size=4), noise_multiplier=1.0,
        max_grad_norm=1.0, grad_sample_mode="hooks", criterion=criterion,
    )  # fmt: skip
    assert torch.autograd.backward is not untouched[1] or torch.autograd.backward.__wrapped__
    engine.detach()
    assert vars(module).keys() == untouched[0]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in [*module.modules(), criterion])
    assert "step" not in vars(original)
    x, y = data().tensors
    F.cross_entropy(module(x), y).backward()
    assert all(p.grad is not None for p in module.parameters())
    original.step()


def test_nothing_is_written_on_the_users_objects() -> None:
    _, module, optimizer, loader, _ = make(grad_sample_mode="bk")
    keys = list(module.state_dict())
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    for p in module.parameters():
        assert vars(p) == {}
        assert p.requires_grad
        assert not p._backward_hooks
        assert p.grad is None
    assert list(module.state_dict()) == keys == ["0.weight", "0.bias", "2.weight", "2.bias"]
    optimizer.step()
    assert type(module) is nn.Sequential


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_private_module_are_plain(how: str) -> None:
    engine, module, _, _, _ = make()
    twin = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    x, y = data().tensors
    F.cross_entropy(twin(x), y).backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in module.parameters())
    assert engine.steps == 0


def test_forwards_without_backward_and_errors_leave_no_trace() -> None:
    torch.manual_seed(0)

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.fails = nn.Linear(4, 5), nn.Linear(5, 3), False

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if self.fails:
                raise MemoryError
            return self.second(h)

    results = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        module = Fragile()
        engine = PrivacyEngine(seed=0)
        module, optimizer, loader = engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0,
            max_grad_norm=1.0, data_loader=DataLoader(data(), batch_size=4), grad_sample_mode="ghost",
        )  # fmt: skip
        for x, y in loader:
            if disturbed:
                module(x)
                module.fails = True
                with pytest.raises(MemoryError):
                    module(x)
                module.fails = False
                assert all(p.requires_grad for p in module.parameters())
                loss = F.cross_entropy(module(x), y)
                loss.register_hook(raise_key_error)
                with pytest.raises(KeyError):
                    loss.backward()
                seen = x.clone().requires_grad_()
                module.eval()
                F.cross_entropy(module(seen), y).backward()
                assert seen.grad is not None
                module.train()
                module.zero_grad()
                with torch.no_grad():
                    module(x)
                (gradient,) = torch.autograd.grad(F.cross_entropy(module(seen), y), seen)
                assert gradient.shape == seen.shape
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*results)


def raise_key_error(grad: Tensor) -> None:
    raise KeyError


def test_gradients_of_the_inputs_are_the_plain_ones() -> None:
    for mode in ("hooks", "ghost", "bk"):
        _, module, _, loader, _ = make(grad_sample_mode=mode)
        x, y = next(batch for batch in loader if len(batch[0]) > 1)
        seen = x.clone().requires_grad_()
        F.cross_entropy(module(seen), y).backward()
        twin, other = copy.deepcopy(module), x.clone().requires_grad_()
        F.cross_entropy(twin(other), y).backward()
        torch.testing.assert_close(seen.grad, other.grad)


def test_an_engine_that_is_dropped_is_collected() -> None:
    plain = torch.autograd.backward
    engine, module, optimizer, loader, original = make()
    module(next(iter(loader))[0])  # a forward that never gets its backward
    gone = weakref.ref(module[0]), weakref.ref(engine)
    del engine, module, optimizer, loader, original
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert torch.autograd.backward is plain


def test_adaptive_clipping_follows_the_quantile_and_pays_for_its_count() -> None:
    engine, module, optimizer, loader, _ = make(clipping="adaptive", max_grad_norm=1e-3, noise_multiplier=0.5)
    bound = optimizer.max_grad_norm
    function = optimizer.clip_function
    assert function.effective_noise_multiplier(0.5) > 0.5
    expected = (0.5**-2 - (2 * function.unclipped_num_std) ** -2) ** -0.5
    assert function.effective_noise_multiplier(0.5) == pytest.approx(expected)
    for _ in range(5):
        train(module, optimizer, loader)
    assert optimizer.max_grad_norm > bound  # every norm is above it, so it grows
    assert engine.accountant.history == [(0.5, 0.25, 20)]


def test_noise_and_bound_can_be_functions_of_the_step() -> None:
    engine, module, optimizer, loader, _ = make(noise_multiplier=lambda step: 1.0 + step)
    train(module, optimizer, loader)
    assert engine.accountant.history == [(1.0 + step, 0.25, 1) for step in range(4)]


@pytest.mark.parametrize("given", ["callable", "scheduler"])
def test_the_bound_can_follow_a_schedule(given: str) -> None:
    if given == "callable":
        engine, module, optimizer, loader, _ = make(max_grad_norm=lambda step: 1.0 / (1 + step), noise_multiplier=0.0)
        scheduler = None
    else:
        engine, module, optimizer, loader, _ = make(max_grad_norm=1.0, noise_multiplier=0.0)
        scheduler = LambdaGradClip(optimizer, scheduler_function=lambda step: 1.0 / (1 + step))
    for step, (x, y) in enumerate(loader):
        assert optimizer.max_grad_norm == pytest.approx(1.0 / (1 + step))
        assert optimizer.clip_function.sensitivity == optimizer.max_grad_norm
        F.cross_entropy(100 * module(x), y).backward()
        optimizer.step()
        norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item()
        assert norm * 4 <= len(x) / (1 + step) * (1 + 1e-5)
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    assert engine.steps == 4


def test_repr_and_explain_say_which_clipper_is_used() -> None:
    engine, module, optimizer, loader, _ = make(grad_sample_mode="auto")
    assert "grad_sample_mode='bk'" in repr(engine)
    assert "known after a batch" in str(engine.explain())
    train(module, optimizer, loader)
    table = str(engine.explain())
    assert "outer product" in table
    assert "linear" in table
    assert "steps=4" in repr(engine)
    assert [plan.path for plan in engine.explain().modules] == ["0", "2"]
    assert isinstance(optimizer, DPOptimizer)
    assert "max_grad_norm=1.0" in repr(optimizer)


@pytest.mark.parametrize(
    ("mode", "kept"),
    [
        ("hooks", "per-sample gradients (p.grad_sample)"),
        ("functorch", "per-sample gradients (p.grad_sample)"),
        ("ghost", "weight: inputs and output gradients, bias: per-sample gradients"),
        ("bk", "weight: inputs and output gradients, bias: per-sample gradients"),
    ],
)
def test_explain_says_for_each_layer_what_was_kept(mode: str, kept: str) -> None:
    engine, module, optimizer, loader, _ = make(grad_sample_mode=mode)
    train(module, optimizer, loader)
    assert [plan.kept for plan in engine.explain().modules] == [kept, kept]
    assert kept in str(engine.explain())
