"""Calibration under the name that Opacus gives it; it lives in `ghostgrad.accounting`."""

from ghostgrad.accounting import get_noise_multiplier

__all__ = ["get_noise_multiplier"]
