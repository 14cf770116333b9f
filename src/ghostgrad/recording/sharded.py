"""Recording on ranks that hold a share of the parameters each and gather the weights of a layer for its call (FSDP2).

All of them go through the same layers in step, as often, whether or not they have records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from torch import nn

from ghostgrad.distributed import Shards, Unit
from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.recording.hooks import Hook
from ghostgrad.recording.modules import Modules
from ghostgrad.recording.probe import Gate
from ghostgrad.tree import flatten


class _Receiver(Protocol):
    def hand_over(self, unit: Unit) -> None:
        """The sums of a unit are complete on this rank."""


class Sharded:
    """What the recorder does besides, where parameters are split over the ranks.

    Args:
        shards: the ranks and what they hold.
        modules: the modules that are watched.
        sink: where sums are handed over, unit by unit, so that a rank does not hold those of the whole model.
    """

    def __init__(self, shards: Shards, modules: Modules, sink: _Receiver) -> None:
        self._shards, self._modules, self._sink = shards, modules, sink
        self.owner = shards.owner
        self._waiting: dict[Unit, None] = {}
        """Units that the gradient has reached but not gone through, in that order."""
        self._kept = False
        """Whether weights stayed gathered for a pass that is still to come."""
        self._read = False
        """Whether any batch was rehearsed, be it one of single records."""

    def any_of(self, flag: bool) -> bool:
        """Whether it is up on any rank."""
        return self._shards.any_of([flag])[0]

    # ------------------------------------------------------------------ the first batch

    def rehearse(self, run: Callable[[], bool], n: int) -> bool:
        """Rehearse this batch where that shows something new, on all ranks at once, with all weights gathered.

        Ranks with fewer than two records take over what another one found.

        Returns:
            Whether a batch with several records was rehearsed to the end.

        Raises:
            GhostgradError: on every rank, if it failed on one.
        """
        several, one = self._shards.any_of([n > 1, n == 1])
        if not several and (self._read or not one):
            return False
        topology, plan = self._shards.topology, self._modules.plan
        with self._shards.gathered():
            with topology.together():
                done = bool(n) and run()
                plan = self._modules.plan
                self._check_units()
            topology.agree({})
            found = [each for each in topology.collect((n, plan.found()) if done else None) if each is not None]
            self._read = self._read or bool(found)
            best = [each for each in found if each[0] > 1] or found
            if best and n < 2:
                plan.adopt(best[0][1])
                for path in plan.enclosing:
                    self._modules.watch(path)
        return any(records > 1 for records, _ in found)

    def _check_units(self) -> None:
        """Refuse modules that answer for weights of their parts which are gathered only when these are called."""
        plan = self._modules.plan
        for path, taken in plan.enclosing.items():
            module = self._modules.root.get_submodule(path)
            inside = {p for unit in self._shards.inside(module) for p in unit.parameters}
            split = [name for name, p in taken.items() if self.owner(p) in inside]
            if split:
                raise UnsupportedModuleError(
                    f"{path or type(module).__name__}: the gradients of {split[:3]} are found by running this "
                    f"{type(module).__name__} again on single records, but fully_shard was called on modules inside it, which "
                    f"hold them. Call fully_shard on {path or 'the model'} alone and not inside it."
                )

    # ------------------------------------------------------------------ handing sums over

    def gates(self) -> list[Any]:
        """Put a gate in front of every module that weights are gathered for; returns the handles."""
        return [
            module.register_forward_pre_hook(Hook(self._gate(unit)), with_kwargs=True)
            for unit in self._shards.units
            if unit.trainable
            for module in unit.modules
        ]

    def _gate(self, unit: Unit) -> Callable[..., Any]:
        def gate(module: nn.Module, args: Any, kwargs: Any) -> Any:
            leaves, rebuild = flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
            if self._modules.is_paused or self._modules.tape is None or not places:
                return None
            passed = Gate.apply(lambda: self._hand_over(unit), *[leaves[i] for i in places])  # type: ignore[no-untyped-call]
            for i, tensor in zip(places, passed, strict=True):
                leaves[i] = tensor
            return rebuild(leaves)

        return gate

    def note(self, parameters: Iterable[nn.Parameter]) -> None:
        """In the pass that sums: the gradient reached these."""
        for parameter in parameters:
            unit = self._shards.unit_of(self.owner(parameter))
            if unit is not None:
                self._waiting[unit] = None

    def _hand_over(self, unit: Unit) -> None:
        if unit in self._waiting:
            del self._waiting[unit]
            self._sink.hand_over(unit)

    @contextmanager
    def passing(self, *, again: bool) -> Iterator[None]:
        """One backward through the model; ``again`` if another will follow, on all ranks."""
        self._kept = again
        try:
            with self._shards.kept() if again else nullcontext():
                yield
        except BaseException:
            self.recover(failed=True)
            raise

    def recover(self, *, failed: bool = False) -> None:
        """Let go what a backward left that failed, or whose next pass never came: weights of then must not be used later."""
        self._waiting.clear()
        if failed or self._kept:
            self._kept = False
            self._shards.let_go()

    def hand_over_rest(self) -> None:
        """The pass is over: units without a gate that fired (the first layers) have their sums too."""
        for unit in list(self._waiting):
            self._hand_over(unit)
