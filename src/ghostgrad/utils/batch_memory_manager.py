"""The memory manager under the name that Opacus gives it; it lives in `ghostgrad.memory`."""

from ghostgrad.memory import BatchMemoryManager

__all__ = ["BatchMemoryManager"]
