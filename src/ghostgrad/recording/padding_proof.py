"""Proof that a record's output does not depend on how far it was padded, which is as far as the longest of its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghostgrad.errors import PrivacyError
from ghostgrad.layers import Rows
from ghostgrad.recording.draws import NoDraws, in_mode
from ghostgrad.recording.proofs import Outcome, close, forward
from ghostgrad.recording.rows import some_of
from ghostgrad.sampling import Padding, cut_to
from ghostgrad.tree import map_tensors, tensors

_WAY_OUT = (
    "Pad to a length that is the same for every batch (a constant), or mask what is padded: pass lengths or a mask to the model, "
    "average over what is not padded, and with padding on the left pass positions that count from each record's own beginning."
)


def check_padding(
    root: nn.Module, args: Any, kwargs: Any, n: int, padded: Sequence[Padding], *, batch_first: bool
) -> frozenset[int] | None:
    """Run the model on single records without their padding: their outputs must be the same, as far as they go.

    The model runs on copies, as in `check_forward`: without dropout, on constant draws, with buffers and random states put back.

    Returns:
        The sizes of those dimensions of the outputs that were padded; None if nothing was shown, because padding did not come
        here, or the records are no other than it.

    Raises:
        PrivacyError: when an output depends on the padding, or the model does not run without it.
    """
    rows = Rows(n, batch_first, type(root).__name__)
    batch = (args, kwargs)
    cuts = [_Cut(padding, rows) for padding in padded]
    cuts = [cut for cut in cuts if any(cut.shows(tensor) for tensor in tensors(batch))]
    sizes: set[int] = set()
    with torch.no_grad(), torch.random.fork_rng(), in_mode(root, training=True), NoDraws():
        whole = forward(root, batch) if cuts else None
        if whole is None or whole.drew:  # of a model that draws from numpy, nothing of another size can be compared
            return None
        for cut in cuts:
            sizes.update(_compare(whole, _alone(root, batch, cut), cut))
    return frozenset(sizes)


class _Cut:
    """Takes one record out of the arguments of a call, without its padding."""

    def __init__(self, padding: Padding, rows: Rows) -> None:
        self.record, self.left, self.rows = padding.record, padding.left, rows
        self._sizes = padding.sizes

    def shows(self, tensor: Tensor) -> bool:
        """Whether it was padded, with something that the record itself is not."""
        one = self._of_record(tensor)
        kept = cut_to(one, self._shape(one, None), left=self.left)
        return kept.shape != one.shape and bool((kept != one.flatten()[0 if self.left else -1]).any())

    def apply(self, batch: Any, most: int | None) -> Any:
        """``most`` dimensions of each tensor made as short as the record is."""
        return map_tensors(lambda one: cut_to(one, self._shape(one, most), left=self.left), self._of_record(batch))

    def _of_record(self, tree: Any) -> Any:
        return some_of(tree, self.rows.n, range(self.record, self.record + 1), batch_first=self.rows.batch_first)

    def _shape(self, one: Tensor, most: int | None) -> list[int]:
        padded = [dim for dim, size in enumerate(one.shape) if size in self._sizes][:most]
        return [self._sizes[size] if dim in padded else size for dim, size in enumerate(one.shape)]


def _alone(root: nn.Module, batch: Any, cut: _Cut) -> Outcome:
    for most in (None, 1):  # another dimension may have that size by chance
        alone = forward(root, cut.apply(batch, most))
        if alone is not None:
            return alone
    raise PrivacyError(
        f"{cut.rows.path}: collate_fn pads records to the longest of their batch, and the model does not run on one of them "
        f"without that, so it is not known whether the length of one record changes the outputs of the others. {_WAY_OUT}"
    )


def _compare(whole: Outcome, alone: Outcome, cut: _Cut) -> Iterator[int]:
    rows = cut.rows
    for one, other in zip(whole.outputs, alone.outputs, strict=False):
        dim = rows.dim(one)
        if dim is None:
            continue
        fold = one.shape[dim] // rows.n
        mine = one.narrow(dim, cut.record * fold, fold)
        if any(less > size for size, less in zip(mine.shape, other.shape, strict=False)):
            continue  # not led by the records
        yield from (size for size, less in zip(mine.shape, other.shape, strict=False) if less < size)
        if mine.dim() != other.dim() or not close(cut_to(mine, other.shape, left=cut.left), other):
            raise PrivacyError(
                f"{rows.path}: collate_fn pads records to the longest of their batch, and the output for a record is another "
                f"when it is padded less. So the longest record changes the gradients of all others, which clipping its own "
                f"gradient does not bound. {_WAY_OUT}"
            )
