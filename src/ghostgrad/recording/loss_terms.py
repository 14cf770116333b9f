"""Reads a loss as a sum of terms: constant x (mean or sum over the batch of something of each record)."""

from __future__ import annotations

import math
import warnings
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


class Scale(NamedTuple):
    """The product of the numbers on the way from the loss to a term, and each of them as a divisor."""

    factor: float = 1.0
    divisors: tuple[float, ...] = ()

    def times(self, number: float) -> Scale:
        """Multiplied by one more."""
        return Scale(self.factor * number, (*self.divisors, 1 / number) if number else self.divisors)

    def over(self, number: float) -> Scale:
        """Divided by one more."""
        return Scale(self.factor / number if number else math.inf, (*self.divisors, number))


class Term(NamedTuple):
    """``scale.factor`` times the mean, or the sum of that many ``elements``, over the batch."""

    scale: Scale
    is_mean: bool
    elements: int = 0

    @property
    def factor(self) -> float:
        return self.scale.factor

    def as_mean(self, n: int) -> Term:
        """A sum that is divided by the number of records, or of elements, is a mean written by hand."""
        for divisor in self.scale.divisors:
            known = any(math.isclose(abs(divisor), count, rel_tol=_RELATIVE) for count in (n, self.elements))
            if known and not self.is_mean:
                return Term(Scale(self.factor * abs(divisor)), is_mean=True)
        return self


def check(root: Any, nodes: Sequence[Any], n: int, knowledge: Any) -> None:
    """Hold a loss to the declared reduction, with weights that are the same for every batch.

    Args:
        root: the node of the loss.
        nodes: all nodes from there to the model.
        n: the records in the batch.
        knowledge: what was declared and seen before (`LossKnowledge`).

    Raises:
        PrivacyError: saying which part is not a mean (sum) of the records' own losses.
    """
    for node in nodes:
        _check_divisor(node)
        if knowledge.reduction == "mean":
            _check_selection(node, n)
    try:
        terms = _Reader(set(nodes), n, knowledge).terms(root, Scale())
    except _NotUnderstood as unknown:
        raise PrivacyError(
            f"the loss applies {unknown} to a number that is already taken over the batch, so how much a record counts "
            f"depends on the others. Apply it within each record and take the mean over the records last; or pass the loss as "
            f"criterion= to make_private, where it is taken apart and checked on values."
        ) from None
    if knowledge.reduction == "mean":
        terms = [term.as_mean(n) for term in terms]
    for term in terms:
        _check_reduction(term, n, knowledge.reduction)
    _check_weights([term.factor for term in terms], knowledge)


_EVIDENCE = "ghostgrad evidence"


def attach_evidence(node: Any, evidence: Any) -> None:
    """Leave with the node that a criterion put out how it can be shown to be a mean (sum) of the records' losses."""
    node.metadata[_EVIDENCE] = evidence


def evidence_at(node: Any) -> Any:
    """Take what was left there; it holds the batch, so it does not stay with the graph."""
    return node.metadata.pop(_EVIDENCE, None)


# ---------------------------------------------------------------------- the scalar part: terms


class _NotUnderstood(Exception):  # noqa: N818 (internal)
    """An operation on a scalar that is not linear with constant weights."""


class _Reader:
    """Walks from the loss to where the batch was reduced, along nodes that lead to the model."""

    def __init__(self, leading: set[Any], n: int, knowledge: Any) -> None:
        self._leading, self._n, self._knowledge = leading, n, knowledge
        self._readers: dict[str, Callable[[Any, Scale], list[Term]]] = {
            "Add": self._sum,
            "Sub": self._sum,
            "Rsub": self._sum,
            "Neg": lambda node, scale: self._children(node, scale.times(-1.0)),
            "Mul": self._product,
            "Div": self._quotient,
            "Mean": self._reduction,
            "Sum": self._reduction,
            "Dot": lambda node, scale: [Term(scale, is_mean=False)],
        }

    def terms(self, node: Any, scale: Scale) -> list[Term]:
        """The terms of the number that a node puts out."""
        if node not in self._leading or node.name() == "BoundaryBackward":
            return []  # not about records; or a scalar output, which the recorder refuses
        evidence = evidence_at(node)
        return self._read(node, scale) if evidence is None else self._criterion(node, scale, evidence)

    def _criterion(self, node: Any, scale: Scale, evidence: Any) -> list[Term]:
        """What a criterion put out: read like the rest; taken apart on values where its graph does not say enough."""
        mean = self._knowledge.reduction == "mean"
        try:
            inside = [term.as_mean(self._n) if mean else term for term in self._read(node, Scale())]
            weights = [term.factor for term in inside]
            if all(term.is_mean == mean for term in inside) and weights == self._knowledge.shown:
                return [Term(scale, mean)]
        except _NotUnderstood:
            if not evidence.shown():
                raise
            return [Term(scale, mean)]
        if evidence.shown():
            self._knowledge.shown = weights
            return [Term(scale, mean)]
        return self._read(node, scale)

    def _read(self, node: Any, scale: Scale) -> list[Term]:
        name = node.name()
        reduction = getattr(node, "_saved_reduction", None)
        if reduction in (_MEAN, _SUM):
            return [Term(scale, reduction == _MEAN, _summed(node))]
        for prefix, read in self._readers.items():
            if name.startswith(prefix):
                return read(node, scale)
        if name.startswith(_PASSING):
            return self._children(node, scale)
        raise _NotUnderstood(name.removesuffix("0").removesuffix("1").removesuffix("Backward"))

    def _children(self, node: Any, scale: Scale) -> list[Term]:
        return [term for child, _ in node.next_functions if child is not None for term in self.terms(child, scale)]

    def _sum(self, node: Any, scale: Scale) -> list[Term]:
        sign = -1.0 if node.name().startswith(("Sub", "Rsub")) else 1.0
        weights = (1.0, sign * float(getattr(node, "_saved_alpha", 1)))
        children = zip(node.next_functions, weights, strict=False)
        return [
            term
            for (child, _), weight in children
            if child is not None
            for term in self.terms(child, scale if weight == 1.0 else scale.times(weight))
        ]

    def _product(self, node: Any, scale: Scale) -> list[Term]:
        children = [child for child, _ in node.next_functions if child is not None]
        if len(children) > 1:
            raise _NotUnderstood("a product")
        if is_scaled(node):
            return self.terms(children[0], scale)
        constant = node._saved_other if node._saved_other is not None else node._saved_self
        if isinstance(constant, Tensor) and not is_python_number(constant):
            raise PrivacyError(
                "the loss, one number by then, is multiplied by a tensor. If it was counted in the batch (1 / number of "
                "tokens), one record rescales all others: weigh within each record, then take the mean; give a constant as a "
                "Python number. The scale of a GradScaler is known by its own method: scaler.scale(loss)."
            )
        return self.terms(children[0], scale.times(float(constant)))

    def _quotient(self, node: Any, scale: Scale) -> list[Term]:
        children = [child for child, _ in node.next_functions if child is not None]
        if len(children) > 1 or node.next_functions[0][0] is None:
            raise _NotUnderstood("a quotient")
        divisor = node._saved_other
        if isinstance(divisor, Tensor) and not is_python_number(divisor):
            return [Term(scale, is_mean=True)]  # _check_divisor saw that it is the number of summed elements
        return self.terms(children[0], scale.over(float(divisor)))

    def _reduction(self, node: Any, scale: Scale) -> list[Term]:
        count, is_mean = math.prod(node._saved_self_sym_sizes), node.name().startswith("Mean")
        if count % self._n == 0 and not self._is_over_the_batch_already(node):
            return [Term(scale, is_mean, count)]
        # Not over the batch (losses that were stacked, means by class): look at what is summed.
        return self._children(node, scale.over(count) if is_mean else scale)

    def _is_over_the_batch_already(self, node: Any) -> bool:
        """Whether what is reduced has lost its batch dimension before, though its size could be taken for one."""
        while True:
            children = [child for child, _ in node.next_functions if child is not None and child in self._leading]
            if children and node.name().startswith("Stack") and not any(m.shape for m in children[0]._input_metadata):
                return True
            if len(children) != 1:
                return False
            node = children[0]
            if _reduces_dim_0(node, self._n):
                return True


def _reduces_dim_0(node: Any, n: int) -> bool:
    """Whether a node reduces a dimension of records, and not all of them."""
    dims, sizes = getattr(node, "_saved_dim", None), getattr(node, "_saved_self_sym_sizes", None)
    if not node.name().startswith(("Mean", "Sum")) or not dims or not sizes or sizes[0] % n:
        return False
    return any(dim % 2**64 in (0, 2**64 - len(sizes)) for dim in dims)  # negative ones are handed out as if unsigned


def _summed(node: Any) -> int:
    """How many elements a loss node of torch reduces."""
    for name in ("_saved_target", "_saved_self"):
        found = getattr(node, name, None)
        if isinstance(found, Tensor):
            return found.numel()
    return 0


def is_python_number(operand: Tensor) -> bool:
    """Whether an operand was written as a number: torch lets such a one not widen another scalar's type."""
    if operand.dim():
        return False
    narrow = torch.zeros((), dtype=torch.float16 if operand.is_floating_point() else torch.int8)
    return torch.result_type(operand, narrow) == narrow.dtype


# ---------------------------------------------------------------------- checks


def _check_reduction(term: Term, n: int, reduction: str) -> None:
    """A term must be what was declared; a hand-made divisor is accepted only where it is the number of records or elements."""
    undone = abs(term.factor) * n
    if reduction == "sum" and (term.is_mean or math.isclose(undone, 1.0, rel_tol=_RELATIVE)):
        found = "mean"
    elif reduction == "mean" and not term.is_mean and math.isclose(abs(term.factor), 1.0, rel_tol=_RELATIVE):
        found = "sum"
    elif reduction == "mean" and not term.is_mean:
        raise PrivacyError(
            "the loss is a sum over the batch times a number that is not one over the number of its records (or summed "
            "elements). If that number was counted in the batch (tokens, a total weight), a record weighs more or less with "
            "the others that are there; if it is a constant, the size of the batch, which is private, scales every record. "
            "Take the mean over the records (loss.mean() times a constant), or pass the loss as criterion= to make_private, "
            "where it is taken apart and checked on values."
        )
    else:
        return
    raise PrivacyError(
        f"the loss is a {found} over the batch, but loss_reduction={reduction!r}: the size of the batch, which is private, "
        f"would scale every record's gradient. Call make_private with loss_reduction={found!r}."
    )


def _check_weights(weights: list[float], knowledge: Any) -> None:
    """What the terms of a loss weigh must not change from batch to batch: as a Python number a count leaves no other trace."""
    if knowledge.weights is None:
        knowledge.weights = weights
        _hint_at_double_division(weights, knowledge.accumulation_steps)
    same = len(weights) == len(knowledge.weights) and all(
        math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=0.0) for a, b in zip(weights, knowledge.weights, strict=True)
    )
    if not same:
        raise PrivacyError(
            "the numbers by which the terms of the loss are multiplied are others than in an earlier batch. If they were counted "
            "in the batch, a record weighs more or less with the others that are there, and clipping does not bound that. Use "
            "constants; for weights that follow a schedule, pass the whole loss as criterion= to make_private, where it is "
            "taken apart and checked on values."
        )


def _hint_at_double_division(weights: list[float], accumulation_steps: int) -> None:
    if accumulation_steps > 1 and weights and all(math.isclose(w * accumulation_steps, 1.0) for w in weights):
        warnings.warn(
            f"the loss is divided by accumulation_steps={accumulation_steps}, but the private step already divides by the size "
            f"of the whole logical batch: gradients are clipped and scaled {accumulation_steps} times smaller than meant. "
            f"Leave the division out.",
            stacklevel=2,
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
