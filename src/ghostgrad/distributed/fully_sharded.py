"""`fully_shard` (FSDP2) inside a private model: kept for the weights, without its own exchange of gradients.

Torch has no public name for the groups of parameters that are gathered together, so this module, and no other, reads its
private ones; a version of torch in which they are missing is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghostgrad.distributed.slices import cut_dim, is_split, local
from ghostgrad.distributed.topology import Topology
from ghostgrad.errors import ConfigurationError


@dataclass(frozen=True, eq=False)
class Unit:
    """Modules whose weights are gathered and let go together.

    Attributes:
        modules: what `fully_shard` was called on.
        parameters: the parameters of it that are split over the ranks, as the optimizer knows them.
    """

    modules: tuple[nn.Module, ...]
    parameters: tuple[nn.Parameter, ...]

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Those that require grad."""
        return [p for p in self.parameters if p.requires_grad]


class Shards:
    """The parameters of a model that `fully_shard` split over the ranks.

    While a module's weights are gathered, torch puts other parameters in the place of the split ones; `owner` leads back.
    Every method but `owner` and `take_gradients` is called by all ranks together.

    Args:
        module: the root module.
        topology: the ranks.

    Raises:
        ConfigurationError: a way of splitting that is not supported.
    """

    def __init__(self, module: nn.Module, topology: Topology) -> None:
        self.topology = topology
        self._modules = fully_sharded_modules(module)
        self._groups = [group for part in self._modules for group in _groups(part)]
        _check(self._groups, topology)
        self._names = {p: name for name, p in module.named_parameters()}
        self.units = [
            Unit(tuple(group.modules), tuple(held.sharded_param for held in group.fsdp_params))
            for group in self._groups
        ]
        self._units = {p: unit for unit in self.units for p in unit.parameters}
        self._owners: dict[nn.Parameter, nn.Parameter] = {}

    def owner(self, parameter: nn.Parameter) -> nn.Parameter:
        """The split parameter, for one that holds its gathered values; any other as it is."""
        if parameter not in self._owners:
            held = [each for group in self._groups for each in group.fsdp_params if hasattr(each, "_unsharded_param")]
            self._owners = {each._unsharded_param: each.sharded_param for each in held}
        return self._owners.get(parameter, parameter)

    def unit_of(self, parameter: nn.Parameter) -> Unit | None:
        """The unit of a split parameter."""
        return self._units.get(parameter)

    def inside(self, module: nn.Module) -> list[Unit]:
        """The units whose weights are gathered in the middle of a module's call: those of parts of it."""
        parts = {part for part in module.modules() if part is not module}
        return [unit for unit in self.units if parts.issuperset(unit.modules)]

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Inside, the weights of a module's parts are gathered, and running it exchanges nothing; also while a backward runs.

        Torch's own hooks on the parts are left out: they would take the run for the next forward.
        """
        parts = {part for unit in self.inside(module) for part in unit.modules}
        groups = [group for group in self._groups if parts.issuperset(group.modules) and not group.is_unsharded]
        kept = [(part, part._forward_pre_hooks, part._forward_hooks) for part in self._modules if part in parts]
        try:
            for group in groups:
                group.unshard()
                group.wait_for_unshard()
            for part, before, after in kept:
                part._forward_pre_hooks, part._forward_hooks = _without_fsdp(before), _without_fsdp(after)
            yield
        finally:
            for part, before, after in kept:
                part._forward_pre_hooks, part._forward_hooks = before, after
            for group in groups:
                group._to_sharded()

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is up on any rank."""
        device = self._groups[0].device if self._groups else torch.device("cpu")
        return self.topology.any_of(flags, device)

    def scatter(self, unit: Unit, sums: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Sum over the ranks, of which each gets its own part alone, in one reduce-scatter.

        Args:
            unit: whose trainable parameters.
            sums: this rank's, of full size, in float32 or wider; zeros where one is missing.

        Returns:
            This rank's part for each parameter.
        """
        parameters, size = unit.trainable, self.topology.size
        if not parameters:
            return {}
        device = self._groups[0].device
        blocks = [_by_rank(p, sums.get(p), size, device) for p in parameters]
        flat = torch.cat(blocks, dim=1)
        mine = flat.new_empty(flat.shape[1])
        _reduce_scatter(mine, flat.flatten())
        parts = torch.split(mine, [block.shape[1] for block in blocks])
        return {p: _unpadded(p, part) for p, part in zip(parameters, parts, strict=True)}

    def facts(self) -> dict[str, object]:
        """What ranks that gather weights together have to have in common, besides the model."""
        units = [[self._names.get(p, "?") for p in unit.parameters] for unit in self.units]
        policies = [(repr(group.mp_policy), group.post_forward_mesh_info is None) for group in self._groups]
        return {"what fully_shard was called on": units, "an option of fully_shard": policies}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every rank holds all weights, and running the model forward and backward exchanges nothing."""
        for part in self._modules:
            part._get_fsdp_state()._lazy_init()  # type: ignore[operator]
        before = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in self._groups]
        try:
            for group, *_ in before:
                group.post_forward_mesh_info, group.reshard_after_backward = None, False
            for part in self._modules:
                part.unshard()  # type: ignore[operator]
            yield
        finally:
            for group, mesh, after_backward in before:
                group.post_forward_mesh_info, group.reshard_after_backward = mesh, after_backward
            self.let_go()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A backward inside, after which another follows, leaves gathered what the user keeps gathered after a forward."""
        before = [(group, group.reshard_after_backward) for group in self._groups if not group._reshard_after_forward]
        try:
            for group, _ in before:
                group.reshard_after_backward = False
            yield
        finally:
            for group, after_backward in before:
                group.reshard_after_backward = after_backward

    def let_go(self) -> None:
        """Drop gathered weights, and what torch noted of forwards and backwards that are over or were left."""
        for part in self._modules:
            if part._get_fsdp_state()._is_root:  # type: ignore[operator]
                part.reset_iter_state()  # type: ignore[operator]

    def take_gradients(self) -> dict[str, Tensor]:
        """Gradients that autograd left at gathered weights, by the name of the parameter; they are gone then."""
        found = {}
        for held in (each for group in self._groups for each in group.fsdp_params):
            gathered = getattr(held, "_unsharded_param", None)
            grads = held.unsharded_accumulated_grad, None if gathered is None else gathered.grad
            held.unsharded_accumulated_grad = None
            if gathered is not None:
                gathered.grad = None
            for grad in grads:
                if grad is not None:
                    found[self._names.get(held.sharded_param, "a parameter")] = grad
        return found

    def unsynchronised(self) -> Callable[[], None]:
        """Let torch exchange no gradients by itself; returns what turns that back."""
        before = [(group, group.reduce_grads, group.all_reduce_grads) for group in self._groups]
        for group, *_ in before:
            group.reduce_grads = group.all_reduce_grads = False

        def turn_back() -> None:
            for group, reduce, all_reduce in before:
                group.reduce_grads, group.all_reduce_grads = reduce, all_reduce

        return turn_back


def _without_fsdp(hooks: Any) -> Any:
    kept = type(hooks)()
    kept.update({key: hook for key, hook in hooks.items() if not hook.__module__.startswith("torch.distributed.fsdp")})
    return kept


def _reduce_scatter(mine: Tensor, flat: Tensor) -> None:
    by_its_newer_name = getattr(dist, "reduce_scatter_single", None)
    (by_its_newer_name or dist.reduce_scatter_tensor)(mine, flat)


def fully_sharded_modules(module: nn.Module) -> list[nn.Module]:
    """The modules inside that `fully_shard` was called on."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None or not hasattr(module, "reset_iter_state"):
        raise ConfigurationError(
            f"the model is split by fully_shard of torch {torch.__version__}, which this library does not know. Use torch 2.13, "
            f"or DistributedDataParallel."
        )
    # `fully_shard([a, b])` gives both one state; it counts once.
    return list(groups) if state._modules[0] is module else []


def _check(groups: Sequence[Any], topology: Topology) -> None:
    for group in groups:
        name = type(group.modules[0]).__name__
        mesh = group.mesh_info.mesh
        if mesh.mesh.tolist() != list(range(topology.size)):
            raise ConfigurationError(
                f"{name} is split over a mesh of shape {tuple(mesh.shape)} on {topology.size} ranks. Only a mesh of one "
                f"dimension that all ranks are in, in their order, is supported (no hybrid sharding, no tensor parallelism "
                f"inside). Leave mesh= out of fully_shard."
            )
        after = group.post_forward_mesh_info
        if after is not None and after != group.mesh_info:
            raise ConfigurationError(
                f"{name} has reshard_after_forward={after.mesh.size()}; give True or False: weights that are split over a part "
                f"of the ranks between forward and backward are not supported."
            )
        for held in group.fsdp_params:
            if held.offload_to_cpu:
                raise ConfigurationError(
                    f"{name} has CPUOffloadPolicy; clipped sums stay on the device of the weights. Leave offload_policy= out."
                )


def _by_rank(parameter: nn.Parameter, whole: Tensor | None, size: int, device: torch.device) -> Tensor:
    """[ranks, elements]: the part of each rank in a row, filled up to the longest, which is the first."""
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    dim = cut_dim(parameter) or 0
    width = -(-parameter.shape[dim] // size)
    length = width * (parameter.numel() // max(1, parameter.shape[dim]))
    rows = torch.zeros(size, length, dtype=wide, device=device)
    if whole is not None:
        for row, part in zip(rows, torch.split(whole, width, dim), strict=False):
            row[: part.numel()].view(part.shape).copy_(part)
    return rows


def _unpadded(parameter: nn.Parameter, part: Tensor) -> Tensor:
    mine = local(parameter)
    return part[: mine.numel()].view(mine.shape).clone()


def split_otherwise(module: nn.Module) -> list[str]:
    """The names of parameters that are split over ranks by something else than `fully_shard`."""
    return [name for name, p in module.named_parameters() if is_split(p)]
