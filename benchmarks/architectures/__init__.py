"""Public architectures with tiny random weights, built from their configurations: the models of the zoo and of its test."""

from __future__ import annotations

from architectures.architecture import Architecture, Batch, installed
from architectures.registry import all_architectures

__all__ = ["Architecture", "Batch", "all_architectures", "installed"]
