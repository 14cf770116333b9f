"""The private optimizer under the name that Opacus gives it; it lives in `ghostgrad.optimizer`."""

from ghostgrad.optimizer import DPOptimizer

__all__ = ["DPOptimizer"]
