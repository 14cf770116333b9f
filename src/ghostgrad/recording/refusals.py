"""What is refused on sight: joined forwards of other records, and batch norms that use the batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ghostgrad.errors import PrivacyError
from ghostgrad.recording.rows import displaced
from ghostgrad.recording.tape import Tape


def check_same_records(tapes: Sequence[Tape]) -> None:
    """Forwards that are joined in one backward must hold the same records in the same rows.

    Raises:
        PrivacyError: for another number of records, or the same ones in another order.
    """
    first = tapes[0]
    for other in tapes[1:]:
        if other.n != first.n:
            raise PrivacyError(
                f"one backward joined forwards of {first.n} and {other.n} records. Row i of each forward is taken as record i, "
                f"so they must have the same records. Call backward once for each batch."
            )
        if first.rows is not None and other.rows is not None and displaced(first.rows, other.rows):
            raise PrivacyError(
                "one backward joined two forwards of the same records in other places (shuffled, or negatives drawn from the "
                "batch): row i of each is taken as record i, but holds another record. Compare views of one record, not records "
                "with each other."
            )


def check_batch_norms(root: nn.Module) -> None:
    """Refuse batch norms that would use the statistics of the batch, whether or not they train.

    Raises:
        PrivacyError: naming the module; ``model.train()`` may have put a frozen one back into training mode.
    """
    for path, module in root.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise PrivacyError(
                f"{path or 'the module'}: {type(module).__name__} normalises with the statistics of the batch, so every record "
                f"changes the output of the others. Keep it in eval mode (call {path or 'module'}.eval() after "
                f"model.train()), or replace it: ModuleValidator.fix(model) puts GroupNorm in its place."
            )
