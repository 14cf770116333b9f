"""Makes the tiny trainers importable by name, and lets transformers import where torchvision's operators do not load."""

from __future__ import annotations

import sys
from pathlib import Path

for _folder in (Path(__file__).parents[2] / "benchmarks", Path(__file__).parent):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from architectures.architecture import declare_torchvision_operators  # noqa: E402

declare_torchvision_operators()
