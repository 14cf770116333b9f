"""Which modules cannot be trained privately as they are, and the nearest module that can."""

from ghostgrad.validation.checks import mixes_records
from ghostgrad.validation.faults import IllegalModuleConfigurationError, ModuleFault, ShouldReplaceModuleError
from ghostgrad.validation.fixes import Change, Fixed, fix
from ghostgrad.validation.optimizers import remap_optimizer
from ghostgrad.validation.validator import ModuleValidator, get_compatible_module

__all__ = [
    "Change",
    "Fixed",
    "IllegalModuleConfigurationError",
    "ModuleFault",
    "ModuleValidator",
    "ShouldReplaceModuleError",
    "fix",
    "get_compatible_module",
    "mixes_records",
    "remap_optimizer",
]
