"""Logical steps: noise for all, the true divisor, accumulation, memory manager, leaving early, empty batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from ghostgrad import BatchMemoryManager, DPOptimizer, PrivacyEngine, PrivacyError
from ghostgrad.accounting import RDPAccountant
from ghostgrad.clipping.accumulator import _most_plausible

MODES = ["hooks", "ghost", "bk", "functorch"]
C = 0.5


def make(n: int = 24, batch_size: int = 8, mode: str = "bk", seed: int = 0, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,)))
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    engine = PrivacyEngine(seed=seed)
    options = {"noise_multiplier": 0.0, "max_grad_norm": C, **options}
    made = engine.make_private(
        module=module, optimizer=optimizer, data_loader=DataLoader(data, batch_size=batch_size), grad_sample_mode=mode,
        **options,
    )  # fmt: skip
    return engine, *made


def textbook_gradient(module: nn.Module, batches: list[tuple[Tensor, Tensor]], divisor: float) -> Tensor:
    """Clip every record's own gradient, add up, divide: from the definition."""
    total = torch.zeros(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    plain.load_state_dict(module.state_dict())
    for x, y in batches:
        for i in range(len(x)):
            loss = F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1])
            flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(plain.parameters()))])
            total += flat * min(1.0, C / flat.norm().item())
    return total / divisor


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def backward(module: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(module(x), y).backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_step_divides_by_the_true_expected_batch_size(mode: str) -> None:
    _, module, optimizer, loader = make(n=25, batch_size=7, mode=mode)
    assert optimizer.expected_batch_size == pytest.approx(7.0, abs=1e-12)
    assert len(loader) == 4
    for x, y in loader:
        expected = textbook_gradient(module, [(x, y)], 7.0)
        backward(module, x, y)
        optimizer.step()
        torch.testing.assert_close(gradient(module), expected, rtol=1e-9, atol=1e-12)
        optimizer.zero_grad()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pieces", [(3,), (2, 5), (1, 2, 3)])
def test_several_backwards_on_parts_of_a_batch_add_up(mode: str, pieces: tuple[int, ...]) -> None:
    _, module, optimizer, loader = make(n=24, batch_size=24, mode=mode)
    x, y = next(iter(loader))
    expected = textbook_gradient(module, [(x, y)], 24.0)
    for part in torch.tensor_split(torch.arange(24), torch.tensor(pieces).cumsum(0)):
        backward(module, x[part], y[part])
    optimizer.step()
    torch.testing.assert_close(gradient(module), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inside_memory_manager", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_declared_accumulation_is_one_draw_at_k_times_the_rate(mode: str, inside_memory_manager: bool, k: int) -> None:
    engine, module, optimizer, loader = make(n=24, batch_size=4, mode=mode, accumulation_steps=k, noise_multiplier=0.0)
    assert loader.sample_rate == pytest.approx(4 * k / 24)
    assert optimizer.expected_batch_size == pytest.approx(4.0 * k)
    seen: list[tuple[Tensor, Tensor]] = []
    for x, y in physical(loader, optimizer, 3 if inside_memory_manager else None):
        seen.append((x, y))
        before = engine.steps
        backward(module, x, y)
        optimizer.step()
        if engine.steps > before:
            # The parameters have moved by lr * gradient: undo it to compare at the point of the step.
            moved = gradient(module)
            for p in module.parameters():
                p.data.add_(p.grad, alpha=0.3)
            torch.testing.assert_close(moved, textbook_gradient(module, seen, 4.0 * k), rtol=1e-9, atol=1e-12)
            for p in module.parameters():
                p.data.sub_(p.grad, alpha=0.3)
            records = torch.cat([x for x, _ in seen])
            assert len(records.unique(dim=0)) == len(records)  # the parts of a draw are disjoint
            seen.clear()
        optimizer.zero_grad()
    assert engine.steps == loader.steps_per_epoch == 6 // k
    assert engine.accountant.history == [(0.0, pytest.approx(4 * k / 24), 6 // k)]


def physical(loader: Any, optimizer: Any, size: int | None) -> Iterator[Any]:
    if size is None:
        yield from loader
        return
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=size, optimizer=optimizer) as pieces:
        yield from pieces


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [2, 3])
def test_accumulation_that_was_not_declared_is_accounted_as_k_draws(mode: str, k: int) -> None:
    engine, module, optimizer, loader = make(n=24, batch_size=4, mode=mode, noise_multiplier=2.0)
    for number, (x, y) in enumerate(loader, start=1):
        backward(module, x, y)
        if number % k == 0:
            optimizer.step()
            optimizer.zero_grad()
    reference = RDPAccountant()
    reference.step(noise_multiplier=2.0 / math.sqrt(k), sample_rate=4 / 24, steps=6)
    assert engine.get_epsilon(1e-3) == pytest.approx(reference.get_epsilon(1e-3), rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_that_was_not_declared_scales_by_the_number_of_draws(mode: str) -> None:
    _, module, optimizer, loader = make(n=24, batch_size=4, mode=mode)
    seen = []
    for x, y in loader:
        seen.append((x, y))
        backward(module, x, y)
        if len(seen) == 2:
            break
    expected = textbook_gradient(module, seen, 2 * 4.0)
    optimizer.step()
    torch.testing.assert_close(gradient(module), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_the_memory_manager_trains_the_same_model(mode: str, size: int) -> None:
    results = []
    for limit in (None, size):
        engine, module, optimizer, loader = make(mode=mode, noise_multiplier=1.0)
        for _ in range(2):
            for x, y in physical(loader, optimizer, limit):
                optimizer.zero_grad()
                backward(module, x, y)
                optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        assert engine.steps == 6
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by_exception", [False, True])
def test_leaving_a_memory_manager_early_leaves_no_partial_sum(mode: str, by_exception: bool) -> None:
    engine, module, optimizer, loader = make(n=24, batch_size=12, mode=mode)
    try:
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as pieces:
            for number, (x, y) in enumerate(pieces):
                backward(module, x, y)
                optimizer.step()
                optimizer.zero_grad()
                if number == 1:
                    if by_exception:
                        raise KeyError
                    break
    except KeyError:
        pass
    assert engine.steps == 0
    x, y = next(iter(loader))
    expected = textbook_gradient(module, [(x, y)], 12.0)
    backward(module, x, y)
    optimizer.step()
    assert engine.steps == 1
    torch.testing.assert_close(gradient(module), expected, rtol=1e-9, atol=1e-12)


def test_leaving_a_loop_of_declared_parts_early_leaves_no_partial_sum() -> None:
    engine, module, optimizer, loader = make(n=24, batch_size=4, accumulation_steps=3)
    x, y = next(iter(loader))
    backward(module, x, y)
    optimizer.step()
    seen = []
    for x, y in loader:
        seen.append((x, y))
        if engine.steps == 0:
            expected_at = {name: value.clone() for name, value in module.state_dict().items()}
        backward(module, x, y)
        optimizer.step()
        if engine.steps:
            break
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    plain.load_state_dict(expected_at)
    assert len(seen) == 3
    torch.testing.assert_close(gradient(module), textbook_gradient(plain, seen, 12.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_cannot_be_used_twice(mode: str) -> None:
    _, module, optimizer, loader = make(mode=mode)
    for number, (x, y) in enumerate(loader):
        if len(x) == 0:
            continue
        backward(module, x, y)
        with pytest.raises(PrivacyError, match="more than once"):
            backward(module, x, y)
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(PrivacyError, match="part of a step already"):
            backward(module, x, y)
        if number:
            break


def test_augmenting_a_batch_to_more_rows_is_refused() -> None:
    _, module, _, loader = make()
    x, y = next(batch for batch in loader if len(batch[0]))
    with pytest.raises(PrivacyError, match="more than once"):
        backward(module, torch.cat([x, x + 0.1]), torch.cat([y, y]))


@pytest.mark.parametrize("first", [0, 1])
def test_gradients_may_be_cleared_between_forward_and_backward(first: int) -> None:
    """Also when the first batch had too few records to show how the model is to be read."""
    module = nn.Linear(3, 2)
    module, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=4.0, noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    for size in (first, 5, 4):
        loss = F.cross_entropy(module(torch.ones(size, 3)), torch.zeros(size, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert optimizer.steps == 3


def test_two_batches_in_one_backward_are_refused() -> None:
    _, module, _, loader = make()
    batches = iter(loader)
    x, y = next(batches)
    first = F.cross_entropy(module(x), y)
    x, y = next(batches)
    with pytest.raises(PrivacyError, match="different batches"):
        (first + F.cross_entropy(module(x), y)).backward()


def test_training_on_another_loader_is_refused() -> None:
    _, module, _, loader = make()
    x, y = loader.dataset.tensors
    with pytest.raises(PrivacyError, match="did not hand out"):
        backward(module, x[:4], y[:4])


@pytest.mark.parametrize("mode", MODES)
def test_two_forwards_of_the_same_records_are_one_gradient(mode: str) -> None:
    """A siamese loss: both forwards belong to the record, so their gradients add up before they are clipped."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    a, b = 3 * torch.randn(2, 5, 4, dtype=torch.float64)
    expected = torch.zeros(15, dtype=torch.float64)
    for i in range(5):
        loss = (model(a[i]) - model(b[i]).square()).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        flat = torch.cat([g.flatten() for g in grads])
        expected += flat * min(1.0, C / flat.norm().item())
    _, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.1,
        expected_batch_size=1.0, noise_multiplier=0.0, max_grad_norm=C, grad_sample_mode=mode,
    )  # fmt: skip
    (model(a) - model(b).square()).square().sum(1).mean().backward()
    optimizer.step()
    torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_every_trainable_parameter_is_noised_in_every_step(mode: str) -> None:
    torch.manual_seed(0)

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 50)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused()
    data = TensorDataset(torch.randn(30, 4), torch.randint(3, (30,)))
    engine = PrivacyEngine(seed=0)
    _, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), noise_multiplier=1.0, max_grad_norm=3.0,
        data_loader=DataLoader(data, batch_size=10), grad_sample_mode=mode,
    )  # fmt: skip
    for x, y in loader:
        backward(model, x, y)
        optimizer.step()
        std = model.unused.weight.grad.std().item()
        assert std == pytest.approx(3.0 / 10.0, rel=0.25)
        optimizer.zero_grad()
    optimizer.step()  # no backward at all: noise only, and accounted
    assert model.used.weight.grad.abs().min() > 0
    assert engine.steps == len(engine.accountant) == 4


@pytest.mark.parametrize("mode", MODES)
def test_empty_batches_are_steps_like_any_other(mode: str) -> None:
    torch.manual_seed(0)

    class Picky(nn.Module):
        """Fails on an empty batch in ways that models do."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(12, 2)

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
            x = self.embedding(batch["ids"])
            return {"logits": self.head(x.view(x.size(0), -1)), "nested": [x.sum((1, 2))], "name": "picky"}

    model = Picky().double()

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"ids": torch.tensor([i % 10, 1, 2]), "label": i % 2, "text": str(i)}

    engine = PrivacyEngine(seed=3)
    _, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=DataLoader(Rows(), batch_size=1), grad_sample_mode=mode,
    )  # fmt: skip
    sizes = []
    for batch in loader:
        sizes.append(len(batch["ids"]))
        out = model(batch)
        assert len(out["logits"]) == len(batch["text"]) == sizes[-1]
        (F.cross_entropy(out["logits"], batch["label"]) + out["nested"][0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 in sizes
    assert max(sizes) > 1
    assert engine.steps == 40
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("how", ["continue", "step alone"])
def test_an_empty_draw_cannot_be_skipped(how: str) -> None:
    """Whether a step was made would tell that a draw was empty; a step without backward is fine."""
    engine, module, optimizer, loader = make(n=24, batch_size=1, noise_multiplier=2.0)

    def epoch() -> None:
        for x, y in loader:
            if len(x):
                backward(module, x, y)
            elif how == "continue":
                continue
            optimizer.step()
            optimizer.zero_grad()

    if how == "continue":
        with pytest.raises(PrivacyError, match="skipped 1 empty batch"):
            epoch()
    else:
        epoch()
        for _ in loader:
            pass  # a pass that only looks is not a training that skips
        epoch()
        assert engine.steps == 48
        assert engine.accountant.history == [(2.0, 1 / 24, 48)]


@pytest.mark.parametrize("zero_grad_first", [False, True])
def test_an_empty_last_part_keeps_what_came_before_it(zero_grad_first: bool) -> None:
    for seed in range(12):
        _, module, optimizer, loader = make(n=6, batch_size=1, seed=seed, accumulation_steps=2)
        seen: list[tuple[Tensor, Tensor]] = []
        for x, y in loader:
            if zero_grad_first:
                optimizer.zero_grad()
            seen.append((x, y))
            expected = textbook_gradient(module, seen, 2.0)
            backward(module, x, y)
            optimizer.step()
            if len(seen) == 2:
                torch.testing.assert_close(gradient(module), expected, rtol=1e-9, atol=1e-12)
                seen.clear()
            if not zero_grad_first:
                optimizer.zero_grad()


def test_an_abandoned_batch_with_an_empty_part_does_not_count_as_a_draw() -> None:
    for seed in range(12):
        engine, module, optimizer, loader = make(
            n=6, batch_size=1, seed=seed, accumulation_steps=2, noise_multiplier=1.0
        )
        x, y = next(iter(loader))
        backward(module, x, y)
        optimizer.step()
        for x, y in loader:
            backward(module, x, y)
            optimizer.step()
            optimizer.zero_grad()
        assert engine.accountant.history == [(1.0, 2 / 6, 3)]


def test_the_same_memory_in_a_later_step_is_refused() -> None:
    _, module, optimizer, loader = make(poisson_sampling=False)
    first = next(iter(loader))
    batches = iter(loader)
    next(batches)
    backward(module, *first)
    optimizer.step()
    optimizer.zero_grad()
    next(batches)
    with pytest.raises(PrivacyError, match="the same records"):
        backward(module, *first)


def test_the_same_batch_twice_in_a_step_is_refused_without_a_loader_too() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    _, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=1.0,
        expected_batch_size=6.0, noise_multiplier=0.0, max_grad_norm=C,
    )  # fmt: skip
    for _ in range(3):  # every record in every step: rate 1 by hand
        backward(model, x, y)
        with pytest.raises(PrivacyError, match="the same records"):
            backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("pieces", [1, 2])
def test_more_rows_than_can_have_been_drawn_are_refused_without_a_loader(pieces: int) -> None:
    """64 records of 3 tokens, handed to the model as rows; as many records by chance would be a wonder."""
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.1,
        expected_batch_size=64, noise_multiplier=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    for size in (64, 90, 50):  # what chance does bring
        model(torch.randn(size, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    *before, last = torch.randn(64 * 3, 5).chunk(pieces)
    for part in before:
        model(part).square().mean().backward()
    with pytest.raises(PrivacyError, match="far more rows"):
        model(last).square().mean().backward()


def test_the_rows_that_can_have_been_drawn_are_bounded_as_the_binomial_distribution_says() -> None:
    """Against the exact tail: never more likely than 1e-12, and not looser than twice the distance it has to keep."""
    for mean in (0.5, 1.0, 8.0, 256.0, 4096.0):
        bound = _most_plausible(mean)
        for rate in (1e-6, 0.1, 0.5):
            assert scipy.stats.binom.sf(bound, round(mean / rate), rate) <= 1e-12
        assert bound - mean <= 2 * (scipy.stats.poisson.isf(1e-12, mean) + 1 - mean)


def test_one_half_of_a_batch_twice_is_refused() -> None:
    _, module, _, loader = make(n=24, batch_size=24)
    x, y = next(iter(loader))
    backward(module, x[:12], y[:12])
    with pytest.raises(PrivacyError, match="the same records"):
        backward(module, x[:12], y[:12])


def test_a_backward_that_was_bound_before_is_noticed_at_the_step() -> None:
    _, module, optimizer, loader = make()
    bound_before = torch.autograd.backward.__wrapped__  # what `from torch.autograd import backward` gave before
    x, y = next(batch for batch in loader if len(batch[0]))
    bound_before(F.cross_entropy(module(x), y))
    with pytest.raises(PrivacyError, match=r"Call loss\.backward"):
        optimizer.step()
    with pytest.raises(PrivacyError, match="inputs="):
        F.cross_entropy(module(x), y).backward(inputs=list(module.parameters()))


def test_parts_of_a_batch_joined_in_one_backward_are_refused() -> None:
    _, module, _, loader = make(n=24, batch_size=24)
    x, y = next(iter(loader))
    with pytest.raises(PrivacyError, match="each part"):
        (F.cross_entropy(module(x[:12]), y[:12]) + F.cross_entropy(module(x[12:]), y[12:])).backward()


def test_an_interrupted_step_does_not_repeat_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, module, optimizer, _ = make(noise_multiplier=1.0)
    inner = optimizer._inner_step

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer, "_inner_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    first = gradient(module).clone()
    optimizer.zero_grad()
    monkeypatch.setattr(optimizer, "_inner_step", inner)
    optimizer.step()
    assert not torch.equal(first, gradient(module))
    assert len(engine.accountant) == 2


def test_a_detached_optimizer_does_not_step() -> None:
    engine, _, optimizer, _ = make()
    engine.detach()
    with pytest.raises(PrivacyError, match="detached"):
        optimizer.step()


def test_sum_reduction_releases_the_undivided_sum() -> None:
    _, module, optimizer, loader = make(loss_reduction="sum")
    x, y = next(iter(loader))
    expected = textbook_gradient(module, [(x, y)], 1.0)
    F.cross_entropy(module(x), y, reduction="sum").backward()
    optimizer.step()
    torch.testing.assert_close(gradient(module), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_hooks_show_per_sample_gradients(mode: str) -> None:
    _, module, optimizer, loader = make(mode=mode)
    x, y = next(iter(loader))
    backward(module, x, y)
    for p in module.parameters():
        assert p.grad_sample.shape == (len(x), *p.shape)
    i = len(x) - 1
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    plain.load_state_dict(module.state_dict())
    F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1]).backward()
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad_sample[i], q.grad, rtol=1e-9, atol=1e-12)
    optimizer.step()
    optimizer.zero_grad()
    assert not any(hasattr(p, "grad_sample") for p in module.parameters())


def test_without_poisson_sampling_a_pass_is_one_release() -> None:
    engine, module, optimizer, loader = make(noise_multiplier=2.0, poisson_sampling=False)
    assert [len(x) for x, _ in loader] == [8, 8, 8]
    for _ in range(2):
        for x, y in loader:
            backward(module, x, y)
            optimizer.step()
            optimizer.zero_grad()
    reference = RDPAccountant()
    reference.step(noise_multiplier=2.0, sample_rate=1.0, steps=2)
    assert engine.get_epsilon(1e-3) == pytest.approx(reference.get_epsilon(1e-3), rel=1e-12)
    assert "zero-out" in engine.guarantee
    assert "no amplification" in engine.guarantee
    assert "zero-out" in str(engine.explain())


def test_only_the_records_of_the_users_split_are_served() -> None:
    torch.manual_seed(0)
    split = list(range(0, 50, 2))
    data = TensorDataset(torch.arange(50.0).unsqueeze(1))
    model = nn.Linear(1, 1)
    _, optimizer, loader = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=DataLoader(data, batch_size=5, sampler=SubsetRandomSampler(split)),
    )  # fmt: skip
    served = {int(value) for _ in range(10) for (x,) in loader for value in x}
    assert served <= set(split)
    assert len(served) > 20
    assert loader.sample_rate == 5 / 25
    assert optimizer.expected_batch_size == 5.0
    assert isinstance(optimizer, DPOptimizer)


@pytest.mark.parametrize(("relation", "said"), [("add-or-remove-one", False), ("replace-one", True)])
def test_the_guarantee_names_what_the_accountant_counts(relation: Any, said: bool) -> None:
    engine = PrivacyEngine(accountant=RDPAccountant(neighbouring=relation), seed=0)
    model = nn.Linear(3, 2)
    engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.1,
        expected_batch_size=4, noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert ("replacing one" in engine.guarantee) is said
