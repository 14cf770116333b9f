"""What a release of torch lets the library see."""

from __future__ import annotations

import pytest

from ghostgrad.recording.packing import packs

what_is_packed = pytest.mark.skipif(
    packs(), reason="torch before 2.8 does not tell whether saved tensors are packed: ghost then always passes twice"
)
