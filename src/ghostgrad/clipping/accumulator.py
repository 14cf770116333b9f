"""The clipped sum of a logical batch while its physical batches come in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghostgrad.clipping.measurement import Seen
from ghostgrad.distributed import is_split, local
from ghostgrad.errors import PrivacyError
from ghostgrad.recording import Delivery, Tape

_BY_HAND = -1
"""Stands for the pieces of the private loader where there is none."""


class ClippedSum:
    """Sums in float32 or wider, one for each parameter (or this rank's part of it), and which records are in them.

    A record may enter a step once. Where the private loader is known, the records that went through the model are counted
    against the records that were handed out, so a batch that is used twice, or did not come from the loader, is refused.

    Args:
        parameters: the trainable parameters of the optimizer, asked anew each time: layers may be frozen in between.
        delivery: what the private loader handed out last; None where there is no such loader.
        empty_batches: the loader's note of draws that were empty and have not been stepped on, with their epoch.
        drawn_on_average: expected records of a step where the user samples by himself: far more cannot have been drawn.
    """

    def __init__(
        self,
        parameters: Callable[[], Sequence[nn.Parameter]],
        delivery: Callable[[], Delivery] | None,
        empty_batches: dict[int, int] | None = None,
        drawn_on_average: float = math.inf,
    ) -> None:
        self._most_rows = _most_plausible(drawn_on_average)
        self.parameters, self._delivery = parameters, delivery
        self._empty_batches = {} if empty_batches is None else empty_batches
        self._trained_epochs: set[int] = set()
        self._used: dict[int, tuple[Tensor, int]] = {}
        self._used_before: dict[int, tuple[Tensor, int]] = {}
        self.not_finite = 0
        """Records dropped since the start because their gradient was not finite. Not private: do not publish it."""
        self.last_seen: Seen | None = None
        """The records of the last step, where somebody watches. Private."""
        self.watchers = 0
        """How many look at the records; norms are kept until the step for them."""
        self._abandoned = self._closed = self._closed_draw = -1
        self.clear()

    def clear(self) -> None:
        """Drop what was added; nothing of it was released."""
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._seen: list[Seen] = []
        self.statistic = 0.0
        """The clip function's own sum over the records."""
        self._bound: float | list[float] | None = None
        """What the records were clipped to; None where nothing is known to be in the sum."""
        self._rows: Counter[int] = Counter()
        self._last: Delivery | None = None
        self.passed_by = False
        """Whether a gradient went through the model's graph without being recorded (`torch.autograd.grad`)."""
        self.logical_batches: set[int] = set()
        """The draws of the private loader that are in the sum."""
        self.epochs: set[int] = set()
        """The passes over the data that are in the sum."""

    def close(self) -> None:
        """The sum was released: its records, and any others of the batch that is held, are spent."""
        for number in self.logical_batches:
            self._empty_batches.pop(number, None)
        self.last_seen = self.seen if self.watchers else None
        self.clear()
        self._used_before, self._used = self._used, {}
        if self._delivery:
            held = self._delivery()
            self._closed, self._closed_draw = held.piece, held.logical_batch
            self._empty_batches.pop(held.logical_batch, None)

    @property
    def seen(self) -> Seen:
        """The records in the sum, as far as they are watched. Private."""
        return Seen.joined(self._seen)

    @property
    def span(self) -> tuple[int, int]:
        """The last draw of the step before, and the draw that is held now: the same on all ranks that run one loop."""
        return self._closed_draw, self._delivery().logical_batch if self._delivery else -1

    @property
    def holds(self) -> bool:
        """Whether anything was added since the last step."""
        return bool(self._sums or self.logical_batches)

    @property
    def complete(self) -> bool:
        """Whether the logical batch that the consumer holds ends with the physical batch it holds."""
        held = self._delivery() if self._delivery else None
        return held is None or held.piece < 1 or held.last or held.logical_batch == self._abandoned

    def discard_partial(self) -> None:
        """Forget a logical batch that was left in the middle; its records were not released and are not accounted."""
        held = self._delivery() if self._delivery else None
        if held is not None and not held.last:
            self._abandoned = held.logical_batch
            self.clear()

    def clear_for_zero_grad(self) -> bool:
        """What ``zero_grad`` means here: drop the sum, unless the logical batch it belongs to is still coming in."""
        held = self._delivery() if self._delivery else None
        if held is not None and held.logical_batch in self.logical_batches:
            unused = held.piece not in self._rows or self._rows[held.piece] < held.records
            if not self.complete or unused:
                return False
        self.clear()
        self._used.clear()
        return True

    def admit(self, tapes: Sequence[Tape]) -> None:
        """Refuse records that were not handed out, or that are in this step already.

        Raises:
            PrivacyError: with what was found.
        """
        pieces = {tape.delivery for tape in tapes}
        if len(pieces) > 1:
            raise PrivacyError(
                "one backward joined forwards of different batches of the private loader; row i of each would be taken for "
                "the same record. Call backward once for each batch."
            )
        delivery = tapes[0].delivery
        if tapes[0].n:
            self._check_memory(tapes[0].rows, self._used)
        if delivery is None:
            self._check_plausible(tapes[0].n)
            return
        if delivery.piece < 1:
            raise PrivacyError(
                "the model was trained on a batch that the private loader did not hand out, so how it was sampled is not "
                "known. Iterate over the data_loader that make_private returned."
            )
        if len(tapes) > 1 and tapes[0].n < delivery.records:
            raise PrivacyError(
                f"one backward joined {len(tapes)} forwards of {tapes[0].n} rows of a batch of {delivery.records} records. Row i "
                f"of each is taken as one record, which parts of a batch are not. Call backward once for each part."
            )
        self._check_skipped(delivery)
        last = self._last
        if last is not None and not last.last and last.logical_batch != delivery.logical_batch:
            self.clear()  # the loop left a logical batch in the middle
        if delivery.piece == self._closed and tapes[0].n:
            raise PrivacyError(
                "this batch was part of a step already. Another step on the same draw is not an independent sample, so its "
                "privacy cannot be accounted. Take the next batch from the loader."
            )
        if tapes[0].n:
            self._check_memory(tapes[0].rows, self._used_before)
        used = self._rows[delivery.piece] + tapes[0].n
        if used > delivery.records:
            raise PrivacyError(
                f"{used} rows of this batch went through a backward, but the private loader handed out "
                f"{delivery.records} records: a record would count more than once in the step. Call backward once for each "
                f"record (add losses up before backward), keep one row for each record, and train on a batch before the next one "
                f"is fetched (a prefetcher around the loader does not)."
            )

    def check_bound(self, bound: float | list[float]) -> None:
        """Refuse to add to the sum, or to release it, at another bound than its records were clipped to.

        Raises:
            PrivacyError: with both.
        """
        if self._bound not in (None, bound):
            raise PrivacyError(
                f"the bound of the clip function is {bound} now, but records of this logical batch were clipped to "
                f"{self._bound}: the noise would not be that of their sensitivity. Set max_grad_norm right after "
                f"optimizer.step(), and give each make_private a clip function of its own."
            )

    def _check_plausible(self, n: int) -> None:
        """Rows that are tokens, or records drawn again, soon outnumber what Poisson sampling can have drawn."""
        if self._rows[_BY_HAND] + n > self._most_rows:
            raise PrivacyError(
                "far more rows went through the model in this step than expected_batch_size records drawn by Poisson sampling "
                "can be (less likely than 1e-12). Either the rows of the module's input are not records (tokens, patches, "
                "copies), and clipping rows does not bound a record, or batches are not drawn as make_private was told. Lead "
                "the module's input with the records, and give the sample_rate and expected_batch_size of a whole step."
            )

    def _check_skipped(self, delivery: Delivery) -> None:
        """An empty draw is a step like any other: whether there was a step must not tell that it was empty."""
        self._trained_epochs.add(delivery.epoch)
        skipped = [
            number
            for number, epoch in self._empty_batches.items()
            if epoch in self._trained_epochs and number != delivery.logical_batch and number not in self.logical_batches
        ]
        if skipped:
            self._empty_batches.clear()
            raise PrivacyError(
                f"the loop skipped {len(skipped)} empty batch(es). Whether a step is made must not depend on whether records "
                f"were drawn: run the model, backward and optimizer.step() on an empty batch as on any other (or call "
                f"optimizer.step() alone); noise is added and accounted."
            )

    @staticmethod
    def _check_memory(rows: Tensor | None, used: Mapping[int, tuple[Tensor, int]]) -> None:
        """The same memory, unchanged, in another backward is the same records again."""
        before = used.get(rows.data_ptr()) if rows is not None else None
        if rows is not None and before is not None and before[1] == rows._version and before[0].shape == rows.shape:
            raise PrivacyError(
                "the same records went through a backward before: in this step, or in the one before with another draw. "
                "They would count more than once, or in a step whose sampling is not theirs. Take each batch from the "
                "private loader, and each record of it once."
            )

    def add(
        self,
        sums: Mapping[nn.Parameter, Tensor],
        tapes: Sequence[Tape],
        *,
        bound: float | list[float] | None = None,
        statistic: float = 0.0,
        dropped: int = 0,
        seen: Seen | None = None,
    ) -> None:
        """Add the sums of one backward, clipped to ``bound``, from which ``dropped`` records were left out as not finite."""
        self._bound = list(bound) if isinstance(bound, list) else bound
        self.statistic += statistic
        self._seen += [] if seen is None else [seen]
        self.not_finite += dropped
        # Noted first: records of which a part was added before an interrupt must not come again.
        delivery, rows = tapes[0].delivery, tapes[0].rows
        if rows is not None and tapes[0].n:
            self._used[rows.data_ptr()] = rows, rows._version
        self._rows[_BY_HAND if delivery is None else delivery.piece] += tapes[0].n
        if delivery is not None:
            self._last = delivery
            self.logical_batches.add(delivery.logical_batch)
            self.epochs.add(delivery.epoch)
        for parameter, part in sums.items():
            known = self._sums.get(parameter)
            self._sums[parameter] = part if known is None else known.add_(part)

    @property
    def consumed(self) -> bool:
        """Whether the piece that the consumer holds went through a backward or a step.

        Raises:
            PrivacyError: a part of it did.
        """
        held = self._delivery() if self._delivery else None
        if held is None or held.piece < 1 or held.piece == self._closed or held.logical_batch == self._abandoned:
            return True
        if held.piece not in self._rows:
            return False
        if self._rows[held.piece] < held.records:
            raise PrivacyError(
                "a batch of the loader went through a backward in part, so where to go on with it is not known. Save a "
                "checkpoint after all of it did, best after optimizer.step()."
            )
        return True

    def state_dict(self, names: Mapping[nn.Parameter, str], *, secrets: bool) -> dict[str, Any]:
        """The sum and what is in it, as plain values and tensors.

        The sums are secret, as they have no noise, and so are counts of records: without ``secrets`` they are left out, and a
        logical batch that is coming in begins again.
        """
        held = self if secrets else ClippedSum(self.parameters, None)
        return {
            "sums": {names[parameter]: part.detach().clone() for parameter, part in held._sums.items()},
            "statistic": held.statistic,
            "rows": [list(entry) for entry in held._rows.items()],
            "last": None if held._last is None else list(held._last),
            "logical_batches": sorted(held.logical_batches),
            "epochs": sorted(held.epochs),
            "trained_epochs": sorted(self._trained_epochs),
            "not_finite": held.not_finite,
            "marks": [self._abandoned, held._closed, self._closed_draw],
        }

    def load_state_dict(self, state: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> None:
        """Go on from what `state_dict` returned."""
        self.clear()
        self._used, self._used_before = {}, {}
        self._sums = {named[name]: part.to(named[name].device, copy=True) for name, part in state["sums"].items()}
        self.statistic = state["statistic"]
        self._rows.update(dict(state["rows"]))
        self._last = None if state["last"] is None else Delivery(*state["last"])
        self.logical_batches, self.epochs = set(state["logical_batches"]), set(state["epochs"])
        self._trained_epochs, self.not_finite = set(state["trained_epochs"]), state["not_finite"]
        self._abandoned, self._closed, self._closed_draw = state["marks"]

    def take(self, parameter: nn.Parameter) -> Tensor:
        """The sum for one parameter, zeros where nothing reached it."""
        found = self._sums.pop(parameter, None)
        if found is not None:
            return found.contiguous() if is_split(parameter) else found
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        return torch.zeros(local(parameter).shape, dtype=wide, device=parameter.device)


def _most_plausible(mean: float) -> float:
    """The most records that Poisson sampling draws when ``mean`` are expected, but for a chance of 1e-12.

    Bernstein's inequality: ``P(X >= m + t) <= exp(-t^2 / (2 (m + t / 3)))`` (Boucheron, Lugosi and Massart 2013, section 2.8).
    """
    odds = math.log(1e12)
    return mean + odds / 3 + math.sqrt(odds**2 / 9 + 2 * mean * odds)


def trainable(groups: Iterable[Mapping[str, list[nn.Parameter]]]) -> list[nn.Parameter]:
    """The parameters of an optimizer's groups that require grad, in order."""
    return [p for group in groups for p in group["params"] if p.requires_grad]
