"""When norms, factors and sums are worked out, and what is kept in between. The result is the same in every mode."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from ghostgrad.clipping.accumulator import ClippedSum
from ghostgrad.clipping.functions import ClipFunction
from ghostgrad.clipping.measurement import Seen
from ghostgrad.distributed import Shards, TensorParallel, Unit
from ghostgrad.errors import ConfigurationError, PrivacyError
from ghostgrad.free_memory import free_memory
from ghostgrad.gradients import Explicit, Use, all_sq_norms, all_weighted_sums, join
from ghostgrad.recording import Footprint, Tape, address_of

_ROOM = 1 << 24
"""How many elements of per-sample gradients the one-pass form may keep beyond what they are made of: 64 MiB in float32."""

_MORE = 0.2
"""By how much the peak of ghost mode may be above that of the plain step, for which it saves the second backward."""

_LITTLE = 1 << 19
"""Bytes that no second backward is worth."""

_WORTH_A_LOOK = 1 << 28
"""Bytes of per-sample gradients from which the free memory is asked for."""


_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_HALF = 4e-2
"""How far the squared norms of two backwards may be apart: kernels that add up in any order do not round twice alike, and
neither do two ways to one norm."""

_DIFFER = (
    "the second backward of this mode met other values than the first, from which the clip factors come: something is drawn anew "
    "in each backward (a checkpoint with preserve_rng_state=False, a hook or an autograd function that draws or counts). Leave "
    "that out, or use grad_sample_mode='bk' without max_memory, which takes one backward."
)

_LEAST_BOUND = 1e-12
"""In single precision squares below 1e-38 vanish: a gradient of this norm still has one, spread over 1e13 elements."""


class Mode(Enum):
    """How the clipped sum comes about."""

    HOOKS = "hooks"
    """Per-sample gradients are materialised and shown as ``p.grad_sample``."""
    FUNCTORCH = "functorch"
    """As hooks, every module through the generic rule."""
    BK = "bk"
    """One backward: the uses are kept, in their cheapest form, until the factors are known."""
    GHOST = "ghost"
    """The least memory: the uses in their smallest form while the graph is let go, or, where they would take more than that
    (checkpointing, recurrent layers), norms alone and a second backward that adds up."""


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
        max_memory: bytes that the one-pass form may keep until the factors are known, beyond what the graph holds; of the
            weights that came first only the norm is taken then, and a second backward adds them up. None: no limit.
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
        self._max_memory = max_memory
        self._in_step = mode is Mode.GHOST and not (shards is None and slices is None)
        """With ranks that have to run as many backwards, whatever each of them has room for."""
        self._apart = slices is not None
        """Ranks with slices of other shapes hold the same whole weights too, whose sums have to have the same bits."""
        self._footprint: Footprint | None = None
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
        self._awaited: Counter[nn.Parameter] = Counter()
        """How many uses of each weight were measured, and did not come by in a second backward yet."""
        self._complete: dict[nn.Parameter, None] = {}
        """Weights whose uses are all known and kept, in the order in which the gradient reached them."""
        self._bytes: Counter[nn.Parameter] = Counter()
        """What the uses of each weight keep alive beyond what the graph holds, where there is a limit."""
        self._postponed: dict[nn.Parameter, None] = {}
        """Weights of which only the norm is known."""
        self._again: dict[nn.Parameter, list[Use]] = {}
        """Uses of them that came by in the second backward, until all have."""
        self._gaps: list[Tensor] = []
        """How far the squared norms of the two backwards are apart, [n] for each weight."""
        self._tolerance = 0.0
        self._sq_total = torch.zeros(0)
        """Each record's squared norm, as measured in the first."""
        self._room = 0 if self.mode is Mode.GHOST else _ROOM
        self._left = math.inf if self._max_memory is None else float(self._max_memory)

    def weigh(self, weighed: Callable[[], Footprint | None]) -> None:
        """Look what a record takes, where it is to be decided whether one backward takes no more memory than two."""
        if self.mode is Mode.GHOST:
            self._footprint = weighed()

    def begin(self, n: int, *, packed: bool) -> bool:
        """A backward of n records begins; returns whether its graph has to stay for a second one.

        Args:
            packed: whether the graph does not hold all of the layers' inputs as they are (checkpointed, off-loaded).
        """
        if self._in_step or (self.mode is Mode.GHOST and (packed or not self._lets_go(n))):
            self._left = min(self._left, 0.0)
        return self._left < math.inf

    def _lets_go(self, n: int) -> bool:
        """Whether what is kept of uses takes hardly more than the graph that is let go for them."""
        if self._footprint is None:
            return False
        held, kept = n * self._footprint.held, n * self._footprint.kept
        gradients = sum(p.numel() * p.itemsize for p in self.total.parameters())
        return kept <= held + _MORE * (held + 2 * gradients) + _LITTLE

    def admit(self, tapes: Sequence[Tape]) -> None:
        """Refuse records that must not be added to this step."""
        self.total.admit(tapes)
        self.total.check_bound(self.function.bound)

    def note_pass(self) -> None:
        """A gradient went by unrecorded."""
        self.total.passed_by = True

    def measure(
        self, parameter: nn.Parameter, use: Use, *, complete: bool, held: Callable[[], Sequence[Tensor]] = tuple
    ) -> tuple[str, str]:
        """Take note of a use of a weight; returns the route its norm takes, and what is kept until the factors are known.

        Args:
            complete: whether no other use of the weight can follow.
            held: tells the tensors that the graph holds anyway.
        """
        if self._sq_norms and parameter in self._sq_norms:
            raise PrivacyError(
                "a weight was used again after its norm had been taken (a module re-run by re-entrant checkpointing). Use "
                "grad_sample_mode='bk' without max_memory, or checkpointing with use_reentrant=False."
            )
        route, limited = use.route, self._left < math.inf
        if self._shows:
            if not self._uses:
                self._foresee(use.n)
            use = Explicit(use.grad_samples())
        elif limited:
            use, more = self._smaller(use, {address_of(tensor) for tensor in held()})
            self._bytes[parameter] += more
            self._left -= more
        else:
            use = self._cheaper(use)
        self._uses.setdefault(parameter, []).append(use)
        if limited:
            self._awaited[parameter] += 1
            if complete:
                self._complete[parameter] = None
            self._keep_within_limit()
            if parameter in self._postponed:
                return route, "norms"
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

    def _cheaper(self, use: Use) -> Use:
        small = use.compact(self._room)
        if small is not use:
            self._room -= max(0, small.held - use.held)
        return small

    def _smaller(self, use: Use, held: set[int | None]) -> tuple[Use, int]:
        """Per-sample gradients where they take less than what they are made of, storages that are held not counted; and bytes."""
        size = 8 if use.operands[-1].dtype == torch.float64 else 4
        use = use.compact(min(_bytes(use, held), self._max_memory or 0) // size - use.held)
        return use, _bytes(use, held)

    def _keep_within_limit(self) -> None:
        """Beyond the limit keep only norms, of the weights that came first: a second backward then ends where the rest begins."""
        while self._left < 0 and self._complete:
            parameter = next(iter(self._complete))
            del self._complete[parameter]
            self._postponed[parameter] = None
            self._sq_norms[parameter] = join(self._uses.pop(parameter)).sq_norms()
            self._left += self._bytes.pop(parameter)

    @property
    def passes_twice(self) -> bool:
        """Whether a second backward has to add up weights of which nothing was kept."""
        return self._in_step or bool(self._postponed)

    @property
    def postponed(self) -> Sequence[nn.Parameter]:
        """The weights that a second backward is for."""
        return list(self._postponed)

    def wants(self, parameter: nn.Parameter) -> bool:
        """Whether the second backward is for this weight."""
        return self._in_step or parameter in self._postponed

    def settle(self, n: int, unit: float = 1.0) -> None:
        """Work out the factors, and the sums of what was kept. A record's gradient is ``unit`` times what was measured.

        What was kept is added up before a second backward runs, which might change it in place.
        """
        joined = self._find_factors(n, unit) if n else {}
        self._show(joined)
        if not self._in_step:
            self._sum_up(joined)

    def _find_factors(self, n: int, unit: float) -> dict[nn.Parameter, Use]:
        self._unit = unit
        joined = {parameter: join(uses) for parameter, uses in self._uses.items()}
        self._uses.clear()
        self._sq_norms.update(all_sq_norms(joined, apart=self._apart))
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
        total = sq_norms.sum(1)
        self._sq_total, finite = total / unit**2, total.isfinite()
        if not bool(finite.all()):
            self._finite = finite
        self._factors = _rounded_down(factors, unit, parameters, self._sq_norms)
        return joined

    def _sum_up(self, kept: dict[nn.Parameter, Use]) -> None:
        """Add up what was kept; of split weights a unit at a time, records or none, as all ranks do."""
        for unit in () if self._shards is None else self._shards.units:
            self._add({p: kept.pop(p) for p in unit.trainable if p in kept}, self._factors)
            self.hand_over(unit)
        self._add(kept, self._factors)

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

    def _show(self, uses: Mapping[nn.Parameter, Use]) -> None:
        for parameter, use in uses.items() if self._shows else ():
            grads = use.grad_samples() if self._unit == 1 else use.grad_samples() * self._unit
            parameter.grad_sample = grads.to(parameter.dtype)  # type: ignore[attr-defined]

    def add(self, parameter: nn.Parameter, use: Use) -> None:
        """Second backward: a use that was measured in the first came by again.

        Its norm is taken again: the factor of the first backward bounds nothing in a second one that differs. What is larger
        than it was is scaled down to that, and `commit` refuses more than rounding.
        """
        self._awaited[parameter] -= 1
        if self._awaited[parameter] < 0:
            raise PrivacyError(_DIFFER)
        self._again.setdefault(parameter, []).append(use)
        if self._awaited[parameter]:
            return
        use = join(self._again.pop(parameter))
        first, again, factors = self._sq_norms[parameter], use.sq_norms(), self._factors[parameter]
        self._gaps.append((again - first).abs().to("cpu", torch.float64))
        kinds = [parameter.dtype, *(tensor.dtype for tensor in use.operands if tensor.is_floating_point())]
        self._tolerance = max(self._tolerance, *(_TOLERANCE.get(kind, _HALF) for kind in kinds))
        factors = torch.where(again > first, factors * (first / again).sqrt(), factors)
        self._add({parameter: use}, {parameter: factors})

    def _check_second(self) -> None:
        """Refuse a second backward that used weights more or less often than the first, or with other gradients."""
        if any(count for parameter, count in self._awaited.items() if self.wants(parameter)):
            raise PrivacyError(_DIFFER)
        if self._gaps:
            alike = torch.stack(self._gaps).sum(0) <= self._tolerance * self._sq_total
            if not bool((alike if self._finite is None else alike | ~self._finite).all()):
                raise PrivacyError(_DIFFER)

    def _add(self, uses: dict[nn.Parameter, Use], factors: Mapping[nn.Parameter, Tensor]) -> None:
        """Add uses, weighted, and let go of them; records that are not finite are replaced by zeros first."""
        if self._finite is not None:
            uses = {parameter: use.keep_rows(self._finite.to(parameter.device)) for parameter, use in uses.items()}
        for parameter, part in all_weighted_sums(uses, factors, apart=self._apart):
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
        self._check_second()
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
    rows: dict[tuple[torch.dtype, torch.device], Sequence[Tensor]] = {}
    found = {}
    for i, parameter in enumerate(parameters):
        like = sq_norms.get(parameter)
        if like is None:
            continue
        kind = like.dtype, like.device
        if kind not in rows:
            margin = 1 - 16 * torch.finfo(like.dtype).eps
            lowered = torch.where(factors == 1, factors, factors * margin)
            rows[kind] = (lowered.T.contiguous().to(device=like.device, dtype=like.dtype) * unit).unbind()
        found[parameter] = rows[kind][i]
    return found


def _bytes(use: Use, held: set[int | None]) -> int:
    """What a use keeps alive that nothing else does."""
    return sum(tensor.numel() * tensor.itemsize for tensor in use.operands if address_of(tensor) not in held)
