"""The privacy report of a training, and what may be looked at while it runs. Nothing here imports torch but `Monitor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ghostgrad.report.privacy_report import PrivacyReport

if TYPE_CHECKING:
    from ghostgrad.report.monitor import Monitor

__all__ = ["Monitor", "PrivacyReport"]


def __getattr__(name: str) -> Any:
    if name != "Monitor":
        raise AttributeError(f"module 'ghostgrad.report' has no attribute {name!r}")
    from ghostgrad.report.monitor import Monitor

    return Monitor
