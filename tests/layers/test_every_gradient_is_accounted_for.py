"""What a module computes need not leave it in real tensors that it returns: the step is that of the loop over records still.

A probe sits behind the real tensors that a module returns. What leaves it in another way passes the probe by: on the first
batch the records' gradients are held to the batch's, and where they do not add up the module above answers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_case import RECORDS, Case, randn
from private_step import MODES, step_by_hand, truth
from single_record import assert_same_gradients, expected_gradient
from torch import Tensor, nn

from ghostgrad import UnsupportedModuleError
from ghostgrad.gradients import Explicit
from ghostgrad.layers import Call, Rows
from ghostgrad.recording.totals import Totals


class Spectral(nn.Module):
    """Frequencies times a complex weight that is kept as its real view: complex in, complex out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, frequencies: Tensor) -> Tensor:
        return frequencies * torch.view_as_complex(self.weight)


class Fourier(nn.Module):
    """A layer of a Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spectral, self.last = nn.Linear(4, 4), Spectral(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.irfft(self.spectral(torch.fft.rfft(self.first(x))), n=4))


class Values:
    """Something that nobody can look into."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Scale(nn.Module):
    """Hands on what it computes as ``way`` says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight, self.way = nn.Parameter(torch.randn(4)), way
        self.kept: Tensor | None = None

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Any:
        hidden = torch.tanh(x * self.weight)
        if self.way == "object":
            return Values(hidden)
        if self.way == "part in an object":
            return hidden, Values(hidden.sin())
        if self.way == "distribution":
            return torch.distributions.Normal(hidden, self.weight.exp(), validate_args=False)
        if self.way == "argument":
            cache["hidden"] = hidden
        else:
            self.kept = hidden
        return hidden


class Model(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(4, 4), Scale(way), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        cache: dict[str, Tensor] = {}
        out = self.scale(self.first(x), cache)
        if isinstance(out, Values):
            return self.last(out.hidden)
        if isinstance(out, tuple):
            return self.last(out[0] + out[1].hidden)
        if isinstance(out, torch.distributions.Distribution):
            return self.last(out.log_prob(x))
        return self.last(out + (cache["hidden"] if self.scale.way == "argument" else self.scale.kept).exp())


class TwoNames(nn.Module):
    """One parameter under two names of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gain = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.shift = self.gain

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) * self.gain + self.shift.sin()


CASES = [
    Case("complex", Fourier, randn(4)),
    *(
        Case(way, lambda way=way: Model(way), randn(4))
        for way in ("object", "part in an object", "distribution", "argument", "on itself")
    ),
    Case("two-names-of-one-parameter", TwoNames, randn(4)),
]


@pytest.mark.parametrize("parts", [(RECORDS,), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_leaves_a_module_another_way_is_clipped_with_the_rest(
    case: Case, mode: str, parts: tuple[int, ...]
) -> None:
    each, bound = truth(case)
    found = step_by_hand(case, mode, max_grad_norm=bound, parts=parts)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


def test_a_complex_output_of_the_model_is_refused_with_the_way_out() -> None:
    class Frequencies(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.fft.fft(super().forward(input))

    case = Case("frequencies", lambda: Frequencies(4, 4), randn(4), run=lambda model, x: model(x).abs())
    with pytest.raises(UnsupportedModuleError, match="view_as_real"):
        step_by_hand(case, "bk", max_grad_norm=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("share", "missing"), [(1.0, False), (1.0 + 1e-9, False), (0.0, True), (0.9, None)], ids=str)
def test_a_part_that_is_missing_is_told_from_round_off(dtype: torch.dtype, share: float, missing: bool | None) -> None:
    """A tenth that is missing shows in single precision and not in half."""
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    each = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    totals = Totals()
    call = Call(nn.Linear(1, 1), "layer", {"weight": p}, (), {}, (each,), None, Rows(4, True, "layer"))
    totals.add(call, {"weight": Explicit(share * each)})
    found = bool(totals.missing({p: each.sum(0)}))
    assert found == (dtype != torch.bfloat16 if missing is None else missing)


def test_a_gradient_of_nothing_but_round_off_is_not_looked_for() -> None:
    large, zero = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    totals = Totals()
    call = Call(nn.Linear(1, 1), "layer", {"weight": large}, (), {}, (torch.ones(2, 1),), None, Rows(2, True, "layer"))
    totals.add(call, {"weight": Explicit(torch.ones(2, 1))})
    assert totals.missing({large: torch.tensor([2.0]), zero: torch.tensor([1e-7])}) == []
    assert totals.missing({large: torch.tensor([2.0]), zero: torch.tensor([1e-3])}) == [zero]
