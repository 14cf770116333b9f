"""The validator under the name that Opacus gives it; it lives in `ghostgrad.validation`."""

from ghostgrad.validation import ModuleValidator

__all__ = ["ModuleValidator"]
