"""Each form of use answers as its per-sample gradients would: norms, weighted sums, rows kept, chunks, joins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghostgrad.gradients import Convolution, Explicit, Joined, Lookup, Matmul, Use, convolution, join, matmul
from ghostgrad.gradients.convolution import Geometry

small = st.integers(1, 5)
seeds = st.integers(0, 2**20)
rooms = st.sampled_from([0, 20, 1 << 20])
quick = settings(max_examples=60, deadline=None)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@st.composite
def matmuls(draw: st.DrawFn, n: int | None = None, shape: tuple[int, int] | None = None) -> Matmul:
    torch.manual_seed(draw(seeds))
    n, groups, t = n or draw(small), 1 if shape else draw(st.integers(1, 3)), draw(st.integers(1, 8))
    o, i = shape or (draw(small), draw(small))
    return Matmul(randn(n, groups, t, i), randn(n, groups, t, o), torch.Size([groups * o, i]))


@st.composite
def lookups(draw: st.DrawFn, n: int | None = None, shape: tuple[int, int] | None = None) -> Lookup:
    torch.manual_seed(draw(seeds))
    n, t = n or draw(small), draw(st.integers(1, 8))
    rows, o = shape or (draw(small), draw(small))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return Lookup(torch.randint(rows, (n, t), dtype=dtype), randn(n, t, o), torch.Size([rows, o]))


@st.composite
def explicits(draw: st.DrawFn, n: int | None = None, shape: tuple[int, ...] | None = None) -> Explicit:
    torch.manual_seed(draw(seeds))
    shape = shape if shape is not None else tuple(draw(st.lists(small, max_size=3)))
    return Explicit(randn(n or draw(small), *shape))


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    torch.manual_seed(draw(seeds))
    dims, groups, fold, n = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(small)
    kernel, stride, padding, dilation, positions, surplus = (
        tuple(draw(st.integers(least, most)) for _ in range(dims))
        for least, most in ((1, 3), (1, 3), (0, 2), (1, 2), (1, 3), (0, 1))
    )
    sizes = [  # as many windows as positions, and sometimes some input left over
        max(1, (count - 1) * step + (size - 1) * gap + 1 - 2 * pad) + extra
        for count, step, size, gap, pad, extra in zip(
            positions, stride, kernel, dilation, padding, surplus, strict=True
        )
    ]
    counts = [
        (length + 2 * pad - gap * (size - 1) - 1) // step + 1
        for length, pad, gap, size, step in zip(sizes, padding, dilation, kernel, stride, strict=True)
    ]
    if draw(st.booleans()):  # fewer outputs than windows, as under a transposed convolution with output padding
        counts = [max(1, count - 1) for count in counts]
    i, o = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    shape = torch.Size([o, i // groups, *kernel])
    return Convolution(
        randn(n * fold, i, *sizes), randn(n * fold, o, *counts), shape, Geometry(stride, padding, dilation, groups), n
    )


@st.composite
def mixtures(draw: st.DrawFn) -> list[Use]:
    """Several uses of one weight, in any forms."""
    n, shape = draw(small), (draw(small), draw(small))
    forms = [matmuls(n=n, shape=shape), lookups(n=n, shape=shape), explicits(n=n, shape=shape)]
    return [draw(form) for form in draw(st.lists(st.sampled_from(forms), min_size=1, max_size=4))]


def in_words(use: Use) -> Tensor:
    """The per-sample gradients, from the definition of each form in loops."""
    if isinstance(use, Matmul):
        found = [
            torch.stack([dy.T @ x for dy, x in zip(use.dy[n], use.x[n], strict=True)]) for n in range(use.n)
        ]  # one matrix product for each block of the weight
        return torch.stack(found).reshape(use.n, *use.shape)
    if isinstance(use, Lookup):
        grads = torch.zeros(use.n, *use.shape, dtype=torch.float64)
        for n in range(use.n):
            for t, row in enumerate(use.ids[n].tolist()):
                grads[n, row] += use.dy[n, t]
        return grads
    return use.grad_samples()


def convolution_in_words(use: Convolution) -> Tensor:
    """The gradient of each record's images alone, through plain autograd."""
    geometry, dims = use.geometry, len(use.shape) - 2
    function = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[dims - 1]
    fold = len(use.x) // use.n
    found = []
    for n in range(use.n):
        weight = torch.zeros(use.shape, dtype=torch.float64, requires_grad=True)
        images = slice(n * fold, (n + 1) * fold)
        y = function(use.x[images], weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        for dim, count in enumerate(use.dy.shape[2:], start=2):
            y = y.narrow(dim, 0, count)
        found.append(torch.autograd.grad(y, weight, use.dy[images])[0])
    return torch.stack(found)


def assert_answers(use: Use, grads: Tensor) -> None:
    """Every answer of a use against per-sample gradients [n, *p]."""
    n, elements = len(grads), math.prod(grads.shape[1:])
    flat = grads.reshape(n, elements)
    factors = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    assert use.n == n
    assert use.shape == grads.shape[1:]
    torch.testing.assert_close(use.grad_samples(), grads, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(use.sq_norms(), flat.square().sum(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(use.weighted_sum(factors), (factors @ flat).reshape(use.shape), rtol=1e-9, atol=1e-9)
    assert (use.reach() >= flat.norm(dim=1) * (1 - 1e-9)).all()
    last = torch.tensor([n - 1, 0])
    torch.testing.assert_close(use.only(last).grad_samples(), grads[last], rtol=1e-9, atol=1e-10)


@quick
@given(st.one_of(matmuls(), lookups(), explicits()), rooms)
def test_a_use_answers_as_its_definition(use, room):
    assert_answers(use, in_words(use))
    assert_answers(use.compact(room), in_words(use))


@quick
@given(convolutions(), rooms)
def test_a_convolution_answers_as_autograd_for_each_record_alone(use, room):
    grads = convolution_in_words(use)
    assert_answers(use, grads)
    assert_answers(use.as_matmul(), grads)
    assert_answers(use.compact(room), grads)


@quick
@given(mixtures(), rooms)
def test_several_uses_of_a_weight_add_up_before_they_are_measured(uses, room):
    grads = torch.stack([in_words(use) for use in uses]).sum(0)
    assert_answers(join(uses), grads)
    assert_answers(join([use.compact(room) for use in uses]), grads)
    assert_answers(join([join(uses[:1]), join(uses)]), grads + in_words(uses[0]))


@quick
@given(convolutions(), seeds)
def test_a_convolution_joins_with_others(use, seed):
    torch.manual_seed(seed)
    other = Explicit(randn(use.n, *use.shape))
    grads = convolution_in_words(use)
    assert_answers(join([use, other, use]), 2 * grads + other.grad_samples())


@pytest.mark.parametrize("elements", [1, 7, 40])
@settings(max_examples=25, deadline=None)
@given(use=st.one_of(matmuls(), convolutions()))
def test_answers_do_not_depend_on_the_size_of_chunks(elements, use):
    grads = convolution_in_words(use) if isinstance(use, Convolution) else in_words(use)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "_CHUNK_ELEMENTS", elements)
        patch.setattr(convolution, "_CHUNK_ELEMENTS", elements)
        assert_answers(use, grads)
        if isinstance(use, Matmul):
            torch.testing.assert_close(use._gram_norms()[0], use._chunked_norms(), rtol=1e-9, atol=1e-9)


@quick
@given(
    st.one_of(matmuls(), lookups(), explicits(), convolutions()),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    seeds,
)
def test_rows_that_are_not_kept_leave_nothing_behind(use, poison, seed):
    torch.manual_seed(seed)
    mask = torch.rand(use.n) < 0.5
    grads = torch.where(mask.view(-1, *[1] * len(use.shape)), use.grad_samples(), 0.0)
    for name in ("x", "dy", "_grads"):
        if hasattr(use, name):
            spoiled = getattr(use, name).clone()
            spoiled[~mask.repeat_interleave(len(spoiled) // use.n)] = poison
            setattr(use, name, spoiled)
    assert_answers(use.keep_rows(mask), grads)
    assert_answers(join([use, use]).keep_rows(mask), 2 * grads)


@quick
@given(st.one_of(matmuls(), lookups(), explicits(), convolutions()), st.sampled_from([math.nan, math.inf]))
def test_a_spoiled_record_has_a_norm_that_is_not_finite_and_others_keep_theirs(use, poison):
    before = use.sq_norms()
    for name in ("dy", "_grads"):
        if hasattr(use, name):
            setattr(use, name, getattr(use, name).clone())
            getattr(use, name)[: len(getattr(use, name)) // use.n] = poison
    if isinstance(use, Convolution):
        use.x = use.x + 1  # a window of zeros would hide infinity as NaN, which is as good
    after = use.sq_norms()
    assert not after[0].isfinite()
    if not isinstance(use, Convolution):
        torch.testing.assert_close(after[1:], before[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_operands_are_answered_in_single_precision(dtype):
    torch.manual_seed(0)
    x, dy = torch.randn(3, 1, 50, 4).to(dtype), torch.randn(3, 1, 50, 4).to(dtype)
    narrow, exact = Matmul(x, dy, torch.Size([4, 4])), Matmul(x.double(), dy.double(), torch.Size([4, 4]))
    for name in ("grad_samples", "sq_norms"):
        assert getattr(narrow, name)().dtype == torch.float32
        torch.testing.assert_close(getattr(narrow, name)().double(), getattr(exact, name)(), rtol=1e-5, atol=1e-4)


def test_no_records_are_answered_with_nothing():
    use = Matmul(randn(0, 1, 3, 2), randn(0, 1, 3, 4), torch.Size([4, 2]))
    assert use.sq_norms().shape == (0,)
    assert use.weighted_sum(randn(0)).abs().sum() == 0


def test_parts_of_one_form_become_one_part():
    torch.manual_seed(0)
    shape = torch.Size([4, 2])
    use = Matmul(randn(3, 1, 2, 2), randn(3, 1, 2, 4), shape)
    table = Lookup(torch.randint(4, (3, 5)), randn(3, 5, 2), shape)
    joined = join([use, table, use, table])
    assert isinstance(joined, Joined)
    assert [type(part) for part in joined.parts] == [Matmul, Lookup]
    assert joined.route == "gram + grouped ids"


@quick
@given(convolutions(), rooms)
def test_a_convolution_in_single_precision_answers_as_in_double(use, room):
    """In single precision the records are the groups of one convolution, and nothing is unfolded."""
    single = Convolution(use.x.float(), use.dy.float(), use.shape, use.geometry, use.n)
    grads, factors = convolution_in_words(use), torch.linspace(0.0, 1.0, use.n)
    for form in (single, single.compact(room), single.keep_rows(torch.ones(use.n, dtype=torch.bool))):
        torch.testing.assert_close(form.grad_samples().double(), grads, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(form.sq_norms().double(), grads.flatten(1).square().sum(1), rtol=1e-4, atol=1e-4)
        expected = torch.einsum("n,n...->...", factors.double(), grads)
        torch.testing.assert_close(form.weighted_sum(factors).double(), expected, rtol=1e-4, atol=1e-4)
