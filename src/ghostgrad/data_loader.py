"""The private data loader under the name that Opacus gives it; it lives in `ghostgrad.sampling`."""

from ghostgrad.sampling import DPDataLoader

__all__ = ["DPDataLoader"]
