"""Rules that users register: checked when they are registered, and held to what a rule owes on every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from ghostgrad.errors import ConfigurationError, UnsupportedModuleError
from ghostgrad.gradients import Explicit, Use
from ghostgrad.layers.call import Call
from ghostgrad.layers.registry import Rule, RuleFunction, built_in, own_parameters, registered, set_rule
from ghostgrad.tree import tensors

GradSampler = Callable[[Any, list[Tensor], Tensor], Mapping[nn.Parameter, Tensor]]
"""``sampler(module, activations, backprops)``: each trainable parameter's per-sample gradients ``[n, *p]``."""


@overload
def register_rule(
    module_class: type[nn.Module], function: RuleFunction, *, name: str | None = None, replace: bool = False
) -> RuleFunction: ...
@overload
def register_rule(
    module_class: type[nn.Module], function: None = None, *, name: str | None = None, replace: bool = False
) -> Callable[[RuleFunction], RuleFunction]: ...
def register_rule(
    module_class: type[nn.Module],
    function: RuleFunction | None = None,
    *,
    name: str | None = None,
    replace: bool = False,
) -> Any:
    """Let a function of yours say how a class of modules uses its own parameters; as a call or as a decorator.

    The function gets one `Call` (arguments, gradients of the outputs, and ``call.rows``, which knows where the records are) and
    returns a `Use` for each of ``call.parameters``, by local name: `Matmul`, `Lookup`, or `Explicit` where you have
    per-sample gradients ``[n, *p]``. Norms, factors and sums are then worked out as for any other layer, in every mode but
    ``"functorch"``, which stays the slow cross-check. A subclass inherits the rule unless it overrides `forward`.

    A rule that is wrong is not found by the row proofs: what it says is taken for the gradient. Hold it to the loop over single
    records with ``engine.check(batch, loss_fn)``.

    Args:
        module_class: a subclass of `torch.nn.Module`.
        function: the rule; None to use as a decorator.
        name: shown by ``engine.explain()``; default the function's own.
        replace: take the place of a rule that the class has. Default False.

    Returns:
        The function, unchanged.

    Raises:
        ConfigurationError: the class is no module class, the function not callable, or the class has a rule already; and
            on the first batch, when a call is answered with other parameters, types or shapes than it has.

    >>> from torch import Tensor, nn
    >>> from ghostgrad.layers import Call, register_rule, unregister_rule
    >>> from ghostgrad.gradients import Explicit, Use
    >>> class Scale(nn.Module):
    ...     def __init__(self, width: int) -> None:
    ...         super().__init__()
    ...         self.factor = nn.Parameter(torch.ones(width))
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return x * self.factor
    >>> @register_rule(Scale)
    ... def scale(call: Call) -> dict[str, Use]:
    ...     products = call.rows.split(call.input * call.grad_output)  # [n, fold, ..., width]
    ...     return {"factor": Explicit(products.flatten(1, -2).sum(1))}
    >>> unregister_rule(Scale)
    """
    if function is None:
        return lambda rule: register_rule(module_class, rule, name=name, replace=replace)
    _check(module_class, function, "rule", replace)
    set_rule(module_class, _held_to_its_duties(function, name or str(getattr(function, "__name__", "custom"))))
    return function


def unregister_rule(module_class: type[nn.Module]) -> None:
    """Take a registered rule, or sampler, away; what answered for the class before answers again.

    Raises:
        ConfigurationError: nothing was registered for the class.
    """
    if registered(module_class) is None:
        raise ConfigurationError(f"{_named(module_class)} has no registered rule to take away.")
    set_rule(module_class, None)


@contextmanager
def registered_rule(module_class: type[nn.Module], function: RuleFunction, *, replace: bool = False) -> Iterator[None]:
    """`register_rule` inside a ``with`` block; afterwards, what was registered before."""
    before = registered(module_class)
    register_rule(module_class, function, replace=replace)
    try:
        yield
    finally:
        set_rule(module_class, before)


def register_grad_sampler(
    target_class_or_classes: type[nn.Module] | Sequence[type[nn.Module]], *, replace: bool = False
) -> Callable[[GradSampler], GradSampler]:
    """Decorator that registers a sampler written for Opacus: ``sampler(module, activations, backprops)``.

    It gets what Opacus gives it: the positional tensors of the call, detached, with the batch first (dimension 1 moved to the
    front where the model is built with ``batch_first=False``), and the gradient of the only output, likewise, which for
    a mean loss is multiplied by the number of records: it is that of each record's own loss. It returns
    ``{parameter: grad_sample}`` with grad_sample ``[n, *p]`` for the trainable parameters of the module.

    Unlike in Opacus, rows are held to records: where a batch was folded to more rows than records, the module above answers for
    this one's parameters, record by record.

    Args:
        target_class_or_classes: one class of modules or several.
        replace: take the place of a rule that the class has. Default False.

    Raises:
        ConfigurationError: as `register_rule`.

    >>> import torch
    >>> from torch import nn
    >>> from ghostgrad.grad_sample import register_grad_sampler, unregister_rule
    >>> class Twice(nn.Linear):
    ...     def forward(self, input):
    ...         return 2 * super().forward(input)
    >>> @register_grad_sampler(Twice)
    ... def compute_grad_sample(layer, activations, backprops):
    ...     return {layer.weight: torch.einsum("n...i,n...j->nij", 2 * backprops, activations[0]),
    ...             layer.bias: torch.einsum("n...k->nk", 2 * backprops)}
    >>> unregister_rule(Twice)
    """
    given = target_class_or_classes
    classes: list[type[nn.Module]] = list(given) if isinstance(given, Sequence) else [given]

    def decorate(sampler: GradSampler) -> GradSampler:
        for module_class in classes:
            _check(module_class, sampler, "grad sampler", replace)
        name = getattr(sampler, "__name__", "grad sampler")
        for module_class in classes:
            set_rule(module_class, _held_to_its_duties(lambda call: _sample(sampler, call), name))
        return sampler

    return decorate


def _check(module_class: Any, function: Any, what: str, replace: bool) -> None:
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise ConfigurationError(f"a {what} is registered for a class of torch.nn.Module, not for {module_class!r}.")
    if not callable(function):
        raise ConfigurationError(f"the {what} for {_named(module_class)} is {function!r}, which is not callable.")
    if (registered(module_class) or built_in(module_class)) is not None and not replace:
        raise ConfigurationError(
            f"{_named(module_class)} has a rule already. Pass replace=True to put yours in its place, or take it away with "
            f"unregister_rule({module_class.__name__})."
        )


def _held_to_its_duties(function: RuleFunction, name: str) -> Rule:
    def answer(call: Call) -> Mapping[str, Use]:
        uses = function(call)
        _check_answer(call, uses)
        return uses

    return Rule(name, answer, parameters=None, compares=True)


def _check_answer(call: Call, uses: Any) -> None:
    where = f"{call.path}: the rule registered for {type(call.module).__name__}"
    if not isinstance(uses, Mapping):
        raise ConfigurationError(f"{where} returned a {type(uses).__name__}; it must return {{name: Use}}.")
    missing, foreign = (
        sorted(call.parameters.keys() - uses.keys()),
        sorted(uses.keys() - call.parameters.keys(), key=str),
    )
    own = own_parameters(call.module)
    if missing or any(name not in own for name in foreign):
        raise ConfigurationError(
            f"{where} answered for {sorted(map(str, uses))}, but the trainable parameters of the call are "
            f"{sorted(call.parameters)}. Return one use for each of call.parameters: a parameter without one would train on "
            f"nothing but noise."
        )
    for name, parameter in call.parameters.items():
        use = uses[name]
        if not isinstance(use, Use):
            raise ConfigurationError(
                f"{where} returned a {type(use).__name__} for {name!r}; wrap per-sample gradients in Explicit(grads)."
            )
        if use.shape != parameter.shape or use.n != call.rows.n:
            raise ConfigurationError(
                f"{where} returned per-sample gradients of shape {[use.n, *use.shape]} for {name!r}; with "
                f"{call.rows.n} records they have shape {[call.rows.n, *parameter.shape]}."
            )


def _sample(sampler: GradSampler, call: Call) -> dict[str, Use]:
    activations = [_one_row_each(call, tensor) for tensor in tensors(call.args)]
    with torch.no_grad():
        found = sampler(call.module, activations, _one_row_each(call, call.grad_output))
    if not isinstance(found, Mapping):
        raise ConfigurationError(
            f"{call.path}: the grad sampler registered for {type(call.module).__name__} returned a "
            f"{type(found).__name__}; it must return {{parameter: grad_sample}}."
        )
    names = {parameter: name for name, parameter in own_parameters(call.module).items()}
    return {names.get(p, "a tensor that is not its parameter"): _explicit(grads) for p, grads in found.items()}


def _explicit(grads: Any) -> Any:
    return Explicit(grads) if isinstance(grads, Tensor) and grads.dim() else grads


def _one_row_each(call: Call, tensor: Tensor) -> Tensor:
    """The tensor with the records first, one row each."""
    if tensor.dim() == 0 or call.rows.dim(tensor) is None:
        return tensor
    led = call.rows.lead(tensor)
    if led.shape[0] != call.rows.n:
        raise UnsupportedModuleError(
            f"{call.path}: a grad sampler gives one gradient for each row, and here {led.shape[0]} rows hold "
            f"{call.rows.n} records. Use register_rule, whose call.rows.split(tensor) is [n, rows of a record, ...]."
        )
    return led


def _named(module_class: type[nn.Module]) -> str:
    return f"{module_class.__module__}.{module_class.__qualname__}"
