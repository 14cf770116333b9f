"""Reads a loss as a sum of terms: constant x (mean or sum over the batch of something of each record)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ghostgrad.errors import PrivacyError
from ghostgrad.recording import loss_constants, separable
from ghostgrad.recording.loss_graph import BOUNDARY, below, is_opaque, is_python_number, numbers, shapes
from ghostgrad.recording.scalers import is_scaled

MEAN, _SUM = 1, 2
"""`at::Reduction` in the saved attributes of torch's loss nodes."""

_PASSING = (
    "Alias", "AsStrided", "Clone", "Contiguous", "Expand", "Reshape", "Select", "Slice", "Squeeze", "Stack", "Cat", "ToCopy",
    "Unsafe", "Unsqueeze", "View",
)  # fmt: skip
"""Nodes that do not change what a scalar is worth."""

_REDUCING = ("Mean", "Sum", "Dot")
_PICKING = ("Select", "Unbind", "Slice", "Split", "Index")

_RELATIVE = 1e-6

_Part = tuple[Any, "Scale"]
"""A node, and what it is multiplied by."""


class Scale(NamedTuple):
    """The product of the numbers on the way from the loss to a term.

    Attributes:
        factor: the product.
        written: those that the user wrote.
        averages: one over the number of elements, for each mean on the way that is not over the batch.
    """

    factor: float = 1.0
    written: tuple[float, ...] = ()
    averages: tuple[float, ...] = ()

    def times(self, number: float) -> Scale:
        """Multiplied by one more that was written."""
        return Scale(self.factor * number, (*self.written, number), self.averages)

    def over(self, number: float) -> Scale:
        """Divided by one more that was written."""
        return self.times(1 / number if number else math.inf)

    def averaged(self, count: int) -> Scale:
        """Divided by the number of elements of a mean."""
        return Scale(self.factor / count, self.written, (*self.averages, 1 / count))

    def without(self, divisor: int) -> Scale | None:
        """The same without one division by that number; None if there is none."""
        for i, number in enumerate(self.written + self.averages):
            if math.isclose(abs(number) * divisor, 1.0, rel_tol=_RELATIVE):
                written = self.written[:i] + self.written[i + 1 :]
                return self._replace(factor=self.factor / abs(number), written=written)
        return None


class Term(NamedTuple):
    """``factor`` times the mean, or the sum, over the batch of something of each record.

    Attributes:
        factor: the product of all numbers that multiply it.
        is_mean: whether it is a mean; also a sum that is divided by the number of its records or elements.
        numbers: the Python numbers inside of it.
        written: the numbers that the user multiplied it by, but for that divisor.
        inside: the nodes between the reduction and the model, the reduction first.
        of_one: whether it is about one record of several (a loop over the records).
        elements: the number of its elements, where it is a sum that is divided by that; else 0.
    """

    factor: float
    is_mean: bool
    numbers: tuple[float, ...] = ()
    written: tuple[float, ...] = ()
    inside: tuple[Any, ...] = ()
    of_one: bool = False
    elements: int = 0


def check(root: Any, nodes: Sequence[Any], n: int, delivered: int, knowledge: Any) -> list[Term]:
    """Hold a loss to the declared reduction, with numbers that are the same for every batch.

    Args:
        root: the node of the loss.
        nodes: all nodes from there to the model.
        n: the records that the loss is about.
        delivered: the records in the batch that the private loader handed out; n without one.
        knowledge: what was declared and seen before (`LossKnowledge`).

    Returns:
        What the loss adds up, and what the criteria in it do.

    Raises:
        PrivacyError: saying which part is not a mean (sum) of the records' own losses.
    """
    reader = _Reader(set(nodes), n, knowledge)
    try:
        terms = reader.terms(root)
    except _Opaque as part:
        raise PrivacyError(
            f"what the loss does in {part} cannot be read (code that torch.compile made, or an autograd function of its own): a "
            f"number that was counted in the batch could rescale all records there, and clipping does not bound that. Leave "
            f"the loss out of what is compiled, write it in torch's operations; or pass it as criterion= to make_private, "
            f"where it is taken apart and checked on values."
        ) from None
    except _NotUnderstood as unknown:
        raise PrivacyError(
            f"the loss applies {unknown} to a number that is already taken over the batch, so how much a record counts "
            f"depends on the others. Apply it within each record and take the mean over the records last; or pass the loss as "
            f"criterion= to make_private, where it is taken apart and checked on values."
        ) from None
    for term in terms:
        _check_reduction(term, n, knowledge.reduction)
    if reader.opened not in knowledge.numbers:
        for term in terms:
            loss_constants.check(term, n, delivered)
    _check_numbers(terms, knowledge, reader.opened)
    return [*terms, *reader.unopened]


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


class _Opaque(_NotUnderstood):
    """A node inside of which autograd's graph says nothing."""


class _Reader:
    """Walks from the loss to where the batch was reduced, along nodes that lead to the model."""

    def __init__(self, leading: set[Any], n: int, knowledge: Any) -> None:
        self._leading, self._n, self._knowledge = leading, n, knowledge
        self.unopened: list[Term] = []
        """What criteria add up that were taken for what they had been shown to be, by their numbers."""
        self.opened = False
        """Whether a criterion was read like the rest because one record cannot be taken apart: its numbers are then met."""
        self._readers: dict[str, Callable[[Any, Scale], list[_Part] | Term]] = {
            "Add": self._sum,
            "Sub": self._sum,
            "Rsub": self._sum,
            "Neg": lambda node, scale: self._children(node, scale.times(-1.0)),
            "Mul": self._product,
            "Div": self._quotient,
            "Mean": self._reduction,
            "Sum": self._reduction,
            "Dot": self._dot,
        }

    def terms(self, root: Any, *, inside: bool = False) -> list[Term]:
        """The terms of the number that a node puts out; ``inside`` of a criterion its evidence has been taken."""
        found: list[Term] = []
        todo = [(root, Scale())]
        while todo:
            node, scale = todo.pop()
            if node not in self._leading or node.name() == BOUNDARY:
                continue  # not about records; or a scalar output, which the recorder refuses
            evidence = None if inside and node is root else evidence_at(node)
            read = self._one_or_more(node, scale) if evidence is None else self._criterion(node, scale, evidence)
            if isinstance(read, Term):
                found.append(read)
            else:
                todo.extend(reversed(read))
        return found

    def _criterion(self, node: Any, scale: Scale, evidence: Any) -> list[_Part] | Term:
        """What a criterion put out: read like the rest; taken apart on values where its graph does not say enough."""
        shown = Term(scale.factor, self._knowledge.reduction == "mean")
        try:
            inside = self.terms(node, inside=True)
        except _NotUnderstood:
            if self._n > 1 and not evidence.gradients_shown():  # one record has nobody to compare with
                raise
            return shown
        known = _numbers_of(inside)
        if all(term.is_mean == shown.is_mean for term in inside) and _same(known, self._knowledge.shown):
            self.unopened += inside
            return shown
        if not evidence.shown():
            self.opened = self._n == 1
            return self._one_or_more(node, scale)
        self._knowledge.shown = known
        return shown

    def _one_or_more(self, node: Any, scale: Scale) -> list[_Part] | Term:
        """What a node puts out, seen as one record's own loss where it is that (a loop over the records)."""
        try:
            read = self._read(node, scale)
        except _NotUnderstood:
            if self._n > 1 and not self._is_of_one(node):
                raise
            return self._of_one(node, scale)
        reduces = isinstance(read, Term) or _operation(node.name()) in ("Mean", "Sum")
        return self._of_one(node, scale) if reduces and self._n > 1 and self._is_of_one(node) else read

    def _is_of_one(self, node: Any) -> bool:
        inside = [each for each in below(node) if each in self._leading]
        boundaries = [each for each in inside if each.name() == BOUNDARY]
        return any(_picks_records(each) for each in inside) and separable.reaches_one(node, boundaries, self._n)

    def _inside(self, node: Any) -> tuple[Any, ...]:
        """The nodes from this one to the model."""
        inside = tuple(each for each in below(node) if each in self._leading)
        for each in inside:
            if is_opaque(each):
                raise _Opaque(each.name())
        return inside

    def _of_one(self, node: Any, scale: Scale) -> Term:
        inside = self._inside(node)
        inner, scale = self._drawn(node, scale)
        mean = scale.without(self._n) if self._knowledge.reduction == "mean" else None
        factor, written, _ = scale if mean is None else mean
        return Term(factor, mean is not None, inner, written, inside, of_one=True)

    def _read(self, node: Any, scale: Scale) -> list[_Part] | Term:
        name = node.name()
        reduction = getattr(node, "_saved_reduction", None)
        if reduction in (MEAN, _SUM):
            return self._term(node, scale, is_mean=reduction == MEAN, elements=_summed(node))
        read = self._readers.get(_operation(name))
        if read is not None:
            return read(node, scale)
        if name.startswith(_PASSING):
            return self._children(node, scale)
        raise (_Opaque(name) if is_opaque(node) else _NotUnderstood(_operation(name)))

    def _term(self, node: Any, scale: Scale, *, is_mean: bool, elements: int) -> Term:
        """What a node reduces, with the numbers that its elements are multiplied by drawn out."""
        inside = self._inside(node)
        inner, scale = self._drawn(node, scale)
        for divisor in (self._n, elements) if not is_mean and self._knowledge.reduction == "mean" else ():
            mean = scale.without(divisor)
            if mean is not None:
                return Term(
                    mean.factor, True, inner, mean.written, inside, elements=elements if divisor != self._n else 0
                )
        return Term(scale.factor, is_mean, inner, scale.written, inside)

    def _drawn(self, node: Any, scale: Scale) -> tuple[tuple[float, ...], Scale]:
        """The numbers inside of what a node reduces, but for those that its elements are multiplied by: these go to the scale."""
        last = node if hasattr(node, "_saved_reduction") or _operation(node.name()) not in _REDUCING else None
        while last is None:
            (node, *others) = [child for child, _ in node.next_functions if child in self._leading] or [None]
            drawn = None if node is None or others else _elementwise_factor(node, scale)
            last, scale = (node, scale) if drawn is None else (None, drawn)
        return tuple(number for each in below(last) if each in self._leading for number in numbers(each)), scale

    def _children(self, node: Any, scale: Scale) -> list[_Part]:
        return [(child, scale) for child, _ in node.next_functions if child is not None]

    def _sum(self, node: Any, scale: Scale) -> list[_Part]:
        sign = -1.0 if node.name().startswith(("Sub", "Rsub")) else 1.0
        weights = (1.0, sign * float(getattr(node, "_saved_alpha", 1)))
        children = zip(node.next_functions, weights, strict=False)
        return [
            (child, scale if weight == 1.0 else scale.times(weight))
            for (child, _), weight in children
            if child is not None
        ]

    def _product(self, node: Any, scale: Scale) -> list[_Part]:
        children = [child for child, _ in node.next_functions if child is not None]
        if len(children) > 1:
            raise _NotUnderstood("a product")
        if is_scaled(node):
            return [(children[0], scale)]
        constant = node._saved_other if node._saved_other is not None else node._saved_self
        if isinstance(constant, Tensor) and not is_python_number(constant):
            raise PrivacyError(
                "the loss, one number by then, is multiplied by a tensor. If it was counted in the batch (1 / number of "
                "tokens), one record rescales all others: weigh within each record, then take the mean; give a constant as a "
                "Python number. The scale of a GradScaler is known by its own method: scaler.scale(loss)."
            )
        return [(children[0], scale.times(float(constant)))]

    def _quotient(self, node: Any, scale: Scale) -> list[_Part] | Term:
        children = [child for child, _ in node.next_functions if child is not None]
        if len(children) > 1 or node.next_functions[0][0] is None:
            raise _NotUnderstood("a quotient")
        divisor = node._saved_other
        if isinstance(divisor, Tensor) and not is_python_number(divisor):
            if divisor.numel() > 1:
                raise _NotUnderstood("a quotient by a tensor of several numbers (counts by class or by position)")
            # `loss_selections` saw that it is the number of summed elements.
            return self._term(children[0], scale, is_mean=True, elements=0)
        return [(children[0], scale.over(float(divisor)))]

    def _dot(self, node: Any, scale: Scale) -> list[_Part] | Term:
        """A product of two vectors over the records; over anything else its weights would be those of sums over the batch."""
        children = [child for child, _ in node.next_functions if child is not None and child in self._leading]
        if any(shapes(child)[0].numel() % self._n or self._is_over_the_batch_already(node) for child in children):
            raise _NotUnderstood("a product of vectors")
        return self._term(node, scale, is_mean=False, elements=0)

    def _reduction(self, node: Any, scale: Scale) -> list[_Part] | Term:
        sizes, is_mean = node._saved_self_sym_sizes, node.name().startswith("Mean")
        count = math.prod(sizes)
        if sizes and count % self._n == 0 and not self._is_over_the_batch_already(node):
            return self._term(node, scale, is_mean=is_mean, elements=count)
        # Not over the batch (losses that were stacked, means by class): look at what is summed.
        return self._children(node, scale.averaged(count) if is_mean else scale)

    def _is_over_the_batch_already(self, node: Any) -> bool:
        """Whether what is reduced has lost its batch dimension before, though its size could be taken for one."""
        while True:
            children = [child for child, _ in node.next_functions if child is not None and child in self._leading]
            if children and node.name().startswith("Stack") and not shapes(children[0])[0]:
                return True
            if len(children) != 1:
                return False
            node = children[0]
            if _reduces_dim_0(node, self._n):
                return True


def _picks_records(node: Any) -> bool:
    """Whether a node may take single records out of a batch."""
    return node.name().startswith(_PICKING) and getattr(node, "_saved_dim", 0) == 0


def _operation(name: str) -> str:
    """``Mul`` of ``MulBackward0``."""
    return name.rstrip("0123456789").removesuffix("Backward")


def _elementwise_factor(node: Any, scale: Scale) -> Scale | None:
    """The scale with the number by which a node multiplies each element; None for one that does anything else."""
    name = node.name()
    if name.startswith(_PASSING):
        return scale
    if name == "NegBackward0":
        return scale.times(-1.0)
    if name == "MulBackward0":
        constant = node._saved_other if node._saved_other is not None else node._saved_self
        return scale.times(float(constant)) if constant is not None and is_python_number(constant) else scale
    if name in ("DivBackward0", "DivBackward1") and node.next_functions[0][0] is not None:
        divisor = node._saved_other
        return scale.over(float(divisor)) if divisor is not None and is_python_number(divisor) else scale
    return None


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


# ---------------------------------------------------------------------- checks


def _check_reduction(term: Term, n: int, reduction: str) -> None:
    """A term must be what was declared; a hand-made divisor is accepted only where it is the number of records or elements."""
    undone = abs(term.factor) * n
    if term.factor == 0:
        return  # it adds nothing, whatever it is over
    if n == 1 and (reduction == "sum" or math.isclose(abs(term.factor), 1.0, rel_tol=_RELATIVE)):
        return  # of one record the mean is the sum
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


def _check_numbers(terms: list[Term], knowledge: Any, opened: bool) -> None:
    """The numbers in a loss must not change from batch to batch: a count that was made a Python number leaves no other trace."""
    found = _numbers_of(terms)
    if opened not in knowledge.numbers:
        knowledge.numbers[opened] = found
        _hint_at_double_division([term.factor for term in terms], knowledge.accumulation_steps)
    if not _same(found, knowledge.numbers[opened]):
        raise PrivacyError(
            "the numbers in the loss are others than in an earlier batch: factors, or which terms there are. If they were "
            "counted in the batch, a record weighs more or less with the others that are there, and clipping does not bound "
            "that. Use constants; for weights that follow a schedule, pass the whole loss as criterion= to make_private, where "
            "it is taken apart and checked on values."
        )


def _numbers_of(terms: Sequence[Term]) -> list[float]:
    """All numbers in the terms, in their order; those of a loop over the records once."""
    found = [((term.factor, *term.numbers), term.of_one) for term in terms]
    once = [numbers for i, (numbers, of_one) in enumerate(found) if not of_one or found.index((numbers, True)) == i]
    return [number for numbers in once for number in numbers]


def _same(found: Sequence[float], before: Sequence[float] | None) -> bool:
    return (
        before is not None
        and len(found) == len(before)
        and all(math.isclose(a, b, rel_tol=_RELATIVE) for a, b in zip(found, before, strict=True))
    )


def _hint_at_double_division(weights: list[float], accumulation_steps: int) -> None:
    if accumulation_steps > 1 and weights and all(math.isclose(w * accumulation_steps, 1.0) for w in weights):
        warnings.warn(
            f"the loss is divided by accumulation_steps={accumulation_steps}, but the private step already divides by the size "
            f"of the whole logical batch: gradients are clipped and scaled {accumulation_steps} times smaller than meant. "
            f"Leave the division out.",
            stacklevel=2,
        )
