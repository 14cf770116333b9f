"""What can be known to be wrong from the modules alone, before any record was seen.

This list names the layers that are common and always wrong. It is not the guarantee: that records do not mix is proved
on the first batch, whoever wrote the module, and a use of a parameter that no norm covers is refused in the backward.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ghostgrad.layers import find_rule
from ghostgrad.validation.faults import IllegalModuleConfigurationError, ModuleFault, ShouldReplaceModuleError


def faults(module: nn.Module) -> list[ModuleFault]:
    """Every fault of ``module`` and of the modules in it; a module that is used in several places is reported once."""
    found = [fault for path, part in module.named_modules() if (fault := _fault(path, part)) is not None]
    if not any(p.requires_grad for p in module.parameters()):
        found.append(
            IllegalModuleConfigurationError(
                "",
                f"{type(module).__name__} has no trainable parameter, so there is nothing to train privately",
                "set requires_grad=True on the parameters to be trained",
            )
        )
    return found


def mixes_records(module: nn.Module) -> bool:
    """Whether this layer, in the mode it is in now, normalises a record by statistics of other records.

    A BatchNorm does in train mode, whether or not it has parameters that train, and always when it keeps no running
    statistics. In eval mode with running statistics it is a fixed affine map of each record.

    >>> norm = nn.BatchNorm1d(4, affine=False)
    >>> mixes_records(norm), mixes_records(norm.eval())
    (True, False)
    """
    if not isinstance(module, _BatchNorm):
        return False
    return module.training or (module.running_mean is None and module.running_var is None)


def _fault(path: str, module: nn.Module) -> ModuleFault | None:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if any(is_lazy(tensor) for tensor in own):
        return IllegalModuleConfigurationError(
            path,
            f"{type(module).__name__} has parameters without a shape yet",
            "run one forward pass on made-up inputs first",
        )
    if mixes_records(module):
        return _batch_norm(path, module)
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return ShouldReplaceModuleError(
            path,
            f"{describe(module)} (track_running_stats=True) keeps statistics of the private records, without noise",
            "ModuleValidator.fix(module) puts one without them in its place, with the same affine weights",
        )
    rule = find_rule(module)
    reason = rule.refuses(module) if rule is not None else None
    return None if reason is None else IllegalModuleConfigurationError(path, f"{describe(module)}: {reason}")


def _batch_norm(path: str, module: nn.Module) -> ModuleFault:
    mode = "in train mode" if module.training else "in eval mode without running statistics"
    frozen = (
        f", or freeze its statistics with .get_submodule({path!r}).eval()" if module.running_mean is not None else ""
    )
    return ShouldReplaceModuleError(
        path,
        f"{describe(module)} {mode} normalises every record by the statistics of the whole batch, so one record "
        f"changes the gradients of all others and clipping does not bound it",
        f"ModuleValidator.fix(module) puts GroupNorm in its place, with the same affine weights{frozen}",
    )


def describe(module: nn.Module) -> str:
    """Type and width of a normalisation layer, or the type alone.

    >>> describe(nn.BatchNorm2d(64))
    'BatchNorm2d(64)'
    """
    width = getattr(module, "num_features", None)
    return type(module).__name__ if width is None else f"{type(module).__name__}({width})"
