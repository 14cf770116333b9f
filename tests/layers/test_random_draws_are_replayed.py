"""Random numbers inside a module that is recomputed record by record are those that the batch drew.

The truth is plain autograd: under one seed the whole batch goes through the model once for every record, and that record's loss
is differentiated. Records do not meet, so this is the gradient of the record under its own share of what the batch drew.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_case import RECORDS, Case, randn
from private_step import MODES, read
from single_record import Gradients, assert_same_gradients, bound_that_clips_some, expected_gradient
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghostgrad import PrivacyEngine, UnsupportedModuleError

# What torch says of a checkpoint without gradients, which is how a forward is looked at before it counts.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def drop_path(x: Tensor, p: float = 0.4) -> Tensor:
    return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - p) / (1 - p)


def stochastic_depth(x: Tensor) -> Tensor:
    return x * torch.empty((len(x), *[1] * (x.dim() - 1)), dtype=x.dtype).bernoulli_(0.6)


def layer_drop(x: Tensor) -> Tensor:
    return x if torch.rand([]) < 0.5 else torch.tanh(x)


def sampled(x: Tensor) -> Tensor:
    return (
        x * torch.distributions.Normal(torch.zeros_like(x), 1.0).rsample()
        + torch.distributions.Gamma(x.abs() + 1, 1.0).rsample().detach()
    )


# x is [n, 3, 4].
DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "torch.dropout": lambda x: torch.dropout(x, 0.5, True),
    "dropout in place": lambda x: F.dropout(x + 1, 0.5, inplace=True),
    "dropout1d": lambda x: F.dropout1d(x, 0.5),
    "dropout2d": lambda x: F.dropout2d(x.unsqueeze(3), 0.5).squeeze(3),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "feature alpha dropout": lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
    "twice": lambda x: F.dropout(torch.tanh(F.dropout(x, 0.2)), 0.3) + torch.randn_like(x),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "heads in the batch": lambda x: F.dropout(
        x.unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1) @ x.unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1).mT, 0.4
    ).unflatten(0, (len(x), 2)).sum((1, 3))[..., None] * x,
    "time first": lambda x: F.dropout(x.transpose(0, 1).contiguous(), 0.5).transpose(0, 1),
    "drop path": drop_path,
    "stochastic depth": stochastic_depth,
    "layer drop": layer_drop,
    "normal": lambda x: x + torch.randn_like(x),
    "normal in place": lambda x: x + torch.empty_like(x).normal_(),
    "uniform": lambda x: x * torch.rand(x.shape, dtype=x.dtype),
    "bernoulli": lambda x: x * torch.bernoulli(torch.sigmoid(x.detach())),
    "gumbel": lambda x: F.gumbel_softmax(x, 0.7),
    "leaky": lambda x: F.rrelu(x, training=True),
    "sampled": sampled,
    "a choice for each record": lambda x: x * torch.multinomial(torch.ones(len(x), 4), 4)[:, None, :],
    "one record after the other": lambda x: torch.stack([row[torch.randperm(3)] for row in x]),
    "one record after the other, twice": lambda x: torch.stack([row * torch.rand(4) + torch.rand(4) for row in x]),
    "one mask for all": lambda x: x * F.dropout(torch.ones(1, 3, 4, dtype=x.dtype), 0.5),
    "one permutation for all": lambda x: x[:, :, torch.randperm(4)],
    "nothing": torch.tanh,
    "checkpointed": lambda x: checkpoint(lambda y: F.dropout(y, 0.5), x, use_reentrant=False),
}  # fmt: skip


class Drawing(nn.Module):
    """Draws between two uses of weights of its own."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.weight, self.gain, self.draw = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(())), DRAWS[draw]

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.draw(x * self.weight)) * self.gain


class Enclosing(nn.Module):
    """A token of its own, and sub-modules with rules and dropout inside: drawing in and beside modules that answer themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.drop = nn.Parameter(torch.ones(1, 1, 4)), nn.Dropout(0.3)
        self.first, self.attend = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.last = Drawing("dropout")

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.cat([self.token.expand(len(x), -1, -1), self.first(self.drop(x))[:, 1:]], 1))
        return self.last(x + self.attend(x, x, x)[0])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Drawing("dropout")

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + 2 * self.part(self.part(x).cos())


class Checkpointed(nn.Module):
    """Draws, under activation checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.part, self.reentrant = nn.Linear(4, 4), Drawing("twice"), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, self.first(x), use_reentrant=self.reentrant)


def each_under_its_own_draws(case: Case) -> list[Gradients]:
    found = []
    for i in range(RECORDS):
        model = case.model()
        forward(case, model)[i].backward()
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})
    return found


def make_private(case: Case, mode: str, bound: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = case.model()
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=None, sample_rate=0.5,
        expected_batch_size=RECORDS, noise_multiplier=0.0, max_grad_norm=bound, grad_sample_mode=mode,
    )  # fmt: skip
    return model, optimizer


def forward(case: Case, model: nn.Module) -> Tensor:
    batch = case.batch()
    torch.manual_seed(5)
    return case.losses(model, *batch)


CASES = [
    *(Case(name, lambda name=name: nn.Sequential(nn.Linear(4, 4), Drawing(name)), randn(3, 4)) for name in DRAWS),
    Case("enclosing", Enclosing, randn(3, 4)),
    Case("called several times", Twice, randn(3, 4)),
    Case("under checkpointing", lambda: Checkpointed(False), randn(3, 4)),
    Case("under reentrant checkpointing", lambda: Checkpointed(True), randn(3, 4)),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_record_keeps_what_the_batch_drew_for_it(case: Case, mode: str) -> None:
    each = each_under_its_own_draws(case)
    bound = bound_that_clips_some(each)
    model, optimizer = make_private(case, mode, bound)
    for _ in range(2):  # the second is not compared with the batch any more
        optimizer.zero_grad()
        forward(case, model).mean().backward()
        optimizer.step()
        assert_same_gradients(read(model), expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_forward_and_what_is_drawn_after_it_are_what_they_were_without_us(case: Case) -> None:
    plain = forward(case, case.model())
    plain.sum().backward()
    after = torch.rand(3)
    model, _ = make_private(case, "bk", 1.0)
    private = forward(case, model)
    private.mean().backward()
    assert torch.equal(private, plain)
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("mode", MODES)
def test_an_error_in_a_forward_that_draws_leaves_no_trace(mode: str) -> None:
    case = CASES[0]
    each = each_under_its_own_draws(case)
    bound = bound_that_clips_some(each)
    model, optimizer = make_private(case, mode, bound)

    def fail(module: nn.Module, args: object) -> None:
        raise MemoryError

    handle = model[1].register_forward_pre_hook(fail)  # type: ignore[operator, union-attr]
    with pytest.raises(MemoryError):
        forward(case, model)
    handle.remove()
    forward(case, model).mean().backward()
    optimizer.step()
    assert_same_gradients(read(model), expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_under_autocast_the_draws_are_those_of_the_type_that_ran(mode: str) -> None:
    case = Case("autocast", lambda: nn.Sequential(nn.Linear(4, 4), Drawing("dropout")), randn(3, 4))
    model = case.model(torch.float32)
    batch = case.batch(torch.float32)
    plain = case.model(torch.float32)
    for trained in (plain, model):
        trained.float()
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=None, sample_rate=0.5,
        expected_batch_size=RECORDS, noise_multiplier=0.0, max_grad_norm=1e9, grad_sample_mode=mode,
    )  # fmt: skip
    found = {}
    for name, trained in (("plain", plain), ("private", model)):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            losses = case.losses(trained, *batch)
        losses.mean().backward()
        found[name] = losses.detach()
    optimizer.step()
    assert torch.equal(found["plain"], found["private"])
    expected = {n: p.grad.double() for n, p in plain.named_parameters() if p.grad is not None}
    assert_same_gradients(read(model), expected, relative=2e-2)  # bfloat16 has eight bits


def test_a_fused_attention_kernel_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import ghostgrad.layers.replay as replay

    name = replay._name
    monkeypatch.setattr(replay, "_name", lambda func: "a_fused_attention" if name(func) == "bernoulli" else name(func))
    case = CASES[0]
    model, _ = make_private(case, "bk", 1.0)
    with pytest.raises(UnsupportedModuleError, match=r"attn_implementation='eager'"):
        forward(case, model).mean().backward()
