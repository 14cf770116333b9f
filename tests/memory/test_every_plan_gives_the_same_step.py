"""The planner under drawn shapes, costs, block sizes and budgets: whatever way it takes, the step is the textbook's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_case import RECORDS, Case, randn
from private_step import step_by_hand
from single_record import (
    assert_same_gradients,
    bound_that_clips_some,
    expected_gradient,
    gradients_of_each_record,
)
from torch import Tensor, nn

from ghostgrad.clipping import clipper
from ghostgrad.gradients import convolution, cost, matmul

Draw = st.DrawFn
small = st.integers(2, 6)
ways: set[str] = set()
"""Every way that was taken."""


class Stack(nn.Module):
    """Some layers over [n, t, features] or [n, channels, *places], one of them called twice where its shape allows."""

    def __init__(self, layers: list[nn.Module], twice: bool) -> None:
        super().__init__()
        self.layers, self.twice = nn.ModuleList(layers), twice

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = torch.tanh(layer(x))
            x = torch.tanh(layer(y)) if self.twice and y.shape == x.shape else y
        return x


@st.composite
def over_rows(draw: Draw) -> Case:
    """Linear layers and norms, over one row a record or many."""
    t, widths = draw(st.sampled_from([None, 1, 2, 5, 70])), draw(st.lists(small, min_size=2, max_size=4))
    twice, bias, norm = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())

    def build() -> nn.Module:
        layers: list[nn.Module] = [
            nn.Linear(i, o, bias=bias) for i, o in zip(widths, [*widths[1:], widths[-1]], strict=True)
        ]
        return Stack([*layers, nn.LayerNorm(widths[-1])] if norm else layers, twice)

    shape = (widths[0],) if t is None else (t, widths[0])
    return Case(f"rows {t} {widths} {twice} {bias} {norm}", build, randn(*shape))


@st.composite
def over_places(draw: Draw) -> Case:
    """Convolutions of one or two dimensions, strided, dilated and in groups."""
    dims, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding, size, twice = draw(st.integers(0, 2)), draw(st.integers(5, 9)), draw(st.booleans())
    kind = nn.Conv1d if dims == 1 else nn.Conv2d

    def build() -> nn.Module:
        first = kind(channels, out, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
        return Stack([first, kind(out, out, 1)], twice)

    name = f"places {dims} {groups} {channels} {out} {kernel} {stride} {dilation} {padding} {size} {twice}"
    return Case(name, build, randn(channels, *[size] * dims))


@st.composite
def over_ids(draw: Draw) -> Case:
    """An embedding, tied to the layer behind it or not."""
    rows, width, t = draw(st.integers(2, 30)), draw(small), draw(st.integers(1, 9))
    tied = draw(st.booleans())

    def build() -> nn.Module:
        head = nn.Linear(width, rows, bias=False)
        words = nn.Embedding(rows, width)
        if tied:
            head.weight = words.weight
        return nn.Sequential(words, nn.Tanh(), head)

    return Case(f"ids {rows} {width} {t} {tied}", build, lambda: (torch.randint(rows, (RECORDS, t)),))


@contextmanager
def planned(store: int, unfold: int, room: int, block: int, chunk: int) -> Iterator[None]:
    """Other costs and block sizes than the measured ones. What each use was asked for is noted."""
    with ExitStack() as stack:
        for where, name, value in (
            (cost, "STORE", store), (cost, "UNFOLD", unfold), (clipper, "_ROOM", room), (matmul, "_GRAM_BLOCK", block),
            (matmul, "_CHUNK_ELEMENTS", chunk), (convolution, "_CHUNK_ELEMENTS", chunk),
        ):  # fmt: skip
            stack.enter_context(patch.object(where, name, value))
        measure = clipper.Clipper.measure

        def noted(self: clipper.Clipper, *args: object, **options: object) -> tuple[str, str]:
            way = measure(self, *args, **options)  # type: ignore[arg-type]
            ways.update(" / ".join(way).split(" + "))
            return way

        stack.enter_context(patch.object(clipper.Clipper, "measure", noted))
        yield


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    case=st.one_of(over_rows(), over_places(), over_ids()),
    mode=st.sampled_from(["bk", "bk", "ghost", "hooks"]),
    budget=st.sampled_from([None, 0, 300, 1500, 10_000]),
    cut=st.integers(0, RECORDS - 1),
    loss_reduction=st.sampled_from(["mean", "sum"]),
    store=st.sampled_from([0, 30, 10**6]),
    unfold=st.sampled_from([0, 20, 10**6]),
    room=st.sampled_from([0, 50, 1 << 24]),
    block=st.sampled_from([1, 3, 64]),
    chunk=st.sampled_from([1, 40, 1 << 20]),
)
def test_a_drawn_plan(
    case: Case, mode: str, budget: int | None, cut: int, loss_reduction: str, store: int, unfold: int, room: int,
    block: int, chunk: int,
) -> None:  # fmt: skip
    each = gradients_of_each_record(case.model(), case.losses, case.batch(), case.batch_dims)
    bound = bound_that_clips_some(each)
    with planned(store, unfold, room, block, chunk):
        found = step_by_hand(
            case, mode, max_grad_norm=bound, parts=(cut, RECORDS - cut) if cut else (RECORDS,),
            loss_reduction=loss_reduction, max_memory=budget if mode == "bk" else None,
        )  # fmt: skip
    expected = expected_gradient(each, bound, expected_batch_size=RECORDS, loss_reduction=loss_reduction)
    assert_same_gradients(found, expected, relative=1e-9)


def test_every_way_was_among_them() -> None:
    test_a_drawn_plan()
    kept = {"norms", "inputs and output gradients", "per-sample gradients"}
    norms = {"outer product", "gram", "materialise", "grouped ids"}
    assert {f"{norm} / norms" for norm in norms} <= ways
    assert kept <= {way.split(" / ")[-1] for way in ways}
    assert norms <= {way.split(" / ")[0] for way in ways}
