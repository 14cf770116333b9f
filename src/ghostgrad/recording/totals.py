"""The gradients of the records must add up to the gradient of the batch: what a module's call did not show would be missing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ghostgrad.gradients import Use
from ghostgrad.layers import Call
from ghostgrad.layers.registry import registered

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2}
"""How far a sum may be from the batch's gradient, relative to the larger; in half precision only one that is missing shows."""
_HALF = 0.9

_SMALL = {torch.float64: 1e-9, torch.float32: 1e-4}
"""What is nothing beside the gradient of the whole model: where a gradient is zero, round-off is all there is."""
_SMALL_HALF = 1e-2


class Totals:
    """The sums over records of what the rules answered, by parameter, of one backward.

    Values that leave a module other than in the tensors that it returns (complex ones, inside an object that cannot be looked
    into, written into an argument) pass its probe by. Row isolation cannot see that: the gradient is not wrong but absent.
    """

    def __init__(self) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._half: set[nn.Parameter] = set()
        self._apart: set[nn.Parameter] = set()
        """Parameters whose records' gradients add up to something else on purpose."""
        self.registered: dict[nn.Parameter, type[nn.Module]] = {}
        """Parameters for which a rule of the user's answered, and the type that it is registered for."""

    def add(self, call: Call, uses: Mapping[str, Use]) -> None:
        """What one call used."""
        of_the_user = next((base for base in type(call.module).__mro__ if registered(base) is not None), None)
        narrow = call.autocast is not None or any(grad is not None and _is_half(grad) for grad in call.grad_outputs)
        for name, p in call.parameters.items():
            use = uses[name]
            total = use.weighted_sum(torch.ones(use.n, device=p.device))
            self._sums[p] = self._sums[p] + total if p in self._sums else total
            if narrow or _is_half(p):
                self._half.add(p)
            if of_the_user is not None:
                self.registered[p] = of_the_user
            if _by_frequency(call.module, name):
                self._apart.add(p)

    def missing(self, plain: Mapping[nn.Parameter, Tensor]) -> list[nn.Parameter]:
        """The parameters whose sum is not the gradient that plain autograd found, ``plain``."""
        whole = sum(float(grad.double().square().sum()) for grad in plain.values() if grad.isfinite().all()) ** 0.5
        return [p for p, grad in plain.items() if p not in self._apart and self._is_missing(p, grad, whole)]

    def _is_missing(self, p: nn.Parameter, grad: Tensor, whole: float) -> bool:
        found = self._sums.get(p, torch.zeros_like(p))
        gap = float((found.double() - grad.double()).norm())
        largest = max(float(found.double().norm()), float(grad.double().norm()))
        half = p in self._half or _is_half(p)
        tolerance = _HALF if half else _TOLERANCE.get(p.dtype, _HALF)
        small = _SMALL_HALF if half else _SMALL.get(p.dtype, _SMALL_HALF)
        return gap > tolerance * largest and gap > small * whole  # False where a gradient is not finite


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize < 4


def _by_frequency(module: nn.Module, name: str) -> bool:
    """A table that divides by how often an id occurs: in the batch for plain autograd, in the record for its rule."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return bool(getattr(owner, "scale_grad_by_freq", False))
