"""Canaries in the gradients: vectors of the largest allowed norm that coins add to the clipped sum, before the noise."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ghostgrad.audit.evidence import Coins, Evidence, Floats, count_errors
from ghostgrad.audit.result import AuditResult, Claim, judge
from ghostgrad.audit.scores import check_optimizer
from ghostgrad.errors import ConfigurationError, choose
from ghostgrad.noise import NoiseMechanism
from ghostgrad.optimizer import DPOptimizer
from ghostgrad.schedulers import value_at

_HALFWAY = 0.5
"""The threshold between 0 (left out) and 1 (in), for any noise; fixed before anything was released."""


@dataclass(frozen=True)
class _Canary:
    coin: bool
    direction: Tensor
    """Of norm 1, flat; a coordinate's number where it is a single one."""
    before: float
    """What the clipped sum had in that direction."""


@dataclass(frozen=True)
class _Step:
    """A logical step between its canaries and its release."""

    number: int
    size: float
    """C."""
    divisor: float
    canaries: dict[int, _Canary]


class _WithCanaries:
    """The optimizer's noise, which sees the clipped sums first."""

    def __init__(self, inner: NoiseMechanism, add: Callable[[Sequence[Tensor]], None]) -> None:
        self.inner, self._add, self.name = inner, add, inner.name

    def add_(self, tensor: Tensor, *, std: float, step: int, index: int, offset: int = 0) -> None:
        self.inner.add_(tensor, std=std, step=step, index=index, offset=offset)

    def add_all_(self, parts: Sequence[tuple[int, Tensor]], *, std: float, step: int) -> None:
        self._add([whole for _, whole in parts])  # in one process no parameter is cut
        self.inner.add_all_(parts, std=std, step=step)

    def follow(self, facts: str) -> None:
        self.inner.follow(facts)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)


class GradientCanaries:
    """Audits the noise of a private optimizer in the loop as it is: a context around some of its steps.

    In every logical step, for every trainable parameter, a fair coin adds a vector of norm C to the clipped sum, where the
    library's noise is then added to it and the result divided and released through ``p.grad``. The score of a canary is the
    released value in its direction, less what the records' clipped sum had there, in units of C: 0 or 1, and the noise. Each
    step is one release of noise multiplier sigma; too little noise, or none on some parameter, shows as scores that tell 0 from
    1 too well.

    What is added does not depend on the records, so their guarantee is that of the accountant, as without the audit. The model
    is disturbed by it: audit a rehearsal, and throw its model away. Sampling and clipping happen before the sum and are not
    audited here; for these use `OneRun` or ``engine.audit``.

    Args:
        optimizer: as ``make_private`` returned it. Clipping of any kind; one process.
        directions: ``"dirac"``, a single random element of the parameter (default), or ``"random"``, a random vector.
        after: canaries of a training that this one resumes. The same directions are used, and for steps of the same
            number (``optimizer.steps``) the earlier noise is subtracted as well: noise that comes again leaves none.
        seed: makes directions and coins reproducible.

    Raises:
        ConfigurationError: another optimizer, several processes, an unknown kind of direction.

    >>> from ghostgrad import PrivacyEngine
    >>> model = torch.nn.Linear(3, 2)
    >>> model, optimizer, _ = PrivacyEngine(seed=0).make_private(
    ...     module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.1,
    ...     expected_batch_size=4, noise_multiplier=1.0, max_grad_norm=1.0)
    >>> with GradientCanaries(optimizer, seed=0) as canaries:
    ...     for _ in range(100):
    ...         model(torch.randn(4, 3)).pow(2).mean().backward()
    ...         _ = optimizer.step()
    ...         optimizer.zero_grad()
    >>> canaries.result(delta=1e-5).verdict
    'consistent'
    """

    def __init__(
        self,
        optimizer: DPOptimizer,
        *,
        directions: Literal["dirac", "random"] = "dirac",
        after: GradientCanaries | None = None,
        seed: int | None = None,
    ) -> None:
        check_optimizer(optimizer)
        if optimizer.topology.size > 1:
            raise ConfigurationError(
                f"the optimizer trains on {optimizer.topology.size} processes, each of which would add canaries of its own. "
                f"Audit in one process; the noise is the same."
            )
        choose("directions", directions, ("dirac", "random"))
        self._optimizer, self._dirac, self._after = optimizer, directions == "dirac", after
        coins = secrets.randbits(128) if seed is None else seed
        self._coins = np.random.default_rng([coins, 1])
        self._directions: int = after._directions if after is not None else coins
        self._step: _Step | None = None
        self._noise_multipliers: list[float] = []
        self._scores: dict[tuple[int, int], float] = {}
        self._included: dict[tuple[int, int], bool] = {}

    def __enter__(self) -> GradientCanaries:
        self._noise = self._optimizer.noise
        self._optimizer.noise = _WithCanaries(self._noise, self._add)
        self._handle = self._optimizer.register_step_post_hook(self._observe)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._optimizer.noise = self._noise
        self._handle.remove()

    # ------------------------------------------------------------------ a step

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _add(self, sums: Sequence[Tensor]) -> None:
        optimizer, canaries = self._optimizer, {}
        size = optimizer.clip_function.sensitivity
        trained = [index for index, p in enumerate(self._parameters) if p.requires_grad]
        for index, total in zip(trained, sums, strict=True):
            direction = self._direction(index, total)
            canary = _Canary(bool(self._coins.random() < 0.5), direction, _along(total, direction))
            if canary.coin:
                _add_along(total, direction, size)
            canaries[index] = canary
        mean = optimizer.loss_reduction == "mean"
        divisor = optimizer.expected_batch_size * optimizer.accumulated_iterations if mean else 1.0
        self._step = _Step(optimizer.steps, size, divisor, canaries)
        self._noise_multipliers.append(value_at(optimizer.noise_multiplier, optimizer.steps, "noise_multiplier"))

    def _direction(self, index: int, total: Tensor) -> Tensor:
        draws = np.random.default_rng([self._directions, 2, self._optimizer.steps, index])
        if self._dirac:
            return torch.tensor(int(draws.integers(total.numel())))
        vector = torch.from_numpy(draws.standard_normal(total.numel()))
        vector /= torch.linalg.vector_norm(vector)
        return vector.to(total.device, total.dtype)

    def _observe(self, *_: object) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        held = self._parameters
        for index, canary in step.canaries.items():
            grad = held[index].grad
            if grad is None:
                continue
            wide = grad.detach() if grad.dtype == torch.float64 else grad.detach().float()
            at = (step.number, index)
            self._scores[at] = (_along(wide, canary.direction) * step.divisor - canary.before) / step.size
            self._included[at] = canary.coin

    # ------------------------------------------------------------------ the finding

    @property
    def scores(self) -> Floats:
        """The scores, by step and parameter: 0 or 1, and noise of standard deviation sigma. They are the noise: keep them."""
        return np.array([self._scores[at] for at in sorted(self._scores)])

    @property
    def included(self) -> Coins:
        """The coins, in the same order."""
        return np.array([self._included[at] for at in sorted(self._scores)])

    def result(self, *, delta: float, confidence: float = 0.95) -> AuditResult:
        """Hold the errors of all canaries, and of those of each parameter, against one release at the noise multiplier claimed.

        Args:
            delta: where epsilon is reported. The verdict looks at the whole curve.
            confidence: of the verdict, over all parameters together. Default 0.95.

        Raises:
            ConfigurationError: no step was made inside the context.
        """
        if not self._scores:
            raise ConfigurationError("no logical step was made inside the context, so there is nothing to audit.")
        names = sorted({index for _, index in self._scores})
        looks: dict[str, Callable[[float], Evidence]] = {}
        for text, scores in self._kinds().items():
            for index in [None, *names] if len(names) > 1 else [None]:
                chosen = {at: score for at, score in scores.items() if index in (None, at[1])}
                if chosen:
                    where = "all parameters" if index is None else f"parameter {index} of the optimizer"
                    looks[f"{where}{text}"] = self._look(chosen)
        return judge(
            looks,
            Claim.of_gaussian(min(self._noise_multipliers)),
            attack="vectors of norm C added to the clipped sum by coins",
            delta=delta,
            confidence=confidence,
            canaries=len(names),
            runs=len(self._noise_multipliers),
            assumes="noise that is independent from step to step and from parameter to parameter, as it is claimed to be",
            does_not_show=(
                "Sampling, clipping and the number of steps are not audited: epsilon is that of one step, for a record in it.",
            ),
            may_be_published=(
                "The counts depend on the noise and on the coins only. The scores are the noise itself in the canaries' "
                "directions: with them the released gradients have none there. Publish neither scores nor, if the audited "
                "model is to be published, anything of the audit; audit a rehearsal and throw its model away."
            ),
        )

    def _kinds(self) -> dict[str, dict[tuple[int, int], float]]:
        """Scores as they are and, after a resume, less the earlier noise where the step has the same number."""
        kinds = {"": self._scores}
        if self._after is not None:
            before = {at: score - self._after._included[at] for at, score in self._after._scores.items()}
            kinds[", less the noise before the resume"] = {
                at: score - before[at] for at, score in self._scores.items() if at in before
            }
        return kinds

    def _look(self, scores: Mapping[tuple[int, int], float]) -> Callable[[float], Evidence]:
        values = np.array(list(scores.values()))
        coins = np.array([self._included[at] for at in scores])
        return lambda level: count_errors(values, coins, _HALFWAY, gaussian=True)


def _along(vector: Tensor, direction: Tensor) -> float:
    flat = vector.reshape(-1)
    return float(flat[direction] if direction.dim() == 0 else flat @ direction)


def _add_along(total: Tensor, direction: Tensor, size: float) -> None:
    if direction.dim() == 0:
        place = np.unravel_index(int(direction), total.shape) if total.dim() else ()
        total[tuple(int(i) for i in place)] += size
    else:
        total += (size * direction).view(total.shape)
