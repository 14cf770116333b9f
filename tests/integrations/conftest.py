"""Lets transformers import beside a torch for which torchvision's compiled operators do not load."""

from __future__ import annotations

import sys
from pathlib import Path

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if str(_BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(_BENCHMARKS))

from architectures.architecture import declare_torchvision_operators  # noqa: E402

declare_torchvision_operators()
