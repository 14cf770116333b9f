"""The batch dimension of what goes into and comes out of the root module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.tree import map_numbers, map_tensors, tensors


def dim_of_records(tensor: Tensor, *, batch_first: bool) -> int:
    """Which dimension of an argument of the root is the batch's, if it has one: lengths beside time-first data have only that."""
    return 0 if batch_first or tensor.dim() == 1 else 1


def holds_records(tensor: Tensor, n: int, *, batch_first: bool) -> bool:
    """Whether an argument of the root holds the ``n`` records."""
    dim = dim_of_records(tensor, batch_first=batch_first)
    return tensor.dim() > dim and tensor.shape[dim] == n


def count_records(args: Any, kwargs: Any, delivered: int | None, *, batch_first: bool) -> int:
    """The number of records in a call of the root: the batch dimension of its first tensor that has one.

    Where another tensor has as many rows as the loader ``delivered`` records, these count: the first may be flat (the ids of
    ragged bags before their offsets).

    Raises:
        UnsupportedModuleError: no tensor with a batch dimension; a packed sequence, or a list of single records.
    """
    dim = 0 if batch_first else 1
    arguments = [argument for argument in (*args, *kwargs.values()) if tensors(argument)]
    if any(isinstance(argument, PackedSequence) for argument in arguments):
        raise UnsupportedModuleError(
            "the module was called with a PackedSequence, whose rows are positions, those of all records mixed. Pass the padded "
            "batch and the lengths to the module, and call pack_padded_sequence in its forward."
        )
    sizes = [tensor.shape[dim] for tensor in tensors(arguments) if tensor.dim() > dim]
    if delivered in sizes:
        return delivered
    if not sizes:
        raise UnsupportedModuleError(
            f"the module was called without a tensor that has a batch dimension (dimension {dim}), so the number of records is "
            f"not known. Pass the batch to the module's forward as tensors."
        )
    first = arguments[0]
    # A batch in several parts (of images at several sizes, say) has the same number of rows in each.
    if isinstance(first, (list, tuple)) and len({part.shape[dim : dim + 1] for part in tensors(first)}) > 1:
        raise UnsupportedModuleError(
            f"the module was called with a {type(first).__name__} of tensors of different numbers of rows, so none is the batch. "
            f"If they are single records, pad them to one tensor (torch.nn.utils.rnn.pad_sequence in the collate_fn) and "
            f"pass lengths or a mask beside it."
        )
    return sizes[0]


def one_row(tree: Any, *, batch_first: bool, length: int = 0) -> Any:
    """A batch of no records made into one row of zeros, so that any model can run on it.

    Args:
        length: what stands in whole numbers of one dimension, and in lists: functions that pack sequences take no 0.
    """

    def fill(tensor: Tensor) -> Tensor:
        if not holds_records(tensor, 0, batch_first=batch_first):
            return tensor
        shape = list(tensor.shape)
        shape[dim_of_records(tensor, batch_first=batch_first)] = 1
        whole = tensor.dim() == 1 and not tensor.is_floating_point() and tensor.dtype is not torch.bool
        return torch.full(shape, length if whole else 0, dtype=tensor.dtype, device=tensor.device)

    return map_tensors(fill, map_numbers(lambda _: [length], tree, 0) if length else tree)


def no_rows(tree: Any, *, batch_first: bool) -> Any:
    """Outputs for that one row, cut to no rows and off their graph; what has no batch dimension becomes zero."""

    def cut(tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return torch.zeros_like(tensor)
        dim = dim_of_records(tensor, batch_first=batch_first)
        if dim and tensor.shape[0] == 1 and (tensor.shape[1] != 1 or tensor.dim() == 2):
            dim = 0  # of time-first data that was pooled
        return tensor.detach().narrow(dim, 0, 0)

    return map_tensors(cut, tree)


def some_of(tree: Any, n: int, kept: range, *, batch_first: bool) -> Any:
    """The call's arguments with some of their ``n`` records, one after the other."""
    return _chosen(tree, n, list(kept), batch_first=batch_first)


def with_first_replaced(tree: Any, n: int, *, batch_first: bool) -> Any:
    """The call's arguments with the second record in the place of the first too: as many records, one of them another."""
    return _chosen(tree, n, [1, *range(1, n)], batch_first=batch_first)


def with_one_more(tree: Any, n: int, *, batch_first: bool) -> Any:
    """The call's arguments with the first of their ``n`` records once more."""
    return _chosen(tree, n, [*range(n), 0], batch_first=batch_first)


def _chosen(tree: Any, n: int, records: list[int], *, batch_first: bool) -> Any:
    """The call's arguments with these of their records; lists of numbers, such as lengths, hold them as tensors do."""

    def choose(tensor: Tensor) -> Tensor:
        if not holds_records(tensor, n, batch_first=batch_first):
            return tensor
        dim = dim_of_records(tensor, batch_first=batch_first)
        return tensor.index_select(dim, torch.tensor(records, device=tensor.device))

    return map_tensors(choose, map_numbers(lambda numbers: [numbers[i] for i in records], tree, n))


def rows_of(args: Any, kwargs: Any, n: int, *, batch_first: bool) -> Tensor | None:
    """The first tensor of a call that holds the records, with them first; None if there is none."""
    for tensor in tensors((args, kwargs)):
        if holds_records(tensor, n, batch_first=batch_first):
            return tensor.detach().movedim(dim_of_records(tensor, batch_first=batch_first), 0)
    return None


def displaced(first: Tensor, second: Tensor) -> bool:
    """Whether one tensor holds the rows of the other in other places: all of them, or in at least half of its own."""
    if first.shape != second.shape or first.dtype != second.dtype or torch.equal(first, second):
        return False
    a, b = (tensor.reshape(len(tensor), -1).double().sum(1) for tensor in (first, second))
    elsewhere = torch.isin(b, a) & (a != b)
    reordered = torch.equal(a.sort().values, b.sort().values) and bool(elsewhere.any())
    return reordered or 2 * int(elsewhere.sum()) >= len(b)
