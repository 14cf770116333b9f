"""A check is a look: parameters, buffers, gradients, random states, a step under way and the ledger stay as they were."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import ConfigurationError, PrivacyEngine


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 3), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.drop(self.layer(x))


def loss_fn(module: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def batch() -> list[Tensor]:
    return [torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3]


def train(checks: int) -> tuple[dict[str, Tensor], float, int, Tensor]:
    """Two private steps, with checks before, inside and after the first."""
    torch.manual_seed(0)
    engine = PrivacyEngine(seed=1)
    model = WithBuffer()
    data = TensorDataset(torch.randn(40, 4), torch.randint(3, (40,)))
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        data_loader=DataLoader(data, batch_size=8), noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    for step, (x, y) in enumerate(loader):
        for _ in range(checks):
            assert engine.check(batch(), loss_fn, verbose=False).holds
        F.cross_entropy(model(x), y).backward()
        for _ in range(checks):
            engine.check(batch(), loss_fn, verbose=False)
        optimizer.step()
        for _ in range(checks):
            engine.check(batch(), loss_fn, verbose=False)
        optimizer.zero_grad()
        if step == 1:
            break
    return copy.deepcopy(model.state_dict()), engine.get_epsilon(1e-3), engine.steps, torch.rand(4)


def test_a_training_with_checks_in_between_is_the_same_bit_for_bit():
    plain, checked = train(0), train(1)
    assert all(torch.equal(plain[0][name], checked[0][name]) for name in plain[0])
    assert plain[1:3] == checked[1:3]
    assert torch.equal(plain[3], checked[3])


def test_gradients_batch_and_modes_of_a_module_that_is_not_private_stay():
    model, given = WithBuffer().eval(), batch()
    model.layer.weight.grad = torch.ones(3, 4)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    PrivacyEngine().check(given, loss_fn, module=model, verbose=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model.layer.weight.grad, torch.ones(3, 4))
    assert not any(part.training for part in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(given, batch(), strict=True))
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_it_prints_unless_told_not_to(capsys):
    report = PrivacyEngine().check(batch(), loss_fn, module=WithBuffer())
    assert capsys.readouterr().out == f"{report}\n"
    PrivacyEngine().check(batch(), loss_fn, module=WithBuffer(), verbose=False)
    assert capsys.readouterr().out == ""


def test_it_takes_the_settings_of_the_private_module():
    engine = PrivacyEngine(seed=0)
    model = nn.Linear(4, 3)
    engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=3, noise_multiplier=1.0, max_grad_norm=1.0, loss_reduction="sum",
    )  # fmt: skip
    summed = engine.check(batch(), lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), verbose=False)
    assert summed.holds
    assert engine.steps == 0
    assert model.weight.grad is None


def outer_model_loss() -> object:
    outer = nn.Linear(4, 3)
    return lambda module, batch: F.cross_entropy(outer(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"module": None}, "0 private modules"),
        ({"module": "model"}, "module is a str"),
        ({"batch": [torch.randn(1, 4), torch.zeros(1, dtype=torch.long)]}, "the batch has 1 records"),
        ({"batch": "text"}, "the batch has 0 records"),
        ({"loss_fn": "loss"}, "must be a function"),
        ({"loss_fn": lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")}, r"shape \[6\]"),
        ({"loss_fn": lambda m, b: 1.0}, "returned a float"),
        ({"loss_fn": outer_model_loss()}, "did not call the module that it was given"),
        ({"loss_reduction": "men"}, "did you mean 'mean'"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"verbose": "no"}, "verbose='no'"),
        ({"batch_first": 1}, "batch_first=1"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(options, match):
    arguments = {"batch": batch(), "loss_fn": loss_fn, "module": nn.Linear(4, 3), "verbose": False, **options}
    with pytest.raises(ConfigurationError, match=match):
        PrivacyEngine().check(**arguments)


def test_a_loss_of_the_private_model_itself_enters_no_step():
    engine = PrivacyEngine(seed=0)
    model = nn.Linear(4, 3)
    model, optimizer, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=3, noise_multiplier=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="did not call the module that it was given"):
        engine.check(batch(), lambda _, b: loss_fn(model, b))
    assert not optimizer.total.holds
