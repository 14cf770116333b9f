"""What surrounds a release: is it one that was made before a crash, and is it written down before the parameters change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from ghostgrad.errors import PrivacyError
from ghostgrad.spent import Spent


class Journal:
    """Follows the releases of one private training.

    A resumed training with the key of the one that was interrupted draws the same noise again. That is no new release as long as
    it makes the very same ones; so the parameters it begins with must be those of the checkpoint.

    Args:
        spent: counts the steps.
    """

    def __init__(self, spent: Spent) -> None:
        self._spent = spent
        self.begins_with: str | None = None
        """`digest` of the parameters with which the next step has to be taken; None for any."""

    def open(self, parameters: Iterable[Tensor]) -> None:
        """Before anything is noted or drawn.

        Raises:
            PrivacyError: the training was resumed with other parameters than it was saved with.
        """
        if self.begins_with is None:
            return
        if digest(parameters) != self.begins_with:
            raise PrivacyError(
                "the training was resumed with the key of a checkpoint but its parameters are not those of the checkpoint: the "
                "noise of steps that were made after it would be drawn again for other gradients, and the difference of the two "
                "has no noise. Load the parameters (module.load_state_dict) too, or resume with fresh_key=True."
            )
        self.begins_with = None

    def close(self) -> None:
        """The release is ready; the parameters change next."""
        self._spent.steps += 1


def digest(tensors: Iterable[Tensor]) -> str:
    """Equal for tensors that are equal bit by bit (of a sharded one, this rank's part)."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        flat = local.detach().cpu().contiguous().reshape(-1)
        found.update(f"{tuple(flat.shape)} {flat.dtype}".encode())
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
