"""Which rule answers for which module. Looked up by what `forward` runs, not by the name of the class alone."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ghostgrad.gradients import Use
from ghostgrad.layers.call import Call, Rows

RuleFunction = Callable[[Call], Mapping[str, Use]]
"""From a call to the uses it made of the module's own parameters, by local name."""


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters registered on the module itself, by local name."""
    return {name: p for name, p in module._parameters.items() if p is not None}


@dataclass(frozen=True)
class Rule:
    """How the calls of one type of module become uses.

    Attributes:
        name: shown by ``engine.explain()``.
        function: the rule itself.
        parameters: the local parameter names it knows; a module with others goes to the generic rule. None for any.
        refuses: says why a configuration of the module is not supported, or None.
        least: the fewest dimensions of what such a module puts out: [n, f] of a linear layer is 2, and dimension 1 is not
            the records' even where the model is time-first and f happens to be n. None where the module's own batch is
            dimension 0 whatever the model's is.
        claims: the parameters that it answers for, by name within the module; default the module's own. A module that uses
            its children's weights without calling them claims these too.
        led: the gradient of the module's i-th floating-point output with each record's consecutive rows first, [n * fold,
            ...]; default by the layout of the model.
        reads: whether it looks at the inputs of a call when these of the parameters train; else nothing keeps them for it.
        compares: whether it looks at the outputs of a call that is still to be proved; else nothing copies them for it.
        draws: whether a call draws random numbers that the rule has to draw again, from ``call.randomness``.
        shuffled: whether the order of the rows of a call (its arguments) may come from the data, so that what one batch
            shows about them need not hold for the next and is to be shown each time.
    """

    name: str
    function: RuleFunction
    parameters: frozenset[str] | None = frozenset({"weight", "bias"})
    refuses: Callable[[nn.Module], str | None] = lambda module: None
    least: Callable[[nn.Module], int | None] = lambda module: 1
    claims: Callable[[nn.Module], Mapping[str, nn.Parameter]] = own_parameters
    led: Callable[[Call, Tensor, int], Tensor] = lambda call, grad, index: call.rows.lead_output(index, grad)
    reads: Callable[[Container[str]], bool] = lambda trained: True
    compares: bool = False
    draws: Callable[[nn.Module], bool] = lambda module: False
    shuffled: Callable[[Any], bool] = lambda arguments: False

    def rows(self, module: nn.Module, rows: Rows) -> Rows:
        """Where the records are in the tensors of a module, given where they are in the model's."""
        least = self.least(module)
        if least is None:
            return rows if rows.batch_first else rows._replace(batch_first=True)
        return rows if rows.least == least else rows._replace(least=least)

    def uses(self, call: Call) -> Mapping[str, Use]:
        """The uses that a call made of the module's own parameters, by local name."""
        rows = self.rows(call.module, call.rows)
        return self.function(call if rows is call.rows else replace(call, rows=rows))


_RULES: dict[type[nn.Module], Rule] = {}
_NAMED: dict[tuple[str, str], Rule] = {}
_REGISTERED: dict[type[nn.Module], Rule] = {}
"""By users; these are asked first."""


def add_rule(*types: type[nn.Module], rule: Rule) -> None:
    """Let ``rule`` answer for modules whose `forward` is the one of these types."""
    for module_type in types:
        _RULES[module_type] = rule


def add_rule_by_name(module: str, name: str, *, rule: Rule) -> None:
    """Let ``rule`` answer for a class of a library that is not imported here, known by its module and its name."""
    _NAMED[module, name] = rule


def registered(module_type: type[nn.Module]) -> Rule | None:
    """The rule that a user registered for exactly this class, if any."""
    return _REGISTERED.get(module_type)


def built_in(module_type: type[nn.Module]) -> Rule | None:
    """The library's rule for exactly this class, if it has one."""
    return _RULES.get(module_type) or _NAMED.get((module_type.__module__, module_type.__qualname__))


def set_rule(module_type: type[nn.Module], rule: Rule | None) -> None:
    """Register a user's rule for a class, or with None take it away."""
    if rule is None:
        _REGISTERED.pop(module_type, None)
    else:
        _REGISTERED[module_type] = rule


def find_rule(module: nn.Module) -> Rule | None:
    """The rule for a module, or None when only the generic rule can answer.

    A subclass that overrides `forward`, or an instance whose `forward` was replaced, computes something else than the
    type the rule was written for, so it does not inherit the rule; a subclass that only adds to it does.
    """
    if "forward" in vars(module):
        return None
    for base in type(module).__mro__:
        rule = registered(base) or built_in(base)
        if rule is not None:
            known = module.forward.__func__ is base.forward  # type: ignore[attr-defined]
            own = {name for name, p in module._parameters.items() if p is not None}
            covered = rule.parameters is None or own <= rule.parameters
            return rule if known and covered else None
    return None
