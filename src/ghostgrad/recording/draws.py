"""What a model draws, left out, made constant or put back, so that forwards of different batches can be compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ghostgrad._generators import draws_put_back
from ghostgrad.tree import tensors

SEEDS = range(3)
"""Draws of Python's and numpy's generators that are tried beside the one that comes: a permutation may happen to move nobody."""


@contextmanager
def without_draws(root: nn.Module) -> Iterator[None]:
    """Dropout is left out, what is drawn from torch is constant, and other generators begin at the same place each time."""
    with torch.random.fork_rng(), draws_put_back(), in_mode(root, training=True), NoDraws(), Constant():  # type: ignore[no-untyped-call]
        torch.manual_seed(0)
        yield


def seed_others(seed: int) -> None:
    """Python's and numpy's global generators; torch's is seen to otherwise."""
    random.seed(seed)
    np.random.seed(seed)


def drawn() -> tuple[object, ...]:
    """Tells whether something was drawn in between two calls."""
    _, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), np.asarray(keys).tobytes(), *rest


class NoDraws(TorchFunctionMode):
    """Leaves dropout out wherever it is called, so that the rest of a forward can be compared."""

    _DROPOUTS = frozenset(
        {
            torch.dropout, torch.feature_dropout, torch.alpha_dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d,
            F.alpha_dropout, F.feature_alpha_dropout,
        }
    )  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in (torch.rrelu, torch.rrelu_, F.rrelu):
            kwargs["training"] = False
            args = args[:3]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


_OF_ITS_INPUT: dict[str, Callable[..., Tensor]] = {
    "bernoulli.default": lambda p: p > 0.5,
    "bernoulli_.Tensor": lambda _, p: p > 0.5,
    "normal.Tensor_Tensor": lambda mean, std: mean + 0.5 * std,
    "normal.Tensor_float": lambda mean, std=1.0: mean + 0.5 * std,
    "normal.float_Tensor": lambda mean, std: mean + 0.5 * std,
    "poisson.default": lambda rate: rate.floor(),
    "binomial.default": lambda count, p: (count * p).floor(),
    "_standard_gamma.default": lambda alpha: alpha,
    "_sample_dirichlet.default": lambda alpha: alpha / alpha.sum(-1, keepdim=True),
    "multinomial.default": lambda p, count, *_: p.argmax(-1, keepdim=True).expand(*p.shape[:-1], count),
}
"""What stands for a draw from a distribution that the model worked out: something of each record's own parameters."""


class Constant(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws one half instead of random numbers (0 for whole ones), so that batches of other sizes can be compared.

    What is drawn from a distribution follows its parameters still: a constant would hide that they were taken over the batch.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Of these `NoDraws` has left the draws out.
        as_it_is = any(word in func.__name__ for word in ("dropout", "attention", "rrelu"))
        if torch.Tag.nondeterministic_seeded in func.tags and not as_it_is:
            typical = _OF_ITS_INPUT.get(func.__name__)
            for tensor in tensors(out):
                if typical is not None:
                    tensor.copy_(typical(*args))
                else:
                    tensor.fill_(0.5 if tensor.is_floating_point() else 0)
        return out


@contextmanager
def in_mode(root: nn.Module, *, training: bool) -> Iterator[None]:
    """Everything in eval mode, or, for ``training``, only dropout."""
    switched = [
        module
        for module in root.modules()
        if module.training and (not training or isinstance(module, nn.modules.dropout._DropoutNd))
    ]
    try:
        for module in switched:
            module.training = False
        yield
    finally:
        for module in switched:
            module.training = True
