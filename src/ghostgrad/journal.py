"""What surrounds a release: is it one that was made before a crash, and is it written down before the parameters change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ghostgrad.accounting import Accountant, Gaussian, Ledger, PoissonSampled
from ghostgrad.distributed import Topology, local
from ghostgrad.errors import LedgerError, PrivacyError
from ghostgrad.ledger import LedgerFile
from ghostgrad.provenance import Provenance
from ghostgrad.spent import Spent, part

Release = tuple[float, float, int]
"""Noise multiplier, sample rate, and how many times."""
_UNKNOWN = Provenance()


class Journal:
    """Follows the releases of one private training.

    A resumed training with the key of the one that was interrupted draws the same noise again. That is no new release as long
    as it makes the very same ones. So the parameters it begins with must be those of the checkpoint; and where a ledger file
    tells which releases were made after it, each of them must come out as it was, bit for bit. They are not counted twice.

    Args:
        spent: what was released.
        file: where it is written down; None without a ledger file, and on all ranks but the first.
        topology: the ranks.
        number: of the training within its engine.
        provenance: how its releases are made.
        settings: further public facts for the file.
        watched: whether some rank has a file, whose failure has to be told to the others.
    """

    def __init__(
        self,
        spent: Spent,
        file: LedgerFile | None,
        topology: Topology,
        *,
        number: int = 0,
        provenance: Provenance = _UNKNOWN,
        settings: Mapping[str, Any] | None = None,
        watched: bool = False,
    ) -> None:
        self._spent, self._file, self._topology, self._watched = spent, file, topology, watched
        self._number, self._settings = number, dict(settings or {})
        self._told: str | None = None
        self.provenance = provenance
        self.begins_with: str | None = None
        """`digest` of the parameters with which the next step has to be taken; None for any."""
        self.made: dict[int, str] = {}
        """Digests of what was released before this process, by the address of the noise."""

    def open(self, parameters: Iterable[Tensor], step: int) -> bool:
        """Before anything is noted or drawn: whether this step was released before.

        Raises:
            PrivacyError: the training was resumed with other parameters than it was saved with.
            LedgerError: the accountant counts less than the file.
        """
        if self.begins_with is not None and digest(parameters) != self.begins_with:
            raise PrivacyError(
                "the training was resumed with the key of a checkpoint but its parameters are not those of the checkpoint: the "
                "noise of steps that were made after it would be drawn again for other gradients, and the difference of the "
                "two has no noise. Load the parameters (module.load_state_dict) too, or resume with fresh_key=True."
            )
        self.begins_with = None
        return step in self.made

    def note(self, accountant: Accountant, releases: Sequence[Release]) -> None:
        """Count a release that is about to be made."""
        for sigma, rate, steps in releases:
            accountant.step(noise_multiplier=sigma, sample_rate=rate, steps=steps)
            self._spent.tell(self._number, self.provenance, steps)

    def close(self, releases: Sequence[Release], gradients: Iterable[Tensor], step: int) -> None:
        """The release is ready and the parameters change next: it is written down, or shown to be the one that was made.

        Raises:
            PrivacyError: another release under the same noise; on every rank.
            LedgerError: it could not be written; on every rank.
        """
        failure: Exception | None = None
        again = step in self.made
        if self._file is not None:
            try:
                found = digest(gradients)
                if not again:
                    self._write(self._file, releases, found, step)
                elif found != self.made[step]:
                    raise PrivacyError(
                        f"the ledger file says that step {step} was released after the checkpoint, and now the same noise was "
                        f"about to be added to another sum: data, code or machine are not as they were. Nothing was released. "
                        f"Load the checkpoint again with fresh_key=True; what was spent stays counted."
                    )
            except (PrivacyError, LedgerError) as error:
                failure = error
        self._tell(failure)
        if not again:
            self._spent.steps += 1

    def _tell(self, failure: Exception | None) -> None:
        if self._watched and self._topology.size > 1:
            words = self._topology.collect(None if failure is None else f"{failure}")
            if failure is None and any(words):
                raise PrivacyError(f"rank 0 could not go on, so no rank does. It said: {next(filter(None, words))}")
        if failure is not None:
            raise failure

    def _write(self, file: LedgerFile, releases: Sequence[Release], found: str, step: int) -> None:
        spent, ledger = self._spent, self._spent.accountant.ledger
        if self._told != spent.run:
            facts = {**self._settings, **self.provenance.plain()}
            file.training(run=spent.run, number=self._number, relation=facts.pop("guarantee"), settings=facts)
            self._told = spent.run
        events = [(PoissonSampled(rate, Gaussian(sigma)), count) for sigma, rate, count in releases]
        catch_up(file, spent, ledger, ledger.steps - sum(count for _, count in events))
        file.release(events, run=spent.run, training=self._number, step=step, digest=found)
        spent.written = ledger.steps


def catch_up(file: LedgerFile, spent: Spent, ledger: Ledger, end: int) -> None:
    """Write down what the accountant has and the file does not: the user's own releases, or those of a checkpoint.

    Raises:
        LedgerError: the accountant counts less than the file.
    """
    if end < spent.written:
        raise LedgerError(
            f"the accountant counts {end} releases and the ledger file {spent.written}: its ledger was replaced. With a ledger "
            f"file leave the accountant alone; engine.load_state_dict adds what is missing."
        )
    begin = 0
    for run, releases, steps in spent.spans:
        first, last = max(begin, spent.written), min(begin + releases, end)
        if first < last:
            file.record(part(ledger, first, last), run=run, steps=steps if first == begin else 0)
        begin += releases
    spent.written = end


def digest(tensors: Iterable[Tensor]) -> str:
    """Equal for tensors that are equal bit by bit (of a sharded one, this rank's part)."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        flat = local(tensor.detach()).cpu().contiguous().reshape(-1)
        found.update(f"{tuple(flat.shape)} {flat.dtype}".encode())
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
