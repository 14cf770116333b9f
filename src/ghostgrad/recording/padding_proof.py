"""Proof that a record's output does not depend on how far it was padded, which is as far as the longest of its batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghostgrad.errors import PrivacyError
from ghostgrad.layers import Rows
from ghostgrad.recording.draws import NoDraws, in_mode
from ghostgrad.recording.padding_cuts import READINGS, Cut, of_record
from ghostgrad.recording.proofs import Outcome, close, forward
from ghostgrad.sampling import Padding, cut_to

_WAY_OUT = (
    "Pad to a length that is the same for every batch (a constant), or mask what is padded: pass lengths or a mask to the model, "
    "average over what is not padded, and with padding on the left pass positions that count from each record's own beginning."
)


@dataclass(frozen=True)
class Own:
    """What of an output is a record's own, and no padding.

    Attributes:
        output: which of the floating-point outputs.
        record: whose.
        padded: the shape of the record's part of it.
        shape: the shape without padding.
        left: whether padding comes first.
    """

    output: int
    record: int
    padded: torch.Size
    shape: torch.Size
    left: bool


def check_padding(
    root: nn.Module, args: Any, kwargs: Any, n: int, padded: Sequence[Padding], *, batch_first: bool
) -> tuple[Own, ...] | None:
    """Run the model on single records without their padding: their outputs must be the same, as far as they go.

    The model runs on copies, as in `check_forward`: without dropout, on constant draws, with buffers and random states put back.

    Returns:
        How far the outputs go; None if nothing was shown, because padding did not come here, or the records are no other than it.

    Raises:
        PrivacyError: when an output depends on the padding, or the model does not run without it.
    """
    rows = Rows(n, batch_first, type(root).__name__)
    batch = (args, kwargs)
    cuts = [cut for padding in padded if (cut := Cut(padding, batch, n, batch_first=batch_first)).shows]
    with torch.no_grad(), torch.random.fork_rng(), in_mode(root, training=True), NoDraws():
        whole = forward(root, batch) if cuts else None
        if whole is None or whole.drew:  # of a model that draws from numpy, nothing of another size can be compared
            return None
        found = [parts for cut in cuts if (parts := _own_parts(root, batch, whole, cut, rows)) is not None]
    if not found:
        raise PrivacyError(
            f"{rows.path}: collate_fn pads records to the longest of their batch, and the model does not run on one of them "
            f"without that, so it is not known whether the length of one record changes the outputs of the others. {_WAY_OUT}"
        )
    return tuple(own for parts in found for own in parts)


def check_gradients(own: Sequence[Own], grads: Mapping[int, Tensor | None], n: int, *, batch_first: bool) -> None:
    """Refuse a loss that makes use of outputs for padding: how many there are, the longest record says.

    Args:
        own: what `check_padding` returned.
        grads: what arrived at the floating-point outputs, by their place among them.

    Raises:
        PrivacyError: when a gradient arrived where there is only padding.
    """
    rows = Rows(n, batch_first, "")
    for each in own:
        grad = grads.get(each.output)
        if grad is None:
            continue
        beyond = of_record(grad, rows.dim(grad) or 0, each.record, n).clone()
        cut_to(beyond, each.shape, left=each.left).zero_()
        if bool(beyond.count_nonzero()):
            raise PrivacyError(
                "the loss uses outputs of the model at positions that were padded to the longest record of the batch (the last "
                "position, or all of them), so how long one record is changes the gradients of all others, and clipping does not "
                "bound that. Take each record's own last position, leave what is padded out of sums and maxima, or pad to one "
                "length for all batches."
            )


def _own_parts(root: nn.Module, batch: Any, whole: Outcome, cut: Cut, rows: Rows) -> list[Own] | None:
    """Hold a record's outputs to those without padding; None where these cannot be had."""
    for reading in READINGS:
        alone = forward(root, cut.apply(batch, reading))
        if alone is not None:
            break
    else:
        return None
    found = []
    for place, (one, other) in enumerate(zip(whole.outputs, alone.outputs, strict=False)):
        dim = rows.dim(one)
        if dim is None:
            continue
        if one.dim() != other.dim():
            return None  # a dimension of one entry was squeezed
        mine, other = of_record(one, dim, cut.record, rows.n), of_record(other, dim, 0, 2)
        if any(less > size for size, less in zip(mine.shape, other.shape, strict=True)):
            continue  # not led by the records
        if not close(cut_to(mine, other.shape, left=cut.left), other):
            raise PrivacyError(
                f"{rows.path}: collate_fn pads records to the longest of their batch, and the output for a record is another "
                f"when it is padded less. So the longest record changes the gradients of all others, which clipping its own "
                f"gradient does not bound. {_WAY_OUT}"
            )
        found.append(Own(place, cut.record, mine.shape, other.shape, cut.left))
    return found
