"""Reads a loss as a sum of terms: constant x (mean or sum over the batch of something of each record)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostgrad.errors import PrivacyError
from ghostgrad.recording.scalers import is_scaled

_MEAN, _SUM = 1, 2
"""`at::Reduction` in the saved attributes of torch's loss nodes."""

_PASSING = (
    "Alias", "AsStrided", "Clone", "Contiguous", "Expand", "Reshape", "Select", "Slice", "Squeeze", "Stack", "Cat", "ToCopy",
    "Unsafe", "Unsqueeze", "View",
)  # fmt: skip
"""Nodes that do not change what a scalar is worth."""

_RELATIVE = 1e-6


class Term(NamedTuple):
    """``factor`` times the mean, or the sum, over the batch."""

    factor: float
    is_mean: bool


def check(root: Any, nodes: Sequence[Any], n: int, knowledge: Any) -> None:
    """Hold a loss to the declared reduction, with weights that are the same for every batch.

    Args:
        root: the node of the loss.
        nodes: all nodes from there to the model.
        n: the records in the batch.
        knowledge: what was declared and seen before.

    Raises:
        PrivacyError: saying which part is not a mean (sum) of the records' own losses.
    """
    for node in nodes:
        _check_divisor(node)
        if knowledge.reduction == "mean":
            _check_selection(node, n)
    try:
        terms = _Reader(set(nodes), n).terms(root, 1.0)
    except _NotUnderstood as unknown:
        if knowledge.taken_apart:
            return  # the criterion checks itself on values
        raise PrivacyError(
            f"the loss applies {unknown} to a number that is already taken over the batch, so how much a record counts "
            f"depends on the others. Apply it within each record and take the mean over the records last; or pass the loss as "
            f"criterion= to make_private, where it is taken apart and checked on values."
        ) from None
    for term in terms:
        _check_term(term, n, knowledge.reduction)
    if knowledge.reduction == "mean":
        _check_weights([term.factor * n for term in terms if not term.is_mean], knowledge)


# ---------------------------------------------------------------------- the scalar part: terms


class _NotUnderstood(Exception):  # noqa: N818 (internal)
    """An operation on a scalar that is not linear with constant weights."""


class _Reader:
    """Walks from the loss to where the batch was reduced, along nodes that lead to the model."""

    def __init__(self, leading: set[Any], n: int) -> None:
        self._leading, self._n = leading, n
        self._readers: dict[str, Callable[[Any, float], list[Term]]] = {
            "Add": self._sum,
            "Sub": self._sum,
            "Rsub": self._sum,
            "Neg": lambda node, factor: self._children(node, -factor),
            "Mul": self._product,
            "Div": self._quotient,
            "Mean": self._reduction,
            "Sum": self._reduction,
            "Dot": lambda node, factor: [Term(factor, is_mean=False)],
        }

    def terms(self, node: Any, factor: float) -> list[Term]:
        """The terms of the number that a node puts out."""
        name = node.name()
        if node not in self._leading or name == "BoundaryBackward":
            return []  # not about records; or a scalar output, which the recorder refuses
        reduction = getattr(node, "_saved_reduction", None)
        if reduction in (_MEAN, _SUM):
            return [Term(factor, reduction == _MEAN)]
        for prefix, read in self._readers.items():
            if name.startswith(prefix):
                return read(node, factor)
        if name.startswith(_PASSING):
            return self._children(node, factor)
        raise _NotUnderstood(name.removesuffix("0").removesuffix("1").removesuffix("Backward"))

    def _children(self, node: Any, factor: float) -> list[Term]:
        return [term for child, _ in node.next_functions if child is not None for term in self.terms(child, factor)]

    def _sum(self, node: Any, factor: float) -> list[Term]:
        sign = -1.0 if node.name().startswith(("Sub", "Rsub")) else 1.0
        weights = (1.0, sign * float(getattr(node, "_saved_alpha", 1)))
        children = zip(node.next_functions, weights, strict=False)
        return [
            term for (child, _), weight in children if child is not None for term in self.terms(child, weight * factor)
        ]

    def _product(self, node: Any, factor: float) -> list[Term]:
        children = [child for child, _ in node.next_functions if child is not None]
        if len(children) > 1:
            raise _NotUnderstood("a product")
        if is_scaled(node):
            return self.terms(children[0], factor)
        constant = node._saved_other if node._saved_other is not None else node._saved_self
        if isinstance(constant, Tensor) and not is_python_number(constant):
            raise PrivacyError(
                "the loss, one number by then, is multiplied by a tensor. If it was counted in the batch (1 / number of "
                "tokens), one record rescales all others: weigh within each record, then take the mean; give a constant as a "
                "Python number. The scale of a GradScaler is known by its own method: scaler.scale(loss)."
            )
        return self.terms(children[0], factor * float(constant))

    def _quotient(self, node: Any, factor: float) -> list[Term]:
        children = [child for child, _ in node.next_functions if child is not None]
        if len(children) > 1 or node.next_functions[0][0] is None:
            raise _NotUnderstood("a quotient")
        divisor = node._saved_other
        if isinstance(divisor, Tensor) and not is_python_number(divisor):
            return [Term(factor, is_mean=True)]  # _check_divisor saw that it is the number of summed elements
        return self.terms(children[0], factor / float(divisor))

    def _reduction(self, node: Any, factor: float) -> list[Term]:
        count, is_mean = math.prod(node._saved_self_sym_sizes), node.name().startswith("Mean")
        if count % self._n == 0:
            return [Term(factor, is_mean)]
        # Not over the batch (losses that were stacked, means by class): look at what is summed.
        return self._children(node, factor / count if is_mean else factor)


def is_python_number(operand: Tensor) -> bool:
    """Whether an operand was written as a number: torch lets such a one not widen another scalar's type."""
    if operand.dim():
        return False
    narrow = torch.zeros((), dtype=torch.float16 if operand.is_floating_point() else torch.int8)
    return torch.result_type(operand, narrow) == narrow.dtype


# ---------------------------------------------------------------------- checks


def _check_term(term: Term, n: int, reduction: str) -> None:
    undivided = not term.is_mean and n > 1 and math.isclose(abs(term.factor), 1.0, rel_tol=_RELATIVE)
    divided = not term.is_mean and n > 1 and math.isclose(abs(term.factor) * n, 1.0, rel_tol=_RELATIVE)
    if (reduction == "mean" and undivided) or (reduction == "sum" and (term.is_mean or divided)):
        found = "sum" if reduction == "mean" else "mean"
        raise PrivacyError(
            f"the loss is a {found} over the batch, but loss_reduction={reduction!r}: the size of the batch, which is private, "
            f"would scale every record's gradient. Call make_private with loss_reduction={found!r}."
        )


def _check_weights(weights: list[float], knowledge: Any) -> None:
    """Sums that are divided by hand: what a record weighs must not change from batch to batch."""
    if not knowledge.weights:
        knowledge.weights = weights
    same = len(weights) == len(knowledge.weights) and all(
        math.isclose(a, b, rel_tol=_RELATIVE) for a, b in zip(weights, knowledge.weights, strict=True)
    )
    if not same:
        raise PrivacyError(
            f"a sum over the batch is divided so that a record weighs {weights} now and {knowledge.weights} before: the divisor "
            f"is not the number of records, so it depends on which records are there (or the weight is a schedule). Use the "
            f"mean over the records times a constant."
        )


def _check_divisor(node: Any) -> None:
    """A division by one number that is a tensor: allowed only where it is the number of elements that were summed."""
    name = node.name()
    if name.startswith("NllLoss") and node._saved_reduction == _MEAN:
        _check_cross_entropy(node)
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
    if operand.is_floating_point() and operand.dim() == 0 and is_python_number(operand):
        return
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


def _check_selection(node: Any, n: int) -> None:
    """A mean over what was selected divides by how many were."""
    name = node.name()
    by_mask = name.startswith("IndexBackward") and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in node._saved_indices
    )
    rows = node._input_metadata[0].shape[:1]
    ragged = name.startswith(("IndexBackward", "IndexSelect", "Take", "Gather")) and rows and rows[0] % n != 0
    if by_mask or ragged or name.startswith("MaskedSelect"):
        raise PrivacyError(
            "the loss is a mean over selected elements: it divides by how many were selected in the batch, so one record "
            "rescales the gradients of all others. Multiply by the mask, take the mean within each record, then the mean over "
            "the records."
        )
