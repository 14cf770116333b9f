"""The private optimizer: one class, whatever the clipping, the noise and the sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ghostgrad.accounting import Accountant
from ghostgrad.clipping import ClipFunction, ClippedSum, Measurement, trainable
from ghostgrad.distributed import Alone, Topology, is_split, like, local, runs
from ghostgrad.errors import ConfigurationError, GhostgradError, PrivacyError
from ghostgrad.journal import Journal
from ghostgrad.noise import NoiseMechanism
from ghostgrad.recording.scalers import scalers
from ghostgrad.schedulers import Schedule, value_at
from ghostgrad.spending import Budget, Spending
from ghostgrad.spent import Spent

_OWN_RELEASE = 1
"""The noise address of what the clip function releases; the gradient has 0."""

_COUNTS = 2
"""The noise address of the counts of a measurement."""


class DPOptimizer(Optimizer):
    """Makes the user's optimizer step on ``(clipped sum + noise) / expected_batch_size``.

    `param_groups`, `state` and `defaults` are those of the original, so learning-rate schedulers and checkpoints work on
    either; hooks registered on this optimizer run around its logical steps. The original's own ``step`` raises while it is
    private.

    One logical `step()` releases the sum of the clipped gradients of one logical batch plus independent Gaussian noise of
    standard deviation ``noise_multiplier * max_grad_norm`` for *every* trainable parameter, also one that got no gradient,
    also when the batch was empty. The release is noted by the accountant before the parameters change. Guarantee: that of
    the accountant, under the neighbouring relation that ``engine`` names.

    Made by `PrivacyEngine.make_private`; not meant to be built by hand.

    Attributes:
        noise_multiplier: noise standard deviation divided by sensitivity, or a function of the step; may be changed
            between logical steps.
        max_grad_norm: C; may be changed between logical steps.
        expected_batch_size: records in a logical batch on average, ``sample_rate * n``; public, a float.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        function: ClipFunction,
        total: ClippedSum,
        noise: NoiseMechanism,
        noise_multiplier: Schedule,
        expected_batch_size: float,
        loss_reduction: str,
        accountant: Accountant,
        spending: Spending,
        budget: Budget | None = None,
        bound_schedule: Callable[[int], float] | None = None,
        topology: Topology | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.original_optimizer = optimizer
        # Optimizer.__init__ would take the parameters over; __setstate__ only gives this object its hooks.
        self.__setstate__({})
        self.clip_function, self.total, self.noise = function, total, noise
        self.noise_multiplier, self.expected_batch_size = noise_multiplier, expected_batch_size
        self.loss_reduction, self.accountant, self.spending, self.budget = loss_reduction, accountant, spending, budget
        self.bound_schedule = bound_schedule
        self.topology = topology or Alone()
        self.measurement: Measurement | None = None
        """What is counted of each logical batch for a share of its budget."""
        self.measured_shares: set[float] = set()
        """The shares that were ever spent on counts."""
        self.journal = journal or Journal(Spent(accountant), None, self.topology)
        self.steps = 0
        """Logical steps made."""
        self.noise_step = 0
        """Address of the last noise. Moves before it is drawn: an interrupted or resumed step must not repeat it."""
        self._released = False
        self._written: dict[nn.Parameter, Tensor] = {}
        self._inner_step = optimizer.step
        optimizer.step = _fused_shut(optimizer)  # type: ignore[method-assign]

    # ------------------------------------------------------------------ the original's state

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The original's parameter groups."""
        return self.original_optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The original's state."""
        return self.original_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The original's default options."""
        return self.original_optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        """The original's state dict: a checkpoint of either loads into the other."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict into the original."""
        self.original_optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Not to be copied or pickled: a copy would release the same sum with the same noise, which no ledger notes.

        Raises:
            PrivacyError: always.
        """
        raise PrivacyError(
            "a DPOptimizer is not copied or pickled: the copy would release the same clipped sum and draw the same noise without "
            "being accounted. Use engine.save_checkpoint, or save engine.state_dict(), optimizer.state_dict() and the model's."
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the original; they are noised from the next step on."""
        self.original_optimizer.add_param_group(param_group)

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters, in order."""
        return trainable(self.param_groups)

    @property
    def max_grad_norm(self) -> Any:
        """The clip bound: a number, or one for each parameter with per-layer clipping."""
        bound = self.clip_function.bound
        return list(bound) if isinstance(bound, list) else bound

    @max_grad_norm.setter
    def max_grad_norm(self, value: Any) -> None:
        if self.total.holds and value != self.max_grad_norm:
            raise PrivacyError(
                f"max_grad_norm was set to {value} while a logical batch is being summed: its records would be clipped to "
                f"different bounds. Change it right after optimizer.step()."
            )
        self.clip_function.rebound(value)

    @property
    def grad_samples(self) -> list[Tensor]:
        """The per-sample gradients ``p.grad_sample`` of the trainable parameters, with ``grad_sample_mode="hooks"``."""
        return [p.grad_sample for p in self.params if hasattr(p, "grad_sample")]

    @property
    def accumulated_iterations(self) -> int:
        """How many draws of the loader are in the sum now, at least 1."""
        return max(1, len(self.total.logical_batches))

    # ------------------------------------------------------------------ stepping
    # Never compiled, in a training step that is: the noise would have other last bits, and the ledger's digests with it.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``p.grad`` (always to None) and ``p.grad_sample``, and drop the clipped sum.

        While the physical batches of a logical batch are still coming in the sum is kept, so a loop that clears after
        every physical batch trains on all of them.
        """
        self._drop_gradients()
        self.total.clear_for_zero_grad()

    def _drop_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
                if hasattr(p, "grad_sample"):
                    del p.grad_sample
        self._written.clear()

    def discard_partial(self) -> None:
        """Drop the sum of a logical batch that was left in the middle."""
        self.total.discard_partial()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Finish the logical batch: add noise, scale, note the release, and let the original optimizer step.

        In the middle of a logical batch (a physical batch of a `BatchMemoryManager`, a part of ``accumulation_steps``)
        nothing is released and the call returns.

        Args:
            closure: evaluates the loss and calls backward, once.

        Returns:
            What the closure returned.

        Raises:
            BudgetExhausted: the step would pass ``target_epsilon``; nothing was changed.
            PrivacyError: a parameter holds a gradient that the clipper did not produce.
        """
        self._answer_grad_scaler()
        if self._released:
            raise PrivacyError(
                "this DPOptimizer was detached; step with the original optimizer, or call make_private again."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif self._only_makes_state:
            self._inner_step()
            return None
        self._refuse_foreign_gradients()
        if self.total.complete:
            self._release()
        return loss

    @property
    def _only_makes_state(self) -> bool:
        """`torch.distributed.checkpoint` steps with gradients of zeros and a rate of 0, to see what state there will be.

        It moves nothing and knows no record, so it is no release.
        """
        if self.total.holds or any(group.get("lr") != 0 for group in self.param_groups):
            return False
        return all(p.grad is not None and not local(p.grad).any() for p in self.params)

    # Hooks that are registered on this optimizer run around what is a step: not around the physical pieces of one.
    step.hooked = True

    @Optimizer.profile_hook_step
    @torch.no_grad()
    def _release(self) -> None:
        self._refuse_foreign_gradients()  # a hook may have put some there
        self._refuse_unrecorded()
        self.total.check_bound(self.clip_function.bound)
        noise_multiplier = value_at(self.noise_multiplier, self.steps, "noise_multiplier")
        draws, statistic = self._over_ranks(noise_multiplier)
        epochs = set(self.total.epochs)
        releases = self.spending.releases(noise_multiplier, draws, epochs)
        again = self.journal.open((p for group in self.param_groups for p in group["params"]), self.noise_step + 1)
        if self.budget is not None and not again:
            self.budget.check(releases)
        # Noted first: a crash from here on leaves the ledger above what was released, never below.
        self.journal.note(self.accountant, [] if again else releases)
        self.spending.note(noise_multiplier, epochs)
        self.noise.follow(repr(self._step_facts(noise_multiplier)))
        self.noise_step += 1
        size = self.expected_batch_size * max(1, draws)
        left = self._measure(noise_multiplier, size)
        self._write_gradients(left, size)
        try:
            self.journal.close(releases, self._written.values(), self.noise_step)
        except GhostgradError:
            self.total.close()
            self._drop_gradients()
            raise
        self._update_clip_function(left, size, statistic)
        self.total.close()
        self.steps += 1
        if self.bound_schedule is not None:
            self.clip_function.rebound(value_at(self.bound_schedule, self.steps, "max_grad_norm"))
        self._inner_step()

    def _over_ranks(self, noise_multiplier: float) -> tuple[int, float]:
        """The draws in this step (a rank may have left an empty share out) and the clip function's statistic, of all ranks.

        Raises:
            PrivacyError: on every rank, where they are about to take different steps.
        """
        draws, statistic = self.total.logical_batches, self.total.statistic
        if self.topology.size == 1:
            return len(draws), statistic
        found = self.topology.collect((self._step_facts(noise_multiplier), draws, statistic))
        for rank, (facts, _, _) in enumerate(found):
            differ = [name for name, fact in facts.items() if fact != found[0][0][name]]
            if differ:
                raise PrivacyError(
                    f"ranks 0 and {rank} are about to take different steps: {differ[0]} is not the same. Their sums belong to "
                    f"different draws, or are clipped, noised or applied differently, so the step is not the one that is "
                    f"accounted. Run the same loop on every rank: the same batches (an empty or bad one too), schedules and "
                    f"frozen layers."
                )
        if self.topology.shares_records:
            statistic = math.fsum(share for *_, share in found)
        return len(set().union(*(draws for _, draws, _ in found))), statistic

    def _step_facts(self, noise_multiplier: float) -> dict[str, object]:
        """What ranks compare in every step, and what its noise is bound to."""
        groups = [
            {name: _plain(value) for name, value in group.items() if name != "params"}
            | {"params": [p.requires_grad for p in group["params"]]}
            for group in self.param_groups
        ]
        return {
            "the draws since the last step": self.total.span,
            "noise_multiplier": noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "what a Monitor counts": self.measurement and (self.measurement.share, self.measurement.bins),
            "expected_batch_size": self.expected_batch_size,
            "an option of a param_group, or which parameters are trainable,": repr(groups),
        }

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """What is left for the clipped sum of a step's noise multiplier when all else in the step has its share."""
        left = noise_multiplier if self.measurement is None else self.measurement.rest(noise_multiplier)
        return self.clip_function.effective_noise_multiplier(left)

    def _measure(self, noise_multiplier: float, size: float) -> float:
        """Release the counts of the measurement, if there is one; the noise multiplier that is left for the rest."""
        if self.measurement is None:
            return noise_multiplier
        counts = self.measurement.count(self.total.seen, self.clip_function.sensitivity)
        self.topology.add_up([counts])
        self.noise.add_(counts, std=self.measurement.std(noise_multiplier), step=self.noise_step, index=_COUNTS)
        self.measurement.release(counts, expected_records=size)
        self.measured_shares.add(self.measurement.share)
        return self.measurement.rest(noise_multiplier)

    def _write_gradients(self, noise_multiplier: float, size: float) -> None:
        std = self.clip_function.effective_noise_multiplier(noise_multiplier) * self.clip_function.sensitivity
        divisor = size if self.loss_reduction == "mean" else 1.0
        everything = [p for group in self.param_groups for p in group["params"]]
        # Where each begins in the step's one vector of noise. Frozen ones keep their place: thawing one moves no other.
        places = accumulate((p.numel() for p in everything), initial=0)
        trained = [(place, p) for place, p in zip(places, everything, strict=False) if p.requires_grad]
        sums = [self.total.take(p) for _, p in trained]
        # Of a parameter that is split over the ranks, each has its part of the sum of all, and draws the noise of that part.
        self.topology.add_up([part for part, (_, p) in zip(sums, trained, strict=True) if not is_split(p)])
        parts = [
            (place + offset, run)
            for part, (place, p) in zip(sums, trained, strict=True)
            for offset, run in runs(p, part)
        ]
        self.noise.add_all_(parts, std=std, step=self.noise_step)
        if sums:
            torch._foreach_div_(sums, divisor)
        for _, p in trained:
            p.grad = like(p, _towards_zero(sums.pop(0), p.dtype))
            self._written[p] = p.grad

    def _update_clip_function(self, noise_multiplier: float, size: float, statistic: float) -> None:
        def noise() -> float:
            one = torch.zeros(1, dtype=torch.float64)
            self.noise.add_(one, std=1.0, step=self.noise_step, index=_OWN_RELEASE)
            return float(one)

        self.clip_function.update(
            statistic=statistic,
            expected_batch_size=size,
            noise_multiplier=noise_multiplier,
            noise=noise,
        )

    def _refuse_foreign_gradients(self) -> None:
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if p.grad is None:
                continue
            if p.grad is self._written.get(p):
                raise PrivacyError(
                    "step() was called again before zero_grad(): the gradient of the last step is still there. Call "
                    "optimizer.zero_grad() after each step."
                )
            if bool(local(p.grad).count_nonzero()):
                raise PrivacyError(
                    f"parameter {number} of the optimizer (shape {list(p.shape)}) holds a gradient that the clipper did not "
                    f"produce, so it is not bounded. It comes from a backward in eval mode, through another module, or was "
                    f"set by hand. Call model.train() before the forward, or optimizer.zero_grad() to drop it."
                )
            p.grad = None

    def _refuse_unrecorded(self) -> None:
        if self.total.passed_by and not self.total.holds:
            raise PrivacyError(
                "gradients went through the model but not through torch.autograd.backward as make_private found it (a reference "
                "to it from before, or torch.autograd.grad alone), so nothing was clipped for this step. Call loss.backward()."
            )
        if not (math.isfinite(self.expected_batch_size) and self.expected_batch_size > 0):
            raise ConfigurationError(f"expected_batch_size={self.expected_batch_size} must be positive and finite.")

    def _answer_grad_scaler(self) -> None:
        stepped_by_one = hasattr(self, "grad_scale") or hasattr(self, "found_inf")
        if stepped_by_one and not scalers.answer(self):
            raise PrivacyError(
                "this step was called by a GradScaler that did not scale the loss with torch's own GradScaler.scale (another "
                "class, or a reference to the method from before make_private), so what to divide the gradients by is not "
                "known. Use torch.amp.GradScaler, or leave it out: autocast with bfloat16 needs none."
            )

    _step_supports_amp_scaling = True  # a GradScaler then calls step() always, whether or not it found an overflow

    def release_original(self) -> None:
        """Give the original optimizer its own step back."""
        self._released = True
        vars(self.original_optimizer).pop("step", None)
        if self._inner_step != self.original_optimizer.step:  # a scheduler had wrapped it before
            self.original_optimizer.step = self._inner_step  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return (
            f"DPOptimizer({type(self.original_optimizer).__name__}, clipping={self.clip_function.name!r}, "
            f"max_grad_norm={self.max_grad_norm}, noise_multiplier={self.noise_multiplier}, "
            f"expected_batch_size={self.expected_batch_size:g})"
        )


def _plain(value: Any) -> Any:
    """A number that is the same before and after it was saved, whatever type it had."""
    number = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    return float(value) if number and not isinstance(value, bool) else value


def _towards_zero(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in a narrower type, no element larger than it was: rounding up could pass the bound."""
    if value.dtype == dtype:
        return value
    cast = value.to(dtype)
    over = cast.to(value.dtype).abs() > value.abs()
    return torch.where(over, torch.nextafter(cast, torch.zeros_like(cast)), cast)


def _fused_shut(optimizer: Optimizer) -> Callable[..., Any]:
    def step(*args: Any, **options: Any) -> Any:
        raise PrivacyError(
            f"this {type(optimizer).__name__} was made private; stepping it directly would train without clipping and noise. "
            f"Call step() on the optimizer that make_private returned, or engine.detach() to end private training."
        )

    # Schedulers that were built on the original look for this mark, and warn without it.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step
