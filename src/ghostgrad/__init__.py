"""Differentially private training of unmodified PyTorch models.

The public names are imported when they are first used, so that accounting on the command line does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghostgrad.clipping import AdaptiveClipping, AutomaticClipping, FlatClipping, PerLayerClipping
    from ghostgrad.engine import PrivacyEngine
    from ghostgrad.errors import (
        BudgetExhausted,
        ConfigurationError,
        GhostgradError,
        MissingDependencyError,
        PrivacyError,
        UnsupportedModuleError,
    )
    from ghostgrad.layers import register_rule
    from ghostgrad.memory import BatchMemoryManager
    from ghostgrad.optimizer import DPOptimizer
    from ghostgrad.report import Monitor, PrivacyReport
    from ghostgrad.sampling import DPDataLoader
    from ghostgrad.validation import ModuleValidator

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveClipping": "clipping",
    "AutomaticClipping": "clipping",
    "BatchMemoryManager": "memory",
    "BudgetExhausted": "errors",
    "ConfigurationError": "errors",
    "DPDataLoader": "sampling",
    "DPOptimizer": "optimizer",
    "FlatClipping": "clipping",
    "GhostgradError": "errors",
    "MissingDependencyError": "errors",
    "ModuleValidator": "validation",
    "Monitor": "report",
    "PerLayerClipping": "clipping",
    "PrivacyEngine": "engine",
    "PrivacyError": "errors",
    "PrivacyReport": "report",
    "UnsupportedModuleError": "errors",
    "register_rule": "layers",
}

__all__ = [
    "AdaptiveClipping",
    "AutomaticClipping",
    "BatchMemoryManager",
    "BudgetExhausted",
    "ConfigurationError",
    "DPDataLoader",
    "DPOptimizer",
    "FlatClipping",
    "GhostgradError",
    "MissingDependencyError",
    "ModuleValidator",
    "Monitor",
    "PerLayerClipping",
    "PrivacyEngine",
    "PrivacyError",
    "PrivacyReport",
    "UnsupportedModuleError",
    "__version__",
    "register_rule",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ghostgrad' has no attribute {name!r}")
    return getattr(import_module(f"ghostgrad.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
