"""How the calls of each module are to be read, where the plain reading is not right. Filled in by the rehearsal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from torch import Tensor, nn

from ghostgrad.layers import Rule, find_rule, generic
from ghostgrad.layers.registry import own_parameters
from ghostgrad.recording.places import Known

GENERIC = Rule("generic", generic, frozenset(), compares=True, draws=lambda module: True)


class Layout(Enum):
    """Where the records are in the tensors of a module."""

    PLAIN = "plain"
    """Where two batches have shown them, or else as in the root's."""
    EXPANDED = "expanded"
    """Nowhere: the same for all records (position embeddings). It is expanded to the batch behind the module."""


class Found(NamedTuple):
    """A plan without the model that it is for."""

    layouts: dict[str, Layout]
    enclosing: dict[str, tuple[str, ...]]
    known: Known


@dataclass
class Plan:
    """What differs from the plain reading.

    Attributes:
        root: the root module.
        generic_only: let the generic rule answer for every module.
        layouts: by path of a module, where it is not plain.
        known: where the records are in the tensors of each module's calls.
        enclosing: by path of a module, the parameters of its descendants that it answers for as a whole, by name within it.
    """

    root: nn.Module
    generic_only: bool = False
    layouts: dict[str, Layout] = field(default_factory=dict)
    enclosing: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    known: Known = field(default_factory=Known)

    def copy(self) -> Plan:
        """One that can be changed without this one; what is known of places is to be found again."""
        enclosing = {path: dict(taken) for path, taken in self.enclosing.items()}
        return Plan(self.root, self.generic_only, dict(self.layouts), enclosing)

    def found(self) -> Found:
        """What can be told to another rank: everything by name."""
        enclosing = {path: tuple(taken) for path, taken in self.enclosing.items()}
        return Found(dict(self.layouts), enclosing, self.known)

    def adopt(self, found: Found) -> None:
        """Take over what another rank found for the same model."""
        self.layouts, self.known = dict(found.layouts), found.known
        self.enclosing = {
            path: {name: self.root.get_submodule(path).get_parameter(name) for name in names}
            for path, names in found.enclosing.items()
        }

    def rule(self, path: str, module: nn.Module) -> Rule:
        """The rule that answers for a module."""
        found = None if self.generic_only or path in self.enclosing else find_rule(module)
        return found or GENERIC

    def claims(self, path: str, module: nn.Module, rule: Rule | None = None) -> Mapping[str, nn.Parameter]:
        """The parameters it answers for, by name within the module; ``rule`` where it is known."""
        own = (rule or self.rule(path, module)).claims(module)
        return {**own, **self.enclosing[path]} if path in self.enclosing else own

    def enclose(self, path: str, names: set[str] | None = None) -> str | None:
        """Let the next module above ``path`` answer for what ``path`` answers for; its path, or None above the root.

        Args:
            names: only these of its parameters; default all.
        """
        module = self.root.get_submodule(path)
        moved = {name: p for name, p in self.claims(path, module).items() if names is None or name in names}
        above = self._called_above(path)
        if above is None:
            return None
        self.enclosing.pop(path, None)
        self.layouts.pop(path, None)
        prefix = path[len(above) + 1 :] if above else path
        taken = self.enclosing.setdefault(above, {})
        taken.update({f"{prefix}.{name}": p for name, p in moved.items() if p.requires_grad})
        return above

    def holder(self, parameter: nn.Parameter) -> str | None:
        """The path of the module that answers for a parameter of its descendants."""
        for path, taken in self.enclosing.items():
            if any(p is parameter for p in taken.values()):
                return path
        return None

    def _called_above(self, path: str) -> str | None:
        while path:
            path = path.rpartition(".")[0]
            if type(self.root.get_submodule(path)).forward is not nn.Module.forward:
                return path  # a ModuleList has no forward of its own
        return None


def with_batch(tensor: Tensor, n: int) -> Tensor:
    """A tensor without a batch dimension, or with one of size 1, expanded to ``n`` records; no copy."""
    tensor = tensor if tensor.dim() and tensor.shape[0] == 1 else tensor.unsqueeze(0)
    return tensor.expand(n, *tensor.shape[1:])


__all__ = ["GENERIC", "Layout", "Plan", "own_parameters", "with_batch"]
