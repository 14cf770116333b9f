"""What has no gradient of each record's own loss, or cannot be read, raises and leaves everything as it was.

Layouts that may be readable one day (position ids without a batch dimension) have to be exact or refused.
"""

from __future__ import annotations

import re

import pytest
import torch
from layer_case import RECORDS, Case, ids, randn
from private_step import MODES
from single_record import (
    Gradients,
    assert_same_gradients,
    bound_that_clips_some,
    expected_gradient,
    gradients_of_each_record,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from ghostgrad import ConfigurationError, PrivacyEngine, PrivacyError, UnsupportedModuleError

REFUSALS = (ConfigurationError, PrivacyError, UnsupportedModuleError)


class Positions(nn.Module):
    """Position ids without a record in them, [1, t] or [t]."""

    def __init__(self, length: int, *lead: int) -> None:
        super().__init__()
        self.tokens, self.positions, self.lead = nn.Embedding(5, 3), nn.Embedding(length, 3), lead

    def forward(self, tokens: Tensor) -> Tensor:
        numbers = torch.arange(tokens.shape[1]).view(*self.lead, -1)
        return torch.tanh(self.tokens(tokens) + self.positions(numbers))


class ScaledAndTurned(nn.Module):
    """Its own weight, and an output that does not lead with the batch."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).T


class Turned(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.inner = ScaledAndTurned(features)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)).T


class TimeMajor(nn.Module):
    """Folds [n, t, f] to [t * n, f]: the record is the fast index."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.inner(x.transpose(0, 1).flatten(0, 1))
        return torch.tanh(rows.unflatten(0, (x.shape[1], len(x))).sum(0))


class Centred(nn.Module):
    """A batch norm in disguise."""

    def __init__(self, *, detached: bool, only: str, weighted: bool) -> None:
        super().__init__()
        self.detached, self.only = detached, only
        self.weight = nn.Parameter(torch.ones(4)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        if self.only in ("always", "train" if self.training else "eval"):
            mean = x.mean(0)
            x = x - (mean.detach() if self.detached else mean)
        return x if self.weight is None else x * self.weight


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0) * self.weight


def train(case: Case, mode: str, max_grad_norm: float = 1.0) -> Gradients:
    """One step. When it is refused, the module must be as it was: weights, what trains, and usable after `detach`."""
    model = case.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(seed=0)
    try:
        model, private, _ = engine.make_private(
            module=model, optimizer=optimizer, data_loader=None, sample_rate=0.5, expected_batch_size=RECORDS,
            noise_multiplier=0.0, max_grad_norm=max_grad_norm, grad_sample_mode=mode, batch_first=case.batch_first,
        )  # fmt: skip
        case.losses(model, *case.batch()).mean().backward()
        private.step()
    except REFUSALS:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        engine.detach()
        case.losses(model, *case.batch()).mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        raise
    return {name: p.grad for name, p in model.named_parameters()}


def exact_or_refused(case: Case, mode: str, path: str) -> None:
    each = gradients_of_each_record(case.model(), case.losses, case.batch(), case.batch_dims)
    bound = bound_that_clips_some(each)
    refusal = ""
    try:
        found = train(case, mode, bound)
    except REFUSALS as error:
        refusal = str(error)
    if refusal:
        assert re.search(rf"\b{path}\b", refusal)
    else:
        assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [RECORDS - 2, RECORDS, 2 * RECORDS])
@pytest.mark.parametrize("lead", [(), (1,)], ids=["t", "1-t"])
def test_position_ids_without_a_batch_dimension(lead, length, mode):
    exact_or_refused(Case("positions", lambda: Positions(length, *lead), ids(5, length)), mode, "positions")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("features", [4, RECORDS, 2 * RECORDS])
def test_an_output_that_does_not_lead_with_the_batch(features, mode):
    exact_or_refused(Case("turned", lambda: Turned(features), randn(features)), mode, "inner")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [2, RECORDS])
def test_rows_folded_with_the_record_as_the_fast_index(length, mode):
    exact_or_refused(Case("time-major", TimeMajor, randn(length, 4)), mode, "inner")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_that_renormalises_its_rows_is_refused_before_anything_changes(kind, mode):
    case = Case("max-norm", lambda: nn.Sequential(kind(5, 3, max_norm=1.0), nn.Linear(3, 2)), ids(5, 4))
    with pytest.raises(UnsupportedModuleError, match=r"^0: Embedding.*max_norm"):
        train(case, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["first", "middle", "last", "root"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("detached", [False, True])
def test_centring_over_the_batch_is_refused(detached, weighted, place, mode):
    centred = Case(
        "centred", lambda: _beside(Centred(detached=detached, only="always", weighted=weighted), place), randn(4)
    )
    with pytest.raises(REFUSALS):
        train(centred, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("detached", [False, True])
def test_centring_by_a_module_with_weights_in_training_mode_only_is_refused(detached, mode):
    centred = Case(
        "centred", lambda: _beside(Centred(detached=detached, only="train", weighted=True), "middle"), randn(4)
    )
    with pytest.raises(REFUSALS, match=r"^(0|1|Sequential)\b"):
        train(centred, mode)


@pytest.mark.parametrize("mode", MODES)
def test_centring_with_gradient_in_training_mode_only_is_refused(mode):
    centred = Case(
        "centred", lambda: _beside(Centred(detached=False, only="train", weighted=False), "middle"), randn(4)
    )
    with pytest.raises(REFUSALS, match=r"^(0|Sequential)\b"):
        train(centred, mode)


@pytest.mark.parametrize("mode", MODES)
def test_centring_in_eval_mode_only_does_no_harm_to_training(mode):
    centred = lambda: _beside(Centred(detached=True, only="eval", weighted=True), "middle")  # noqa: E731
    exact_or_refused(Case("centred", centred, randn(4)), mode, "Sequential")


def _beside(layer: nn.Module, place: str) -> nn.Module:
    layers = {"first": (layer, nn.Linear(4, 4)), "middle": (nn.Linear(4, 4), layer, nn.Linear(4, 2)),
              "last": (nn.Linear(4, 4), layer), "root": (nn.Linear(4, 4), nn.Tanh(), layer)}  # fmt: skip
    return nn.Sequential(*layers[place])


class OwnGenerator(nn.Module):
    """Draws from a generator whose state nobody else knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        source = torch.Generator()
        source.seed()
        return x * self.weight + torch.randn(x.shape, generator=source, dtype=x.dtype)


class Reordered(nn.Module):
    """Gives each record the noise of another: no record alone draws what it got in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        return x * self.weight + noise[torch.randperm(len(noise))]


class MoreForMore(nn.Module):
    """Draws as often as there are records, and once more; all records get the last number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + [torch.rand(()) for _ in range(len(x) + 1)][-1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [OwnGenerator, Reordered, MoreForMore])
def test_random_numbers_that_cannot_be_told_apart_by_record_are_refused(kind, mode):
    case = Case("noisy", lambda: nn.Sequential(nn.Linear(4, 4), kind()), randn(4))
    with pytest.raises(UnsupportedModuleError, match=r"^1: "):
        train(case, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_module_that_changes_its_input_is_refused(mode):
    case = Case(
        "in-place", lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(ChangesItsInput())), randn(4)
    )
    with pytest.raises((*REFUSALS, RuntimeError)):
        train(case, mode)


class EachOfAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, records: list[Tensor]) -> Tensor:
        return torch.stack([self.linear(record).sum(0) for record in records])


class LastStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(3, 2)

    def forward(self, packed: PackedSequence) -> Tensor:
        return self.recurrent(packed)[1][-1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("build", "form", "way_out"),
    [
        (EachOfAList, list, "pad_sequence"),
        (EachOfAList, tuple, "pad_sequence"),
        (LastStates, pack_sequence, "pack_padded_sequence in its forward"),
    ],
    ids=["list", "tuple", "packed"],
)
def test_records_that_lie_along_no_dimension_are_refused_with_the_way_out(mode, build, form, way_out):
    model = build()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    private_step = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=None,
        sample_rate=0.1,
        expected_batch_size=4.0,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    with pytest.raises(UnsupportedModuleError, match=way_out):
        private_step[0](form([torch.randn(length, 3) for length in (5, 3, 2)]))
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
