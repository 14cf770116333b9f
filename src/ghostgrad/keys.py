"""The run key: every random draw of a private training is a pure function of it and of the draw's own address.

A draw is addressed by a purpose and counters (``"noise", step, vector``), never by how many draws came before it. So a
resumed run does not repeat a noise vector, the clippers see the same batches, and draws can be made in any order.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass, field

from ghostgrad.errors import PrivacyError

_KEY_BYTES = 32


@dataclass(frozen=True)
class RunKey:
    """256 secret bits from which sampling and noise are derived.

    Anyone who knows the key can subtract the noise, so it is kept out of ``repr`` and belongs in no log.

    >>> RunKey.from_seed(7).derive("noise", 3, 0) == RunKey.from_seed(7).derive("noise", 3, 0)
    True
    >>> RunKey.from_seed(7).derive("noise", 3, 0) == RunKey.from_seed(7).derive("noise", 3, 1)
    False
    """

    secret: bytes = field(repr=False)
    seeded: bool = False
    _process: int = field(default_factory=os.getpid, init=False, repr=False, compare=False)
    """Where it may be drawn from. Processes that were forked with one key would draw the same noise for other sums."""

    @classmethod
    def from_os(cls) -> RunKey:
        """A fresh key from the operating system's entropy source."""
        return cls(secrets.token_bytes(_KEY_BYTES))

    @classmethod
    def from_seed(cls, seed: int) -> RunKey:
        """A reproducible key. A seed that can be guessed gives no privacy: use it for tests and comparisons only."""
        digest = hashlib.blake2b(f"ghostgrad seed {int(seed)}".encode(), digest_size=_KEY_BYTES)
        return cls(digest.digest(), seeded=True)

    @property
    def mark(self) -> str:
        """Tells keys apart and shows nothing of them (of a seed that can be guessed: whether a guess is right)."""
        return self.derive("mark").hex()

    def derive(self, purpose: str, *counters: int) -> bytes:
        """32 bytes for one address: keyed BLAKE2b (RFC 7693) of the purpose and the counters.

        Raises:
            PrivacyError: in a process that was forked from the key's own, or that it was sent to, unless it comes from a seed.
        """
        if self._process != os.getpid() and not self.seeded:
            raise PrivacyError(
                f"process {os.getpid()} draws from the key of process {self._process}. Both would add the same noise to other "
                f"sums, and their difference shows the records. Build the PrivacyEngine in the process that trains with it."
            )
        address = ":".join([purpose, *map(str, counters)]).encode()
        return hashlib.blake2b(address, key=self.secret, digest_size=_KEY_BYTES).digest()
