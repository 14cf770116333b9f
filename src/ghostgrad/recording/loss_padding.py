"""Looks for means over padded positions in a loss: what they divide by is the length of the longest record of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ghostgrad.errors import PrivacyError
from ghostgrad.recording.loss_terms import MEAN, Term
from ghostgrad.recording.padding_proof import Own


def check(nodes: Iterable[Any], terms: Sequence[Term], n: int, padded: Sequence[Own]) -> None:
    """Refuse a mean over a dimension of the outputs that was padded.

    Args:
        nodes: all nodes of the loss down to the model.
        terms: what it adds up.
        n: the records that it is about.
        padded: how far the model's outputs go without padding.

    Raises:
        PrivacyError: for means of torch's and for sums that are divided by the number of their elements.
    """
    counts = [count for node in nodes for count in _averaged(node, n)]
    counts += [term.elements // n for term in terms]
    sizes = {pair for own in padded for pair in zip(own.padded, own.shape, strict=True)}
    long = {size for size, less in sizes if less < size}
    fixed = {size for size, less in sizes if less == size} - long
    # Positions may be counted together with others, but not where another dimension says what was counted.
    if any(count % size == 0 for count in counts if count and count not in fixed for size in long):
        raise PrivacyError(
            "the loss is a mean over positions that were padded to the longest record of the batch, so how long one record is "
            "scales the gradients of all others, and clipping does not bound that. Sum each record's losses over its own "
            "positions (a mask) and divide by their number, or by a constant, then take the mean over the records; or pad to a "
            "length that is the same for every batch."
        )


def _averaged(node: Any, n: int) -> Iterator[int]:
    """Over how many elements of each record a node takes a mean, dimension by dimension."""
    if node.name().startswith("Mean"):
        sizes = node._saved_self_sym_sizes
        dims = [dim % len(sizes) for dim in _signed(getattr(node, "_saved_dim", ()), len(sizes))] or range(len(sizes))
    elif getattr(node, "_saved_reduction", None) == MEAN:
        # Classes are no positions: where there is a target, it is what is counted.
        held = [getattr(node, name, None) for name in ("_saved_target", "_saved_self")]
        sizes = next((t.shape for t in held if isinstance(t, Tensor)), ())
        dims = range(len(sizes))
    else:
        return
    for dim in dims:
        whole = dim == 0 and sizes[0] % n == 0
        yield sizes[dim] // n if whole else sizes[dim]


def _signed(dims: Iterable[int], count: int) -> list[int]:
    """Negative ones are handed out as if unsigned."""
    return [dim - 2**64 if dim >= count else dim for dim in dims]
