"""Recording on ranks that hold slices of the same layers and see the same records (tensor parallel)."""

from __future__ import annotations

from collections.abc import Callable

from ghostgrad.distributed import TensorParallel, is_split
from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.recording.modules import Modules
from ghostgrad.recording.plan import GENERIC


class Sliced:
    """What the recorder does besides, where weights are cut into slices. All ranks run the same forwards and backwards.

    Args:
        slices: the ranks.
        modules: the modules that are watched.
    """

    def __init__(self, slices: TensorParallel, modules: Modules) -> None:
        self._slices, self._modules = slices, modules
        self._device = next(modules.root.parameters()).device

    def any_of(self, flag: bool) -> bool:
        """Whether it is up on any rank: what a slice shows, another may not."""
        return self._slices.any_of([flag], self._device)[0]

    def rehearse(self, run: Callable[[], bool], n: int) -> bool:
        """Rehearse this batch; returns whether it came to an end on all ranks, with several records.

        Raises:
            GhostgradError: on every rank, if it failed on one.
        """
        if not n:
            return False
        with self._slices.together():
            self._check_plain()
            done = run()
            self._check_plain()
        self._slices.agree({})
        return not self.any_of(not done) and n > 1

    def _check_plain(self) -> None:
        """A layer whose weights are cut is read by its own rule, in its own call."""
        plan = self._modules.plan
        for path, module in self._modules.root.named_modules():
            cut = [name for name, p in plan.claims(path, module).items() if is_split(p)]
            if cut and (plan.rule(path, module) is GENERIC or path in plan.layouts):
                raise UnsupportedModuleError(
                    f"{path or type(module).__name__}: {cut} are cut into slices by parallelize_module, and their gradients "
                    f"cannot be found in the plain way (grad_sample_mode='functorch', weights used outside their module, inputs "
                    f"that do not lead with the batch). Leave this layer whole."
                )
