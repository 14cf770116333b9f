"""Makes the slow truth (tests/reference) and the lists of layer cases (tests/cases) importable by name."""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).parent
for _folder in ("reference", "cases", "distributed", "checkpoint"):
    if str(_HERE / _folder) not in sys.path:
        sys.path.insert(0, str(_HERE / _folder))
