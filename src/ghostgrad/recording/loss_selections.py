"""Looks at single nodes of a loss: divisions by a counted tensor, selections over the batch, second dimensions of records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ghostgrad.errors import PrivacyError
from ghostgrad.recording.loss_graph import BOUNDARY, is_python_number, shapes
from ghostgrad.recording.scalers import is_scaled

_MEAN = 1
_RESHAPING = (
    "View",
    "Reshape",
    "Unsafe",
    "AsStrided",
    "Split",
    "Unflatten",
    "Select",
    "Slice",
    "Unbind",
    "Chunk",
    "Squeeze",
)
"""Operations that give the same elements other dimensions."""
_OPERANDS = {
    "AddcmulBackward0": ("_saved_tensor1", "_saved_tensor2"),
    "AddcdivBackward0": ("_saved_tensor1", "_saved_tensor2"),
    "LerpBackward1": ("_saved_weight",),
    "PowBackward1": ("_saved_exponent",),
}
"""Where other operations than products and quotients keep what they multiply elements by."""
_RANKING = frozenset(
    {
        "Topk", "Sort", "Kthvalue", "Max", "Min", "Amax", "Amin", "Aminmax", "Mode", "Median", "Nanmedian", "Cumsum", "Cumprod",
        "Cummax", "Cummin", "Logcumsumexp",
    }
)  # fmt: skip


def check_nodes(nodes: Sequence[Any], boundaries: Sequence[Any], n: int, knowledge: Any) -> None:
    """Refuse what lets records weigh or select each other, one node at a time.

    Args:
        nodes: all nodes between the loss and the model.
        boundaries: those of the model's outputs.
        n: the records in the batch, at least 2.
        knowledge: what was declared and seen before (`LossKnowledge`).

    Raises:
        PrivacyError: saying what was found.
    """
    record_dim = 0 if boundaries[0].batch_first else 1
    for node in nodes:
        _check_divisor(node)
        _check_ranking(node, n, record_dim)
        if knowledge.reduction == "mean":
            _check_selection(node, n)
    _check_pairs(nodes, n, knowledge)


def _check_divisor(node: Any) -> None:
    """A division by one number that is a tensor: allowed only where it is the number of elements that were summed."""
    name = node.name()
    if name.startswith("NllLoss") and node._saved_reduction == _MEAN:
        _check_cross_entropy(node)
    if name == "CheckpointFunctionBackward":
        raise PrivacyError(
            "part of the loss runs in re-entrant checkpointing, which hides what it does with the records. Use "
            "checkpoint(..., use_reentrant=False), or compute the loss outside."
        )
    for attribute in _OPERANDS.get(name, ()):
        operand = getattr(node, attribute)
        if isinstance(operand, Tensor) and operand.numel() == 1 and not operand.requires_grad:
            _refuse_unless_number(operand)
    if name == "MulBackward0" and node._input_metadata[0].shape and not is_scaled(node):
        for constant in (node._saved_self, node._saved_other):
            if constant is not None and constant.numel() == 1 and not constant.requires_grad:
                _refuse_unless_number(constant)
    if name != "DivBackward0" or node._saved_other is None or node._saved_other.numel() != 1:
        return
    child = node.next_functions[0][0]
    summed = getattr(child, "_saved_self_sym_sizes", ()) if child is not None and child.name() == "SumBackward0" else ()
    if summed and float(node._saved_other) == math.prod(summed):
        return
    _refuse_unless_number(node._saved_other)


def _refuse_unless_number(operand: Tensor) -> None:
    if not is_python_number(operand):
        raise PrivacyError(
            "the loss is divided or multiplied by a tensor of one number, such as the number of counted tokens or the total "
            "weight in the batch: one record rescales the gradients of all others, and clipping does not bound that. Divide "
            "within each record, then take the mean over the records; give a constant as a Python number."
        )


def _check_cross_entropy(node: Any) -> None:
    if node._saved_weight is not None:
        raise PrivacyError(
            "the loss is a mean weighted by class: it divides by the total weight of the batch, so one record rescales the "
            "gradients of all others and clipping does not bound it. Use reduction='none' with the class weights and take "
            "the mean over the records, or loss_reduction='sum' with reduction='sum'."
        )
    if bool((node._saved_target == node._saved_ignore_index).any()):
        index = node._saved_ignore_index  # handed out as if it were unsigned
        index = index - 2**64 if index >= 2**63 else index
        raise PrivacyError(
            f"the loss is a mean over the targets that are not ignored (ignore_index={index}): it divides "
            f"by their number in the batch, so one record rescales the gradients of all others and clipping does not bound "
            f"it. Take reduction='none', the mean within each record, then the mean over the records."
        )


def _check_ranking(node: Any, n: int, record_dim: int) -> None:
    """Which elements are the largest of the batch depends on all of it (hard-example mining, order statistics)."""
    if node.name().rstrip("0123456789").removesuffix("Backward") not in _RANKING:
        return
    if _runs_over_records(node, n, record_dim):
        raise PrivacyError(
            "the loss ranks or accumulates elements over the batch (top-k, sort, median, largest, running sum): which records "
            "count depends on the others, and clipping a record's own gradient does not bound that. Do it within each record, or "
            "weigh records by a fixed function of their own loss."
        )


def _runs_over_records(node: Any, n: int, record_dim: int) -> bool:
    whole = getattr(node, "_saved_self", None)
    sizes = getattr(node, "_saved_self_sym_sizes", None) or (
        whole.shape if isinstance(whole, Tensor) else shapes(node)[0]
    )
    found = getattr(node, "_saved_dim", ())
    dims = found if isinstance(found, tuple) else (found,)
    if not dims:  # over everything
        return math.prod(sizes) % n == 0
    record_dim = min(record_dim, len(sizes) - 1)
    over_records = any(dim % 2**64 in (record_dim, 2**64 + record_dim - len(sizes)) for dim in dims)
    return over_records and sizes[record_dim] % n == 0


def _check_selection(node: Any, n: int) -> None:
    """A mean over what was selected divides by how many were."""
    name = node.name()
    indices = getattr(node, "_saved_indices", None) if name.startswith("IndexBackward") else None
    by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices or ())
    rows = node._input_metadata[0].shape[:1]
    ragged = name.startswith(("IndexBackward", "IndexSelect", "Take", "Gather")) and rows and rows[0] % n != 0
    if by_mask or ragged or _reorders(node, n, indices) or name.startswith("MaskedSelect"):
        raise PrivacyError(
            "the loss is a mean over selected elements: it divides by how many were selected in the batch, or counts some "
            "records for others, so one record rescales the gradients of all others. Multiply by the mask, take the mean within "
            "each record, then the mean over the records."
        )


def _reorders(node: Any, n: int, indices: Any) -> bool:
    """Whether elements are picked from the dimension of records other than record by record."""
    if node.name().startswith("IndexSelect") and node._saved_dim == 0:
        index = node._saved_index
    elif indices and indices[0] is not None and indices[0].dim() == 1:
        index = indices[0]
    else:
        return False
    size = node._saved_self_sym_sizes[0]
    if size % n or len(index) % n or not len(index):
        return False
    whose = (index % size).div(size // n, rounding_mode="floor")
    return not torch.equal(whose, torch.arange(n, device=index.device).repeat_interleave(len(index) // n))


def _check_pairs(nodes: Sequence[Any], n: int, knowledge: Any) -> None:
    """An operation that adds a second dimension of n sets each record against each other one.

    So does a [n, 1] output less an [n] target, and a product with the (detached) embeddings of the batch. A size that was not
    n in an earlier batch is n by chance.
    """
    if not any(_pairs(node, n) for node in nodes):
        knowledge.unpaired_sizes.add(n)
    elif not knowledge.unpaired_sizes - {n}:
        raise PrivacyError(
            "the loss has a tensor with two dimensions of as many entries as the batch has records, so each record is set "
            "against each other one: a target of another shape than the output ([n] against [n, 1] is broadcast to [n, n]), or "
            "in-batch negatives. Clipping a record's own gradient does not bound that. Give outputs and targets one shape, and "
            "compute each record's loss from that record alone; if the sizes are equal by chance, take another batch size."
        )


def _pairs(node: Any, n: int) -> bool:
    if node.name() == BOUNDARY or node.name().startswith(_RESHAPING):
        return False
    before = [
        shape for child, place in node.next_functions if child is not None for shape in shapes(child)[place : place + 1]
    ]
    most = max((list(shape).count(n) for shape in before), default=n)
    return any(list(shape).count(n) > max(1, most) for shape in shapes(node))
