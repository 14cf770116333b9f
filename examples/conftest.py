"""Lets pytest import the scripts of this folder the way `python examples/<script>.py` does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
