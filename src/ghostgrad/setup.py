"""Checks and choices before anything is made private: each raises with the reason and changes nothing."""

from __future__ import annotations

import inspect
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ghostgrad.clipping import (
    AdaptiveClipping,
    AutomaticClipping,
    ClipFunction,
    FlatClipping,
    Mode,
    PerLayerClipping,
)
from ghostgrad.distributed import Shards, TensorParallel, Topology, fully_sharded_modules, is_split
from ghostgrad.errors import ConfigurationError, PrivacyError, UnsupportedModuleError, as_float, choose
from ghostgrad.keys import RunKey
from ghostgrad.layers import find_rule
from ghostgrad.optimizer import DPOptimizer
from ghostgrad.recording import check_batch_norms
from ghostgrad.sampling import DPDataLoader

REFUSALS = (ConfigurationError, PrivacyError, UnsupportedModuleError)

_CLIPPINGS = ("flat", "per_layer", "automatic", "adaptive")
_private: weakref.WeakSet[Any] = weakref.WeakSet()
"""Modules and optimizers that are private now. Kept here so that nothing is written on the user's objects."""


def claim(*objects: nn.Module | Optimizer) -> None:
    """Remember that these are private."""
    for thing in objects:
        _private.update(_parts(thing))


def release(*objects: nn.Module | Optimizer) -> None:
    """They are no longer private."""
    for thing in objects:
        _private.difference_update(_parts(thing))


def _parts(thing: nn.Module | Optimizer) -> list[Any]:
    return list(thing.modules()) if isinstance(thing, nn.Module) else [thing]


def check_noise_multiplier(noise_multiplier: float | Callable[[int], float]) -> float:
    """The noise multiplier of the first step.

    Raises:
        ConfigurationError: not a number, negative or not finite.
    """
    value = noise_multiplier(0) if callable(noise_multiplier) else noise_multiplier
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= as_float(value) < math.inf:
        raise ConfigurationError(
            f"noise_multiplier={value!r} must be a finite number >= 0: the noise's standard deviation divided by the "
            f"sensitivity (0 trains without privacy, and epsilon says infinity)."
        )
    return float(value)


def check_flags(**flags: object) -> None:
    """Refuse anything but True and False: a string like "no" would count as yes."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigurationError(f"{name}={value!r} must be True or False.")


def check_numbers(**numbers: object) -> None:
    """Refuse what is not a number; None stands for not given."""
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigurationError(f"{name}={value!r} must be a number.")
        if isinstance(value, int) and math.isinf(as_float(value)):
            raise ConfigurationError(f"{name} is a whole number beyond {sys.float_info.max:.0e}; give one in range.")


def check_ranks(data_loader: DataLoader[Any] | None, topology: Topology) -> None:
    """Refuse to train on several ranks without a loader: nothing then says which records each of them holds."""
    if topology.size > 1 and data_loader is None:
        raise ConfigurationError(
            f"data_loader=None on {topology.size} ranks: which records each of them takes is not known, so one could count in "
            f"several shares of a step. Give the data_loader; its draws are split between the ranks."
        )


def shards_of(module: nn.Module, topology: Topology) -> Shards | None:
    """The ranks between which `fully_shard` split the module; None where it did not.

    Raises:
        ConfigurationError: a way of splitting that is not supported.
    """
    if not isinstance(module, nn.Module):
        return None  # refused by check_module, in its words
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        raise ConfigurationError(
            "module is wrapped in FullyShardedDataParallel, which flattens weights so that they cannot be told apart. Use "
            "torch.distributed.fsdp.fully_shard (FSDP2)."
        )
    if not fully_sharded_modules(module):
        return None
    shards = Shards(module, topology)
    known = {p for unit in shards.units for p in unit.parameters}
    for name, p in module.named_parameters():
        if is_split(p) and p not in known:
            raise ConfigurationError(
                f"{name} is a DTensor that fully_shard did not make (parallelize_module), in a model that fully_shard split. Use "
                f"one of the two."
            )
    return shards


def topology_of(module: nn.Module, topology: Topology) -> Topology:
    """The ranks, or where `parallelize_module` cut weights into slices, ranks that have all records each.

    Raises:
        ConfigurationError: slices that are not supported.
    """
    if not isinstance(module, nn.Module) or fully_sharded_modules(module):
        return topology
    return TensorParallel(module) if any(is_split(p) for p in module.parameters()) else topology


def check_max_memory(max_memory: int | None, mode: Mode, module: nn.Module) -> None:
    """Refuse a budget that is none, or in a mode in which there is nothing to choose.

    Raises:
        ConfigurationError: not a whole number >= 0, or not the one-pass mode on an unsplit model.
    """
    if max_memory is None:
        return
    if isinstance(max_memory, bool) or not isinstance(max_memory, int) or max_memory < 0:
        raise ConfigurationError(
            f"max_memory={max_memory!r} must be a whole number of bytes >= 0, or None for no limit."
        )
    split = any(is_split(p) for p in module.parameters())
    if mode is not Mode.BK or split:
        where = "a model that is split over ranks" if split else f"grad_sample_mode={mode.value!r}"
        raise ConfigurationError(
            f"max_memory={max_memory} with {where}: it limits what 'bk' keeps. Leave it out, or take 'bk'; 'ghost' keeps "
            f"the least by itself, 'hooks' and 'functorch' keep all per-sample gradients because they show them."
        )


def check_noise_generator(generator: torch.Generator | None, module: nn.Module) -> None:
    """Refuse a torch generator where each rank draws a slice of the noise: it cannot draw one slice alone."""
    if generator is not None and any(is_split(p) for p in module.parameters()):
        raise ConfigurationError(
            "noise_generator with a model that is split over ranks: a torch generator draws in order, and each rank needs its "
            "own slice of the noise. Leave it out; the noise then is a function of the engine's key."
        )


def check_module(module: nn.Module) -> None:
    """Refuse a module that cannot be trained privately as it is.

    Raises:
        ConfigurationError, PrivacyError, UnsupportedModuleError: naming the sub-module and the way out.
    """
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"module is a {type(module).__name__}; it must be a torch.nn.Module.")
    if isinstance(module, nn.DataParallel):
        raise ConfigurationError(
            "module is wrapped in DataParallel, which splits the batch where the recorder cannot follow; give the module "
            "inside it (module.module), or use DistributedDataParallel."
        )
    for path, part in module.named_modules():
        if part in _private:
            raise ConfigurationError(
                f"{path or 'the module'} is private already; a second make_private would clip twice. Call engine.detach() first."
            )
        if isinstance(part, torch.jit.ScriptModule):
            raise UnsupportedModuleError(
                f"{path or 'the module'} is a {type(part).__name__}: torch.jit runs it where calls cannot be recorded. Give the "
                f"Python module that it was made from."
            )
    for name, p in module.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise ConfigurationError(
                f"{name} has a hook of its own (register_hook, register_post_accumulate_grad_hook): while the model is private, "
                f"gradients of single records go through the clipper and the hook would not see them. Remove it, and look at "
                f"p.grad in a hook on the optimizer (register_step_pre_hook)."
            )
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ConfigurationError(f"{name} has no shape yet; run one forward pass on made-up inputs first.")
        if p.requires_grad and p.is_complex():
            raise ConfigurationError(
                f"{name} is complex; clipping and noise are defined for real parameters. Use its real view."
            )
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigurationError(
            "the module has no trainable parameters (requires_grad=True), so there is nothing to train."
        )
    if module.training:
        check_batch_norms(module)
    for path, part in module.named_modules():
        rule = find_rule(part)
        trains = any(p is not None and p.requires_grad for p in part._parameters.values())
        reason = rule.refuses(part) if rule else None
        if reason and (trains or isinstance(part, nn.modules.instancenorm._InstanceNorm)):
            raise UnsupportedModuleError(f"{path or type(part).__name__}: {type(part).__name__}: {reason}.")


def check_optimizer(optimizer: Optimizer, module: nn.Module) -> None:
    """Refuse an optimizer that does not train exactly the module, or that cannot be made private.

    Raises:
        ConfigurationError: naming what does not fit.
    """
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer.")
    if optimizer in _private or isinstance(optimizer, DPOptimizer):
        raise ConfigurationError("the optimizer is private already; give the original one, after engine.detach().")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty):
        raise ConfigurationError(
            f"{type(optimizer).__name__} evaluates the loss several times in one step; each evaluation would be a release of "
            f"its own. Use an optimizer that takes one gradient a step (SGD, Adam, ...)."
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ConfigurationError("SparseAdam needs sparse gradients, and noise is dense. Use Adam.")
    names = {p: name for name, p in module.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    twice = [names.get(p, "a parameter") for p, times in Counter(held).items() if times > 1]
    if twice:
        raise ConfigurationError(
            f"{', '.join(twice[:3])}{' and others' if len(twice) > 3 else ''} is in the optimizer more than once (tied weights "
            f"that were listed for each module?), so it would count in the norm as often and be trained on noise alone. Build "
            f"the optimizer from module.parameters(), which names each parameter once."
        )
    foreign = [list(p.shape) for p in held if p not in names]
    if foreign:
        raise ConfigurationError(
            f"{len(foreign)} of the optimizer's parameters are not the module's (shapes {foreign[:3]}), so their gradients "
            f"would not be clipped. Build the optimizer from module.parameters()."
        )
    missing = [name for p, name in names.items() if p.requires_grad and not any(p is q for q in held)]
    if missing:
        raise ConfigurationError(
            f"{', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''} can be trained but no param_group of the "
            f"optimizer holds it. Add it, or freeze it with requires_grad_(False)."
        )
    if not any(p.requires_grad for p in held):
        raise ConfigurationError("none of the optimizer's parameters is trainable (requires_grad=True).")


def check_sampling(data_loader: DataLoader[Any] | None, poisson_sampling: bool) -> None:
    """Refuse batches of which nothing is known: without a loader only Poisson draws of the stated rate can be accounted."""
    if data_loader is None and not poisson_sampling:
        raise ConfigurationError(
            "poisson_sampling=False with data_loader=None: which records share a pass is not known, so nothing but independent "
            "draws at sample_rate can be accounted. Give the data_loader, or draw batches by Poisson sampling yourself."
        )


def private_loader(
    data_loader: DataLoader[Any] | None,
    key: RunKey,
    poisson_sampling: bool,
    sample_rate: float | None,
    accumulation_steps: int,
    *,
    distributed: bool = False,
) -> DPDataLoader[Any] | None:
    """The private form of the user's loader; None where the user samples by himself."""
    if data_loader is None:
        return None
    if not isinstance(data_loader, DataLoader):
        raise ConfigurationError(
            f"data_loader is a {type(data_loader).__name__}; it must be a torch DataLoader, or None."
        )
    return DPDataLoader.from_data_loader(
        data_loader,
        distributed=distributed,
        key=key,
        poisson_sampling=poisson_sampling,
        sample_rate=sample_rate,
        accumulation_steps=accumulation_steps,
    )


def public_sizes(
    loader: DPDataLoader[Any] | None,
    sample_rate: float | None,
    expected_batch_size: float | None,
    accumulation_steps: int,
) -> tuple[float, float]:
    """The sample rate and the expected size of a logical batch: public, exact, floats.

    Raises:
        ConfigurationError: without a loader both must be given; neither may be out of range.
    """
    if expected_batch_size is not None and not (math.isfinite(expected_batch_size) and expected_batch_size > 0):
        raise ConfigurationError(f"expected_batch_size={expected_batch_size} must be positive and finite.")
    if loader is not None:
        return loader.sample_rate, float(expected_batch_size or loader.expected_batch_size)
    if sample_rate is None or expected_batch_size is None:
        raise ConfigurationError(
            "data_loader=None needs sample_rate and expected_batch_size of a logical batch: without a loader nothing else "
            "says how batches are drawn."
        )
    if not 0 < sample_rate <= 1:
        raise ConfigurationError(
            f"sample_rate={sample_rate} must lie in (0, 1]: the probability of each record for a step."
        )
    if accumulation_steps != 1:
        raise ConfigurationError(
            f"accumulation_steps={accumulation_steps} needs a data_loader that splits its draws; with data_loader=None give "
            f"the rate and size of the whole logical batch."
        )
    return float(sample_rate), float(expected_batch_size)


def planned_releases(
    loader: DPDataLoader[Any] | None, rate: float, *, epochs: float | None, total_steps: int | None
) -> tuple[float, int]:
    """The sample rate of a release and how many a training of that length makes.

    Raises:
        ConfigurationError: not exactly one of ``epochs`` and ``total_steps``, or not positive.
    """
    if (epochs is None) == (total_steps is None):
        raise ConfigurationError(f"epochs={epochs}, total_steps={total_steps}: give exactly one of them.")
    length = epochs if total_steps is None else total_steps
    if length is None or not (math.isfinite(length) and length > 0):
        raise ConfigurationError(f"{'epochs' if total_steps is None else 'total_steps'}={length} must be positive.")
    per_epoch = 1 / rate if loader is None else loader.steps_per_epoch
    if math.isinf(length * per_epoch):
        raise ConfigurationError(
            f"epochs={epochs} are more steps than can be counted; give the length of the training."
        )
    if loader is None or loader.poisson_sampling:
        if total_steps is not None and total_steps != int(total_steps):
            raise ConfigurationError(f"total_steps={total_steps} must be a whole number.")
        return rate, math.ceil(length * per_epoch) if total_steps is None else int(length)
    # Without Poisson sampling a pass is one release of rate 1, however many steps it has.
    return 1.0, math.ceil(length if total_steps is None else length / per_epoch)


def clip_function(
    clipping: str | ClipFunction,
    max_grad_norm: float | Sequence[float],
    *,
    parameters: int,
    expected_batch_size: float,
    noise_multiplier: float,
) -> ClipFunction:
    """The clip function for a name, or the one that was given.

    Raises:
        ConfigurationError: an unknown name, a bound that is not positive, or a list where one number is needed.
    """
    function = clipping if isinstance(clipping, ClipFunction) else _named(clipping, max_grad_norm, parameters)
    given = list(max_grad_norm) if isinstance(max_grad_norm, Sequence) else max_grad_norm
    if function is clipping and function.bound != given:
        raise ConfigurationError(
            f"max_grad_norm={max_grad_norm} but the clip function was built with {function.bound}; give the same to both."
        )
    function.check(parameters)
    if isinstance(function, AdaptiveClipping):
        function.configure(expected_batch_size=expected_batch_size, noise_multiplier=noise_multiplier)
    return function


def _named(clipping: str, max_grad_norm: float | Sequence[float], parameters: int) -> ClipFunction:
    choose("clipping", clipping, _CLIPPINGS)
    if clipping == "per_layer":
        single = isinstance(max_grad_norm, (int, float))
        return PerLayerClipping([max_grad_norm] * parameters if single else max_grad_norm)  # type: ignore[list-item, arg-type]
    if not isinstance(max_grad_norm, (int, float)):
        raise ConfigurationError(
            f"max_grad_norm={max_grad_norm!r} with clipping={clipping!r}: one number is needed; a list goes with "
            f"clipping='per_layer'."
        )
    types: dict[str, Callable[[float], ClipFunction]] = {
        "flat": FlatClipping, "automatic": AutomaticClipping, "adaptive": AdaptiveClipping
    }  # fmt: skip
    return types[clipping](max_grad_norm)
