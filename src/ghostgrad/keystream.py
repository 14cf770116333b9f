"""Counter-mode keystreams: any 4096-byte page of a stream can be made without the pages before it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from ghostgrad.errors import MissingDependencyError

try:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    HAS_CRYPTOGRAPHY = True
except ImportError:  # the package is optional: see keystream_type
    HAS_CRYPTOGRAPHY = False

PAGE_BYTES = 4096
SLACK_BYTES = 16  # what the cipher's interface demands behind the bytes that it writes
_AES_BLOCK_BYTES = 16
_PHILOX_BLOCK_BYTES = 32
_ZEROS = memoryview(bytes(1 << 17))


class Keystream(ABC):
    """Uniform bytes that depend on a 32-byte key and the position in the stream, and on nothing else."""

    @abstractmethod
    def fill(self, out: npt.NDArray[np.uint8], first_page: int) -> None:
        """Write the stream from ``first_page`` on over ``out``, whose last ``SLACK_BYTES`` bytes are scratch."""


class AESKeystream(Keystream):
    """AES-256 in counter mode (NIST SP 800-38A, section 6.5) on zeros: the cipher's keystream itself."""

    name = "AES-CTR"

    def __init__(self, key: bytes) -> None:
        self._algorithm = algorithms.AES(key)

    def fill(self, out: npt.NDArray[np.uint8], first_page: int) -> None:
        counter = first_page * (PAGE_BYTES // _AES_BLOCK_BYTES)
        encryptor = Cipher(self._algorithm, modes.CTR(counter.to_bytes(16, "big"))).encryptor()
        size = out.size - SLACK_BYTES
        for start in range(0, size, len(_ZEROS)):
            stop = min(start + len(_ZEROS), size)
            encryptor.update_into(_ZEROS[: stop - start], out[start : stop + SLACK_BYTES].data)


class PhiloxKeystream(Keystream):
    """Philox4x64-10 (Salmon et al. 2011): a statistical, not a cryptographic, counter-based generator."""

    name = "Philox"

    def __init__(self, key: bytes) -> None:
        # Philox takes 128 bits of key; the other half of ours sets where in its 256-bit counter space the stream
        # begins.
        self._key = int.from_bytes(key[:16], "little")
        self._origin = int.from_bytes(key[16:], "little") << 128

    def fill(self, out: npt.NDArray[np.uint8], first_page: int) -> None:
        counter = self._origin + first_page * (PAGE_BYTES // _PHILOX_BLOCK_BYTES)
        size = out.size - SLACK_BYTES
        words = np.random.Philox(key=self._key, counter=counter).random_raw(size // 8)
        out[:size] = words.astype("<u8", copy=False).view(np.uint8)


def keystream_type(*, cryptographic: bool) -> type[AESKeystream] | type[PhiloxKeystream]:
    """The best keystream that is installed; ``cryptographic`` refuses all but AES (``MissingDependencyError``)."""
    if HAS_CRYPTOGRAPHY:
        return AESKeystream
    if cryptographic:
        raise MissingDependencyError(
            "secure=True needs noise from a cryptographic source, and the package 'cryptography' is not installed. "
            "Install it: pip install 'ghostgrad[secure]'"
        )
    return PhiloxKeystream
