"""What was released: frozen events, the words of the ledger.

An event says *how a private release was made*; an accountant turns a ledger of them into epsilon. Noise is stated in
units of the sensitivity under adding or removing one record, so ``Gaussian(1.1)`` is noise of standard deviation
``1.1 * max_grad_norm`` on a sum whose records are clipped to ``max_grad_norm``.

The meaning of an event and its JSON form never change between versions; a new meaning gets a new name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union

from ghostgrad.accounting._checks import (
    check_count,
    check_epsilon,
    check_finite,
    check_noise,
    check_positive,
    check_rate,
    precision,
)
from ghostgrad.errors import ConfigurationError, choose


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Gaussian noise of standard deviation ``sigma`` (in units of the add-or-remove sensitivity) on a vector.

    ``sigma = 0`` is a release without noise: epsilon is infinite.

    >>> Gaussian(1.1)
    Gaussian(sigma=1.1)
    """

    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", check_noise(self.sigma, "sigma"))


@dataclass(frozen=True, slots=True)
class Laplace:
    """Laplace noise of scale ``scale`` (in units of the L1 sensitivity); alone it is ``1 / scale``-DP.

    >>> Laplace(2.0)
    Laplace(scale=2.0)
    """

    scale: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", check_positive(self.scale, "scale"))


@dataclass(frozen=True, slots=True)
class Opaque:
    """Any other release known only to be (epsilon, delta)-DP, such as a private validation metric.

    >>> Opaque(0.1, 1e-7)
    Opaque(epsilon=0.1, delta=1e-07)
    """

    epsilon: float
    delta: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", check_epsilon(self.epsilon))
        object.__setattr__(self, "delta", check_rate(self.delta, "delta"))


@dataclass(frozen=True, slots=True)
class PoissonSampled:
    """``event`` on a subset that each record joins independently with probability ``rate``.

    >>> PoissonSampled(0.01, Gaussian(1.0))
    PoissonSampled(rate=0.01, event=Gaussian(sigma=1.0))
    """

    rate: float
    event: Event

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", check_rate(self.rate, "rate"))
        _need_event(self.event)


@dataclass(frozen=True, slots=True)
class FixedSizeSampled:
    """``event`` on a uniform subset of fixed size, ``rate`` = subset size / dataset size, drawn afresh at every step.

    The size of the dataset must not change, so the guarantee is for *replacing* one record, and the sensitivity of a
    clipped sum doubles. Accountants answer for replace-one when a ledger holds such an event.

    >>> FixedSizeSampled(0.01, Gaussian(4.0)).rate
    0.01
    """

    rate: float
    event: Event

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", check_rate(self.rate, "rate"))
        _need_event(self.event)


@dataclass(frozen=True, slots=True)
class Composed:
    """All of ``events`` released on the same data, each free to depend on those before it.

    >>> len(Composed((Gaussian(1.0), Laplace(2.0))).events)
    2
    """

    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.events, (tuple, list)):
            raise ConfigurationError(f"events={self.events!r} is not a sequence; pass a tuple of events.")
        object.__setattr__(self, "events", tuple(self.events))
        for event in self.events:
            _need_event(event)


@dataclass(frozen=True, slots=True)
class Repeated:
    """``event`` released ``count`` times.

    >>> Repeated(Gaussian(1.0), 10).count
    10
    """

    event: Event
    count: int

    def __post_init__(self) -> None:
        _need_event(self.event)
        object.__setattr__(self, "count", check_count(self.count, "count"))


@dataclass(frozen=True, slots=True)
class BestOf:
    """``event`` run a random number of times with fresh data-independent settings; only the best result is released.

    ``shape`` is eta of the truncated negative binomial number of trials (0 is logarithmic, 1 geometric) and ``stop``
    its gamma; ``shape = inf`` is a Poisson number, whose mean is then ``stop``. Papernot and Steinke (2022), theorems
    2 and 6. `ghostgrad.accounting.tuning_event` builds one from the expected number of trials.

    >>> BestOf(Gaussian(2.0), shape=1.0, stop=0.1).stop
    0.1
    """

    event: Event
    shape: float
    stop: float

    def __post_init__(self) -> None:
        _need_event(self.event)
        object.__setattr__(self, "stop", check_positive(self.stop, "stop"))
        object.__setattr__(self, "shape", _check_shape(self.shape))
        if self.shape <= -1.0:
            raise ConfigurationError(f"shape={self.shape} is not above -1; use 0 (logarithmic), 1 (geometric) or inf.")
        if math.isfinite(self.shape) and self.stop >= 1.0:
            raise ConfigurationError(
                f"stop={self.stop} is not a probability in (0, 1); pass gamma of the distribution."
            )


def _check_shape(shape: object) -> float:
    return math.inf if shape == math.inf else check_finite(shape, "shape")


Event = Union[Gaussian, Laplace, Opaque, PoissonSampled, FixedSizeSampled, Composed, Repeated, BestOf]  # noqa: UP007

_KINDS = (Gaussian, Laplace, Opaque, PoissonSampled, FixedSizeSampled, Composed, Repeated, BestOf)
_TYPES: dict[str, Any] = {kind.__name__: kind for kind in _KINDS}


def _need_event(event: object) -> None:
    if type(event) not in _KINDS:
        raise ConfigurationError(f"event={event!r} is not an accounting event; use one of: {', '.join(_TYPES)}.")


def event_to_json(event: Event) -> dict[str, Any]:
    """Return ``event`` as plain JSON data; `event_from_json` is the inverse.

    >>> event_to_json(PoissonSampled(0.5, Gaussian(1.0)))
    {'type': 'PoissonSampled', 'rate': 0.5, 'event': {'type': 'Gaussian', 'sigma': 1.0}}
    """
    _need_event(event)
    plain: dict[str, Any] = {"type": type(event).__name__}
    for name in event.__dataclass_fields__:
        value = getattr(event, name)
        if name == "event":
            value = event_to_json(value)
        elif name == "events":
            value = [event_to_json(part) for part in value]
        elif name == "shape" and math.isinf(value):
            value = "inf"  # strict JSON has no infinity
        plain[name] = value
    return plain


def event_from_json(plain: Mapping[str, Any]) -> Event:
    """Read what `event_to_json` wrote.

    Raises:
        ConfigurationError: The type is unknown or its fields are not those of this version; both are named.

    >>> event_from_json({"type": "Gaussian", "sigma": 1.0})
    Gaussian(sigma=1.0)
    """
    try:
        return _from_json(plain)
    except RecursionError as error:
        raise ConfigurationError("the event is nested too deeply to be read; it was not written by a run.") from error


def _from_json(plain: object) -> Event:
    if not isinstance(plain, Mapping) or "type" not in plain:
        raise ConfigurationError(f"event {plain!r} has no 'type'; it was not written by this library.")
    kind = _TYPES[choose("event type", str(plain["type"]), _TYPES)]
    fields = {name: value for name, value in plain.items() if name != "type"}
    wanted = set(kind.__dataclass_fields__)
    if set(fields) != wanted:
        raise ConfigurationError(
            f"{plain['type']} has fields {sorted(fields)} where this version knows {sorted(wanted)}; "
            "read it with the version of ghostgrad that wrote it."
        )
    if "event" in fields:
        fields["event"] = _from_json(fields["event"])
    if isinstance(fields.get("events"), (list, tuple)):
        fields["events"] = tuple(_from_json(part) for part in fields["events"])
    if fields.get("shape") == "inf":
        fields["shape"] = math.inf
    event: Event = kind(**fields)
    return event


def opened(event: Event, count: int) -> list[tuple[Event, int]]:
    """Return `atoms` as a list.

    Raises:
        ConfigurationError: ``event`` cannot be read, is nested too deeply, or stands for more than 2**53 releases.
    """
    _need_event(event)
    try:
        parts = list(atoms(event, count))
    except RecursionError as error:
        raise ConfigurationError("the event is nested too deeply; record its parts one by one.") from error
    for part, times in parts:
        check_count(times, f"the number of {type(part).__name__} releases")
    return parts


def samples_poisson(event: Event) -> bool:
    """Whether a Poisson sample of a part of the data is anywhere in ``event``."""
    if isinstance(event, PoissonSampled):
        return 0.0 < event.rate < 1.0 or samples_poisson(event.event)
    if isinstance(event, Composed):
        return any(samples_poisson(part) for part in event.events)
    return isinstance(event, (FixedSizeSampled, Repeated, BestOf)) and samples_poisson(event.event)


def atoms(event: Event, count: int = 1) -> Iterator[tuple[Event, int]]:
    """Yield ``(event, count)`` with ``Composed`` and ``Repeated`` opened and sampling simplified where that is exact.

    >>> list(atoms(Repeated(Composed((Gaussian(1.0), PoissonSampled(1.0, Gaussian(2.0)))), 3)))
    [(Gaussian(sigma=1.0), 3), (Gaussian(sigma=2.0), 3)]
    """
    if count == 0:
        return
    if isinstance(event, Composed):
        for part in event.events:
            yield from atoms(part, count)
    elif isinstance(event, Repeated):
        yield from atoms(event.event, count * event.count)
    elif isinstance(event, PoissonSampled):
        yield from _sampled_atoms(event, count)
    elif isinstance(event, FixedSizeSampled):
        if event.rate > 0.0:
            yield FixedSizeSampled(event.rate, _one_gaussian(event)), count
    elif isinstance(event, BestOf):
        _check_base(event)
        yield event, count
    else:
        yield event, count


def _check_base(event: BestOf) -> None:
    """The theorems on `BestOf` start from a Renyi curve of the base, for one relation."""
    for part, _ in atoms(event.event):
        if isinstance(part, (FixedSizeSampled, BestOf)) or (isinstance(part, Opaque) and part.delta > 0.0):
            raise ConfigurationError(
                f"BestOf over {part!r} has no Renyi curve here; use Poisson sampling and pure releases in a trial."
            )


def _sampled_atoms(event: PoissonSampled, count: int) -> Iterator[tuple[Event, int]]:
    if event.rate == 0.0:
        return
    if event.rate == 1.0:
        yield from atoms(event.event, count)
    elif isinstance(event.event, PoissonSampled):
        # A subset of a subset is one Poisson subset at the product of the rates.
        yield from atoms(PoissonSampled(event.rate * event.event.rate, event.event.event), count)
    elif isinstance(event.event, Laplace):
        yield event, count
    elif isinstance(event.event, Opaque):
        # Amplification of any (epsilon, delta) release: Balle, Barthe and Gaboardi (2018), theorem 8.
        amplified = (
            math.log1p(event.rate * math.expm1(event.event.epsilon))
            if event.event.epsilon < 700.0
            else event.event.epsilon + math.log(event.rate)
        )
        yield Opaque(max(amplified, 0.0), event.rate * event.event.delta), count
    else:
        yield PoissonSampled(event.rate, _one_gaussian(event)), count


def _one_gaussian(event: PoissonSampled | FixedSizeSampled) -> Gaussian:
    """Gaussians released on the *same* subset are one Gaussian: variances add as precisions."""
    total = 0.0
    for part, count in atoms(event.event):
        if not isinstance(part, Gaussian):
            raise ConfigurationError(
                f"{type(event).__name__} of {type(part).__name__} has no exact dominating pair here; "
                "record Opaque(epsilon, delta) with the guarantee you can prove."
            )
        total += count * precision(part.sigma)
    if total == 0.0:
        raise ConfigurationError(f"{event!r} samples an empty composition; leave it out of the ledger.")
    single = event.event
    return single if isinstance(single, Gaussian) else Gaussian(0.0 if math.isinf(total) else total**-0.5)
