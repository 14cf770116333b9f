"""Events mean one thing for ever; the ledger keeps them, short and readable."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest

from ghostgrad.accounting import (
    BestOf,
    Composed,
    Event,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    Ledger,
    Opaque,
    PoissonSampled,
    RDPAccountant,
    Repeated,
    event_from_json,
    event_to_json,
)
from ghostgrad.errors import ConfigurationError

EVENTS: list[Event] = [
    Gaussian(1.1),
    Laplace(2.0),
    Opaque(0.5, 1e-7),
    PoissonSampled(0.01, Gaussian(1.0)),
    FixedSizeSampled(0.02, Gaussian(3.0)),
    Composed((Gaussian(1.0), PoissonSampled(0.5, Laplace(1.0)))),
    Repeated(PoissonSampled(0.1, Gaussian(2.0)), 7),
    BestOf(PoissonSampled(0.1, Gaussian(2.0)), 1.0, 0.25),
    BestOf(Gaussian(2.0), math.inf, 10.0),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_event_survives_json(event: Event) -> None:
    assert event_from_json(json.loads(json.dumps(event_to_json(event), allow_nan=False))) == event


def test_json_form_of_the_training_step_never_changes() -> None:
    ledger = Ledger()
    ledger.append(PoissonSampled(0.01, Gaussian(1.5)), 3)
    assert json.loads(ledger.to_json()) == {
        "format": "ghostgrad-ledger",
        "version": 1,
        "entries": [[{"type": "PoissonSampled", "rate": 0.01, "event": {"type": "Gaussian", "sigma": 1.5}}, 3]],
    }


def test_ledger_survives_json_in_order() -> None:
    ledger = Ledger()
    for count, event in enumerate(EVENTS[:4], start=1):
        ledger.append(event, count)
    again = Ledger.from_json(ledger.to_json())
    assert again == ledger
    assert again.sampled_gaussians() == ledger.sampled_gaussians()


def test_a_million_equal_steps_are_one_entry() -> None:
    ledger, event = Ledger(), PoissonSampled(0.01, Gaussian(1.0))
    for _ in range(1000):
        ledger.append(event)
    ledger.append(event, 999_000)
    assert (len(ledger), ledger.steps) == (1, 1_000_000)


def test_appending_distinct_steps_is_fast() -> None:
    accountant = RDPAccountant()
    start = time.process_time()
    for index in range(20_000):
        accountant.step(noise_multiplier=1.0 + index * 1e-5, sample_rate=0.01)
    assert time.process_time() - start < 1.5
    assert len(accountant) == 20_000


def test_sampling_simplifies_where_that_is_exact() -> None:
    ledger = Ledger()
    ledger.append(PoissonSampled(0.5, PoissonSampled(0.5, Gaussian(1.0))))
    ledger.append(PoissonSampled(0.25, Composed((Gaussian(2.0),) * 4)))
    assert ledger.sampled_gaussians() == {(0.25, 1.0): 2}
    ledger.append(PoissonSampled(0.0, Gaussian(0.0)), 5)
    assert ledger.others() == {}


def test_sampled_opaque_release_is_amplified() -> None:
    ledger = Ledger()
    ledger.append(PoissonSampled(0.1, Opaque(1.0, 1e-6)))
    (event,) = ledger.others()
    assert isinstance(event, Opaque)
    assert event.epsilon == pytest.approx(math.log1p(0.1 * math.expm1(1.0)))
    assert event.delta == pytest.approx(1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gaussian(-1.0),
        lambda: Gaussian(math.nan),
        lambda: Gaussian("1"),  # type: ignore[arg-type]
        lambda: Laplace(0.0),
        lambda: Opaque(-0.1),
        lambda: Opaque(1.0, 1.5),
        lambda: PoissonSampled(1.5, Gaussian(1.0)),
        lambda: PoissonSampled(0.5, "gaussian"),  # type: ignore[arg-type]
        lambda: Repeated(Gaussian(1.0), -1),
        lambda: BestOf(Gaussian(1.0), -1.0, 0.5),
        lambda: BestOf(Gaussian(1.0), 1.0, 1.5),
        lambda: Ledger().append(PoissonSampled(0.5, Composed((Gaussian(1.0), Laplace(1.0))))),
        lambda: Ledger().append(BestOf(Opaque(1.0, 1e-6), 1.0, 0.5)),
    ],
)
def test_impossible_events_are_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError):
        make()


def test_unknown_event_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="'Gausian' is not known; did you mean 'Gaussian'"):
        event_from_json({"type": "Gausian", "sigma": 1.0})
    with pytest.raises(ConfigurationError, match=r"\['scale', 'sigma'\]"):
        event_from_json({"type": "Gaussian", "sigma": 1.0, "scale": 2.0})


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"format": "other", "version": 1, "entries": []}, "format='other'"),
        ({"format": "ghostgrad-ledger", "version": 99, "entries": []}, "version=99"),
        ({"format": "ghostgrad-ledger", "version": 1, "entries": [[1, 2, 3]]}, r"\[1, 2, 3\]"),
        ([], "list"),
    ],
)
def test_other_histories_are_refused_by_name(plain: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Ledger.from_state_dict(plain)
    with pytest.raises(ConfigurationError, match=said):
        Ledger.from_json(json.dumps(plain))


@pytest.mark.parametrize("broken", ["entries gone", "entries empty"])
def test_a_state_that_lost_its_entries_is_not_read_as_nothing_spent(broken: str) -> None:
    accountant = RDPAccountant()
    accountant.step(noise_multiplier=1.0, sample_rate=0.1, steps=10)
    state = accountant.state_dict()
    if broken == "entries gone":
        del state["ledger"]["entries"]
    else:
        state["ledger"]["entries"] = []
    with pytest.raises(ConfigurationError, match="cut off"):
        RDPAccountant().load_state_dict(state)
