"""The engine under the name that Opacus gives it; it lives in `ghostgrad.engine`."""

from ghostgrad.engine import PrivacyEngine

__all__ = ["PrivacyEngine"]
