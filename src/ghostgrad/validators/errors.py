"""What the validator raises, under the names that Opacus gives it; they live in `ghostgrad.validation`."""

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.validation import IllegalModuleConfigurationError, ShouldReplaceModuleError

__all__ = ["IllegalModuleConfigurationError", "ShouldReplaceModuleError", "UnsupportedModuleError"]
