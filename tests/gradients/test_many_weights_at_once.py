"""Small uses of one kind are worked out together, and each gets what it gets alone."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ghostgrad.gradients import Explicit, Lookup, Matmul, Use, all_sq_norms, all_weighted_sums, together


def use_of(kind: str, n: int, dtype: torch.dtype) -> Use:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    return {
        "bias": lambda: Explicit(randn(n, 3)),
        "scalar": lambda: Explicit(randn(n)),
        "layer": lambda: Matmul(randn(n, 1, 1, 4), randn(n, 1, 1, 3), torch.Size([3, 4])),
        "over positions": lambda: Matmul(randn(n, 1, 5, 4), randn(n, 1, 5, 3), torch.Size([3, 4])),
        "gram": lambda: Matmul(randn(n, 1, 2, 30), randn(n, 1, 2, 30), torch.Size([30, 30])),
        "in groups": lambda: Matmul(randn(n, 2, 3, 2), randn(n, 2, 3, 2), torch.Size([4, 2])),
        "lookup": lambda: Lookup(torch.randint(6, (n, 4)), randn(n, 4, 2), torch.Size([6, 2])),
    }[kind]()


KINDS = ["bias", "scalar", "layer", "over positions", "gram", "in groups", "lookup"]


@settings(max_examples=80, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), min_size=1, max_size=30),
    n=st.integers(1, 4),
    small=st.sampled_from([0, 30, 1 << 14]),
    most=st.sampled_from([1, 100, 1 << 18]),
    seed=st.integers(0, 2**20),
)
def test_together_each_gets_what_it_gets_alone(
    kinds: list[tuple[str, bool]], n: int, small: int, most: int, seed: int
) -> None:
    torch.manual_seed(seed)
    uses = {
        place: use_of(kind, n, torch.float64 if double else torch.float32) for place, (kind, double) in enumerate(kinds)
    }
    factors = {place: torch.rand(n, dtype=use.operands[-1].dtype) for place, use in uses.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "_SMALL", small)
        patch.setattr(together, "_MOST", most)
        norms = all_sq_norms(uses)
        sums = dict(all_weighted_sums(dict(uses), factors))
    assert set(norms) == set(sums) == set(uses)
    for place, use in uses.items():
        torch.testing.assert_close(norms[place], use.sq_norms())
        torch.testing.assert_close(sums[place], use.weighted_sum(factors[place]))
        assert sums[place].is_contiguous()


def test_a_record_whose_terms_cancel_keeps_its_norm() -> None:
    """The exact way is taken for the records that need it, whichever weight they are of."""
    x, dy = torch.randn(2, 1, 1, 40), torch.randn(2, 1, 1, 40)
    cancelled = Matmul(torch.cat([x, x], 2), torch.cat([dy, dy * (-1 + 1e-4)], 2), torch.Size([40, 40]))
    other = Matmul(torch.randn(2, 1, 2, 40), torch.randn(2, 1, 2, 40), torch.Size([40, 40]))
    assert cancelled.route == "gram"
    exact = cancelled.grad_samples().square().flatten(1).sum(1)
    torch.testing.assert_close(all_sq_norms({"other": other, "cancelled": cancelled})["cancelled"], exact)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["bias", "layer", "over positions", "gram"])
def test_a_hundred_weights_take_as_many_operations_as_two(kind: str) -> None:
    counts = []
    for many in (2, 100):
        uses = {place: use_of(kind, 4, torch.float32) for place in range(many)}
        factors = {place: torch.rand(4) for place in uses}
        with Operations() as operations:
            all_sq_norms(uses)
            list(all_weighted_sums(uses, factors))
        counts.append(operations.count)
    assert counts[0] == counts[1]


class Tripled(Matmul):
    """A use of somebody's own, which answers otherwise than its operands would."""

    def grad_samples(self) -> Tensor:
        return 3 * super().grad_samples()

    def sq_norms(self) -> Tensor:
        return 9 * super().sq_norms()

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return 3 * super().weighted_sum(factors)


def test_forms_of_somebodys_own_answer_for_themselves_alone() -> None:
    operands = [(torch.randn(2, 1, 1, 4), torch.randn(2, 1, 1, 4), torch.Size([4, 4])) for _ in range(4)]
    uses: dict[int, Use] = {i: (Tripled if i % 2 else Matmul)(*each) for i, each in enumerate(operands)}
    factors = {place: torch.rand(2) for place in uses}
    norms, sums = all_sq_norms(uses), dict(all_weighted_sums(dict(uses), factors))
    for place, use in uses.items():
        torch.testing.assert_close(norms[place], use.sq_norms())
        torch.testing.assert_close(sums[place], use.weighted_sum(factors[place]))


def test_behind_a_sum_there_is_no_other() -> None:
    """Its memory is published with a gradient (`torch.save` writes all of it), with noise or, of a frozen neighbour, without."""
    uses = {place: use_of("layer", 4, torch.float32) for place in range(3)}
    for _, found in all_weighted_sums(uses, {place: torch.rand(4) for place in uses}):
        assert found.untyped_storage().nbytes() == found.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_apart_each_has_the_bits_that_it_has_alone(kind: str) -> None:
    uses = {place: use_of(kind, 4, torch.float32) for place in range(3)}
    factors = {place: torch.rand(4) for place in uses}
    norms, sums = all_sq_norms(uses, apart=True), dict(all_weighted_sums(dict(uses), factors, apart=True))
    for place, use in uses.items():
        assert torch.equal(norms[place], use.sq_norms())
        assert torch.equal(sums[place], use.weighted_sum(factors[place]))


def test_what_a_use_holds_is_let_go_when_it_was_added_up() -> None:
    uses: dict[int, Use] = {place: Explicit(torch.randn(4, together._SMALL)) for place in range(3)}
    held = [weakref.ref(use.operands[0]) for use in uses.values()]
    sums = all_weighted_sums(uses, {place: torch.rand(4) for place in uses})
    for done in range(1, 3):
        next(sums)
        gc.collect()
        assert [reference() is None for reference in held[: done - 1]] == [True] * (done - 1)
        assert held[-1]() is not None
    assert len(uses) == 1
