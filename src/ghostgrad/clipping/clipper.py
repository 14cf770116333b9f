"""When norms, factors and sums are worked out, and what is kept in between. The result is the same in every mode."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from ghostgrad.clipping.accumulator import ClippedSum
from ghostgrad.clipping.functions import ClipFunction
from ghostgrad.clipping.measurement import Seen
from ghostgrad.distributed import Shards, TensorParallel, Unit
from ghostgrad.errors import ConfigurationError, PrivacyError
from ghostgrad.free_memory import free_memory
from ghostgrad.gradients import Explicit, Use, join
from ghostgrad.recording import Tape

_ROOM = 1 << 24
"""How many elements of per-sample gradients the one-pass form may keep beyond what they are made of: 64 MiB in float32."""

_WORTH_A_LOOK = 1 << 28
"""Bytes of per-sample gradients from which the free memory is asked for."""


_LEAST_BOUND = 1e-12
"""In single precision squares below 1e-38 vanish: a gradient of this norm still has one, spread over 1e13 elements."""


class Mode(Enum):
    """How the clipped sum comes about."""

    HOOKS = "hooks"
    """Per-sample gradients are materialised and shown as ``p.grad_sample``."""
    FUNCTORCH = "functorch"
    """As hooks, every module through the generic rule."""
    BK = "bk"
    """One backward: the uses are kept, in their smallest form, until the factors are known."""
    GHOST = "ghost"
    """Two backwards: the first keeps nothing but norms, the second adds up."""


class Clipper:
    """Receives the uses of one backward and adds their clipped sum to the step's.

    Guarantee: what one record adds to the sum has norm at most ``function.sensitivity``, whatever the record holds; a record
    whose gradient is not finite adds nothing. Neighbouring: add or remove one record.

    Args:
        function: norms to factors.
        total: where the sums of the logical batch add up.
        mode: what is kept between norms and sums.
        shards: where parameters are split over ranks, these add up each unit's sums at once and keep their own part.
        slices: where layers are cut into slices, the ranks that hold them, which join their norms.
        max_memory: bytes of uses that the one-pass form may keep; of weights beyond it only the norm is taken, and a second
            backward adds them up.
    """

    def __init__(
        self,
        function: ClipFunction,
        total: ClippedSum,
        mode: Mode,
        shards: Shards | None = None,
        slices: TensorParallel | None = None,
        max_memory: int | None = None,
    ) -> None:
        self.function, self.total, self.mode = function, total, mode
        self._shards, self._slices = shards, slices
        self._budget = 0.0 if mode is Mode.GHOST else math.inf if max_memory is None else float(max_memory)
        self.may_pass_twice = self._budget < math.inf
        self._shows = mode in (Mode.HOOKS, Mode.FUNCTORCH)
        self._warned = False
        self.reset()

    def reset(self) -> None:
        """Forget the backward that is under way."""
        self._uses: dict[nn.Parameter, list[Use]] = {}
        self._sq_norms: dict[nn.Parameter, Tensor] = {}
        self._factors: dict[nn.Parameter, Tensor] = {}
        """What each record's measured gradient is multiplied by in the sum."""
        self._unit = 1.0
        self._finite: Tensor | None = None
        self._statistic = 0.0
        self._seen: Seen | None = None
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._parts: dict[nn.Parameter, Tensor] = {}
        self._postponed: set[nn.Parameter] = set()
        self._room = _ROOM
        self._left = self._budget

    def admit(self, tapes: Sequence[Tape]) -> None:
        """Refuse records that must not be added to this step."""
        self.total.admit(tapes)
        self.total.check_bound(self.function.bound)

    def note_pass(self) -> None:
        """A gradient went by unrecorded."""
        self.total.passed_by = True

    def measure(self, parameter: nn.Parameter, use: Use, *, complete: bool) -> tuple[str, str]:
        """Take note of a use of a weight; returns the route its norm takes, and what is kept until the factors are known."""
        if parameter in self._sq_norms:
            raise PrivacyError(
                "a weight was used again after its norm had been taken (a module re-run by re-entrant checkpointing). Use "
                "grad_sample_mode='bk' without max_memory, or checkpointing with use_reentrant=False."
            )
        size = parameter.dtype.itemsize if parameter.dtype == torch.float64 else 4
        if complete and parameter not in self._uses and use.held * size > self._left:
            self._sq_norms[parameter] = use.sq_norms()
            self._postponed.add(parameter)
            return use.route, "norms"
        route = use.route
        if self._shows and not self._uses:
            self._foresee(use.n)
        if self.mode is not Mode.GHOST:
            use = Explicit(use.grad_samples()) if self._shows else self._compact(use, self._left / size)
        self._left -= use.held * size
        self._uses.setdefault(parameter, []).append(use)
        kept = "per-sample gradients" if isinstance(use, Explicit) else "inputs and output gradients"
        return route, f"{kept} (p.grad_sample)" if self._shows else kept

    def _foresee(self, n: int) -> None:
        """Say that the per-sample gradients of all weights will not fit, before they are there."""
        parameters = self.total.parameters()
        size = sum(n * p.numel() * max(4, p.dtype.itemsize) for p in parameters)
        if size < _WORTH_A_LOOK or self._warned:
            return
        free = free_memory(parameters[0].device)
        if free is not None and size > free:
            self._warned = True
            warnings.warn(
                f"grad_sample_mode={self.mode.value!r} keeps the gradient of every record: {n} records x "
                f"{sum(p.numel() for p in parameters):,} parameters are {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are "
                f"free. Use 'bk' or 'ghost', which keep less, or a BatchMemoryManager with smaller physical batches.",
                stacklevel=2,
            )

    def _compact(self, use: Use, left: float) -> Use:
        small = use.compact(max(0, int(min(self._room, left - use.held))))
        self._room -= max(0, small.held - use.held)
        return small

    def settle(self, n: int, unit: float = 1.0) -> None:
        """Work out the factors; with one pass the sums too. A record's gradient is ``unit`` times what was measured."""
        joined = self._find_factors(n, unit) if n else {}
        if self.mode is not Mode.GHOST:
            self._sum_up(joined)

    @property
    def passes_twice(self) -> bool:
        """Whether a second backward has to add up what was measured: all of it, or weights of which nothing was kept."""
        return self.mode is Mode.GHOST or bool(self._postponed)

    def wants(self, parameter: nn.Parameter) -> bool:
        """Whether the second backward is for this weight."""
        return self.mode is Mode.GHOST or parameter in self._postponed

    def _find_factors(self, n: int, unit: float) -> dict[nn.Parameter, Use]:
        self._unit = unit
        joined = {parameter: join(uses) for parameter, uses in self._uses.items()}
        for parameter, use in joined.items():
            self._sq_norms[parameter] = use.sq_norms()
        parameters = self.total.parameters()
        self._check_known(parameters)
        self.function.check(len(parameters))
        self._check_measurable(unit)
        sq_norms = _columns([self._sq_norms.get(p) for p in parameters], n) * unit**2
        if self._slices is not None:
            sq_norms = self._slices.join_norms(sq_norms, parameters)
        self._statistic = self.function.statistic(sq_norms)
        factors = self.function.factors(sq_norms).expand(n, len(parameters))
        self._seen = Seen.of(sq_norms, factors) if self.total.watchers else None
        finite = sq_norms.sum(1).isfinite()
        if not bool(finite.all()):
            self._finite = finite
        self._factors = _rounded_down(factors, unit, parameters, self._sq_norms)
        self._uses.clear()
        return joined

    def _sum_up(self, joined: dict[nn.Parameter, Use]) -> None:
        """With one pass: every weight's sum; of split ones a unit at a time, records or none, as all ranks do."""
        for unit in () if self._shards is None else self._shards.units:
            self._add_all({p: joined.pop(p) for p in unit.trainable if p in joined})
            self.hand_over(unit)
        self._add_all(joined)

    def _add_all(self, uses: Mapping[nn.Parameter, Use]) -> None:
        for parameter, use in uses.items():
            self._show(parameter, use)
            self.add(parameter, use)

    def _check_known(self, parameters: Sequence[nn.Parameter]) -> None:
        known = set(parameters)
        if len(known) < len(parameters):
            raise PrivacyError(
                "a parameter is in the optimizer more than once: it would count in the norm as often, and be trained on noise "
                "alone. Take it out of one place."
            )
        if any(p not in known for p in self._sq_norms):
            raise PrivacyError(
                "a trainable parameter of the module is in no param_group of the optimizer: its gradient would count in the "
                "norm but train nothing. Add it with optimizer.add_param_group, or freeze it with requires_grad_(False)."
            )

    def _check_measurable(self, unit: float) -> None:
        """Refuse bounds that are so small, as gradients were measured, that norms far above them would come out as 0."""
        bound = self.function.bound
        least = min(bound) if isinstance(bound, list) else bound
        single = any(sq_norms.dtype != torch.float64 for sq_norms in self._sq_norms.values())
        if single and least < _LEAST_BOUND * unit:
            raise ConfigurationError(
                f"max_grad_norm={least:g} is {least / unit:g} in the size in which gradients were measured (with a GradScaler, "
                f"times its scale): squares of numbers that small vanish in single precision, and nothing would be clipped. "
                f"Take a larger bound or scale, or float64 parameters."
            )

    def _show(self, parameter: nn.Parameter, use: Use) -> None:
        if self._shows:
            grads = use.grad_samples() if self._unit == 1 else use.grad_samples() * self._unit
            parameter.grad_sample = grads.to(parameter.dtype)  # type: ignore[attr-defined]

    def add(self, parameter: nn.Parameter, use: Use) -> None:
        """Add a use, weighted by the factors; records that are not finite are replaced by zeros first."""
        if self._finite is not None:
            use = use.keep_rows(self._finite.to(parameter.device))
        part = use.weighted_sum(self._factors[parameter])
        known = self._sums.get(parameter)
        self._sums[parameter] = part if known is None else known.add_(part)

    def hand_over(self, unit: Unit) -> None:
        """The unit's sums of this backward are complete on every rank: add them up, and keep this rank's part."""
        if self._shards is None:
            return
        sums = {p: self._sums.pop(p) for p in unit.trainable if p in self._sums}
        for parameter, part in self._shards.scatter(unit, sums).items():
            known = self._parts.get(parameter)
            self._parts[parameter] = part if known is None else known.add_(part)

    def commit(self, tapes: Sequence[Tape]) -> None:
        """The backward went well: its sums become part of the step's."""
        dropped = 0 if self._finite is None else int((~self._finite).sum())
        sums = {**self._sums, **self._parts}
        self.total.add(
            sums, tapes, bound=self.function.bound, statistic=self._statistic, dropped=dropped, seen=self._seen
        )


def _columns(sq_norms: Sequence[Tensor | None], n: int) -> Tensor:
    """Squared norms [n, parameters] in float64 on the CPU, in one conversion where they are of one kind."""
    nothing = torch.zeros(n, dtype=torch.float64)
    found = [nothing if column is None else column for column in sq_norms]
    if len({(column.dtype, column.device) for column in found}) > 1:
        found = [column.to("cpu", torch.float64) for column in found]
    return torch.stack(found, dim=1).to("cpu", torch.float64)


def _rounded_down(
    factors: Tensor, unit: float, parameters: Sequence[nn.Parameter], sq_norms: Mapping[nn.Parameter, Tensor]
) -> dict[nn.Parameter, Tensor]:
    """``unit`` times the factors [n] of each parameter that has a norm, from [n, parameters].

    They are in the precision of its gradients, lowered by more than norms and products can be rounded up. A record that is
    not clipped keeps its factor of exactly 1.
    """
    rows: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    found = {}
    for i, parameter in enumerate(parameters):
        like = sq_norms.get(parameter)
        if like is None:
            continue
        kind = like.dtype, like.device
        if kind not in rows:
            margin = 1 - 16 * torch.finfo(like.dtype).eps
            lowered = torch.where(factors == 1, factors, factors * margin)
            rows[kind] = lowered.T.contiguous().to(device=like.device, dtype=like.dtype) * unit
        found[parameter] = rows[kind][i]
    return found
