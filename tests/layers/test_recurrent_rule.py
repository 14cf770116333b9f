"""RNN, LSTM and GRU, untouched: layers, directions, projections, states, packed sequences, against single records."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from layer_case import RECORDS, Case, frozen, randn
from private_step import MODES, step_by_hand, truth
from single_record import Gradients, assert_same_gradients, bound_that_clips_some, expected_gradient
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ghostgrad import GhostgradError, PrivacyEngine, PrivacyError

KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "rnn": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "lstm-projected": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
}
STEPS = 4


class Network(nn.Module):
    """A recurrent layer between linear ones; records first outside, whatever the layer's own layout is.

    Args:
        kind: of the layer, a key of KINDS.
        use: of its outputs: "sequence", "final" or "both".
        packed: "", "sorted" or "unsorted"; then lengths come as the second input, and a linear layer sees the packed rows
            (not beside dropout, where which rows are whose is not read).
        states: whether initial states come as the last input, [n, layers * directions, units].
    """

    def __init__(self, kind: str, *, use: str = "both", packed: str = "", states: bool = False, **options: Any) -> None:
        super().__init__()
        layer, own = KINDS[kind]
        self.before = nn.Linear(3, 3)
        self.packed_rows = nn.Linear(3, 3) if packed and not options.get("dropout") else nn.Identity()
        self.cells = layer(3, 3, **own, **options)
        self.use, self.packed, self.states = use, packed, states

    def forward(self, x: Tensor, *others: Tensor) -> list[Tensor]:
        cells = self.cells
        x = self.before(x) if cells.batch_first else self.before(x).transpose(0, 1)
        arguments: Any = (x,)
        if self.packed:
            rows = pack_padded_sequence(x, others[0], cells.batch_first, self.packed == "sorted")
            arguments = (PackedSequence(self.packed_rows(rows.data), *rows[1:]),)
        if self.states:
            arguments += (self._initial(others[-1]),)
        sequence, final = cells(*arguments)
        if self.packed:
            sequence, _ = pad_packed_sequence(sequence, cells.batch_first, total_length=STEPS)
        sequence = sequence if cells.batch_first else sequence.transpose(0, 1)
        finals = [f.transpose(0, 1) for f in (final if isinstance(final, tuple) else (final,))]
        return {"sequence": [sequence], "final": finals, "both": [sequence, *finals]}[self.use]

    def _initial(self, states: Tensor) -> Any:
        hidden = states.transpose(0, 1)
        if not isinstance(self.cells, nn.LSTM):
            return hidden
        return hidden[..., : self.cells.proj_size or 3].contiguous(), hidden.sin()


def inputs(packed: str, states: int) -> Any:
    def make() -> tuple[Tensor, ...]:
        found = [*randn(STEPS, 3)()]
        if packed:
            sizes = torch.arange(RECORDS) * 2 % STEPS + 1
            found.append(sizes.sort(descending=True).values if packed == "sorted" else sizes)
        return (*found, *randn(states, 3)()) if states else tuple(found)

    return make


def case(kind: str, packed: str = "", states: bool = False, **options: Any) -> Case:
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    text = [f"{key}={value}" for key, value in options.items()] + [packed] * bool(packed) + ["states"] * states
    return Case(
        "-".join([kind, *text]),
        lambda: Network(kind, packed=packed, states=states, **options),
        inputs(packed, count if states else 0),
    )


SHAPES: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "bias": False},
    {"num_layers": 2, "bidirectional": True},
]
INPUTS: list[dict[str, Any]] = [{}, {"packed": "sorted"}, {"packed": "unsorted", "states": True}]

CASES = [
    *(case(kind, **shape, **given) for kind, shape, given in itertools.product(KINDS, SHAPES, INPUTS)),
    *(case(kind, states=True, use=use, batch_first=True) for kind, use in itertools.product(KINDS, ("sequence", "final"))),
    case("gru", num_layers=3, bidirectional=True, batch_first=True, states=True),
    case("lstm-projected", packed="unsorted", batch_first=True, use="final"),
    case("lstm-projected", packed="unsorted", num_layers=2, use="sequence", states=True),
]  # fmt: skip

FROZEN = [
    Case("input-weights-frozen", frozen(lambda: Network("lstm"), "weight_ih_l0", "bias_ih_l0"), inputs("", 0)),
    Case(
        "state-weights-frozen",
        frozen(lambda: Network("gru", num_layers=2), "weight_hh_l0", "bias_hh_l1"),
        inputs("", 0),
    ),
    Case("projection-frozen", frozen(lambda: Network("lstm-projected"), "weight_hr_l0"), inputs("", 0)),
]


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("case", [*CASES, *FROZEN], ids=str)
def test_a_recurrent_layer_is_clipped_as_in_the_single_record_loop(case: Case, mode: str) -> None:
    each, bound = truth(case)
    found = step_by_hand(case, mode, max_grad_norm=bound)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_the_generic_rule_agrees(case: Case) -> None:
    """Also on packed sequences, one record at a time."""
    each, bound = truth(case)
    found = step_by_hand(case, "functorch", max_grad_norm=bound)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


class Encoder(nn.Module):
    """A time-first model: its inputs and outputs are [t, n, f]."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(3, 3, num_layers=2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0])


class Folded(nn.Module):
    """Sentences of a document as rows of the layer's own batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(3, 3, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x.flatten(0, 1))[1][0].transpose(0, 1).unflatten(0, (len(x), -1))


class Twice(nn.Module):
    """An encoder and a decoder that are one layer; the second starts where the first ended."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.cells(x)
        return self.cells(input=first.sin(), hx=last)[0]


def time_first() -> tuple[Tensor, ...]:
    return (torch.randn(STEPS, RECORDS, 3, dtype=torch.float64),)


COMPOSED = [
    Case("time-first-model", Encoder, time_first, dims=(1,), out_dim=1, batch_first=False),
    Case("folded-sentences", Folded, randn(2, STEPS, 3)),
    Case("twice", Twice, randn(STEPS, 3)),
]


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_recurrent_layers_within_models(case: Case, mode: str) -> None:
    each, bound = truth(case)
    found = step_by_hand(case, mode, max_grad_norm=bound)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


def seeded(model: nn.Module, *given: Tensor) -> Any:
    torch.manual_seed(5)
    return model(*given)


RANDOM = [
    Case(f"dropout-{kind}-{packed}", lambda kind=kind, packed=packed: Network(
        kind, packed=packed, num_layers=3, bidirectional=True, dropout=0.4), inputs(packed, 0), run=seeded)
    for kind in KINDS for packed in ("", "unsorted")
]  # fmt: skip


def gradients_in_one_batch(case: Case) -> list[Gradients]:
    """Each record's gradient with the numbers that the batch drew: records do not meet, so its own loss is enough."""
    model = case.model()
    parameters = dict(model.named_parameters())
    losses = case.losses(model, *case.batch())
    found = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    return [dict(zip(parameters, grads, strict=True)) for grads in found]


@pytest.mark.parametrize("mode", ["ghost", "bk"])
@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_dropout_between_layers_is_replayed(case: Case, mode: str) -> None:
    each = gradients_in_one_batch(case)
    bound = bound_that_clips_some(each)
    found = step_by_hand(case, mode, max_grad_norm=bound)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


class SortedByHand(nn.Module):
    """Brings the batch into another order before the layer: its rows are no longer the records."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(3, 3, batch_first=True)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        order = sizes.argsort(descending=True)
        packed = pack_padded_sequence(x[order], sizes[order], batch_first=True)
        return self.cells(packed)[1][0][order.argsort()]


class WrongLayout(nn.Module):
    """``batch_first`` forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0]


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("shape", [(STEPS, 3), (RECORDS, 3), (3,)], ids=str)
def test_a_batch_taken_for_a_sequence_is_refused(shape: tuple[int, ...], mode: str) -> None:
    with pytest.raises(GhostgradError, match="record"):
        step_by_hand(Case("wrong-layout", WrongLayout, randn(*shape)), mode, max_grad_norm=1.0)


@pytest.mark.parametrize("mode", MODES)
def test_rows_in_another_order_than_the_records_are_left_to_the_module_above(mode: str) -> None:
    case = Case("sorted-by-hand", SortedByHand, inputs("unsorted", 0))
    each, bound = truth(case)
    found = step_by_hand(case, mode, max_grad_norm=bound)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


def test_rows_that_change_places_only_after_the_first_batch_are_noticed() -> None:
    model = SortedByHand()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=None, sample_rate=0.5, expected_batch_size=3,
        noise_multiplier=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    x = torch.randn(3, STEPS, 3)
    model(x, torch.tensor([4, 3, 1])).square().sum(1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(PrivacyError, match="not ordered by record"):
        model(x, torch.tensor([3, 1, 4])).square().sum(1).mean().backward()
