"""What is not built: one-hots of a table, per-sample gradients of a wide layer, the Gram of a long sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghostgrad.gradients import Lookup, Matmul, convolution, join, matmul
from ghostgrad.gradients.convolution import Convolution, Geometry


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def test_a_table_of_a_million_rows_is_never_built_for_each_record():
    rows, n, t, o = 1_000_000, 16, 10, 4
    use = Lookup(torch.randint(rows, (n, t)), torch.randn(n, t, o), torch.Size([rows, o]))
    with LargestTensor() as seen:
        use.sq_norms()
    assert seen.elements <= n * t * o
    with LargestTensor() as seen:
        use.keep_rows(torch.ones(n, dtype=torch.bool)).weighted_sum(torch.ones(n))
    assert seen.elements == rows * o  # the sum itself


def test_a_tied_table_and_head_are_measured_without_one_hots():
    rows, n, t, o = 20_000, 4, 8, 32
    shape = torch.Size([rows, o])
    head = Matmul(torch.randn(n, 1, t, o), torch.randn(n, 1, t, rows), shape)
    table = Lookup(torch.randint(rows, (n, t)), torch.randn(n, t, o), shape)
    with LargestTensor() as seen:
        join([head, table]).sq_norms()
    assert seen.elements <= n * t * rows  # the head's own gradient; one per-sample gradient is o / t times as large


@pytest.mark.parametrize("t", [64, 256, 1024])
def test_a_gram_is_flat_in_the_length_of_the_sequence(monkeypatch, t):
    monkeypatch.setattr(matmul, "_CHUNK_ELEMENTS", 1 << 14)
    use = Matmul(torch.randn(2, 1, t, 4), torch.randn(2, 1, t, 4), torch.Size([4, 4]))
    with LargestTensor() as seen:
        use._gram_norms()
    assert seen.elements <= max(1 << 14, 2 * t * 4)


def test_materialised_norms_hold_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(matmul, "_CHUNK_ELEMENTS", 1 << 10)
    use = Matmul(torch.randn(64, 1, 8, 16), torch.randn(64, 1, 8, 16), torch.Size([16, 16]))
    with LargestTensor() as seen:
        use._chunked_norms()
    assert seen.elements <= use.x.numel()  # four records' gradients are less than the input


def test_a_convolution_unfolds_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(convolution, "_CHUNK_ELEMENTS", 1 << 12)
    x, dy = torch.randn(32, 3, 16, 16), torch.randn(32, 4, 16, 16)
    use = Convolution(x, dy, torch.Size([4, 3, 3, 3]), Geometry((1, 1), (1, 1), (1, 1), 1), 32)
    with LargestTensor() as seen:
        use.sq_norms()
    assert seen.elements <= max(x.numel(), dy.numel()), "all windows together would be nine times the input"
