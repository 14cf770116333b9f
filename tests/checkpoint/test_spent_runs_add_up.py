"""Whose releases a ledger holds and how they were made: told once, forgotten never, unknown where sources disagree."""

from __future__ import annotations

import pytest

from ghostgrad.accounting import RDPAccountant
from ghostgrad.provenance import SAMPLERS, UNKNOWN, Provenance, is_provenance
from ghostgrad.spent import Spent

KEYED = Provenance("removing one record", "poisson", "keyed", secure=False, seeded=False)
OTHER = Provenance("removing one record", "unknown", "keyed", secure=False, seeded=False)


def spent(run: str, told: dict[int, tuple[Provenance, int]], *, untold: int = 0) -> Spent:
    """A run with that many releases of each training, and further ones of which nothing is told."""
    found = Spent(RDPAccountant())
    found.run = run
    for training, (provenance, releases) in told.items():
        found.accountant.step(noise_multiplier=1.0, sample_rate=0.1, steps=releases)
        found.tell(training, provenance, releases)
    for _ in range(untold):
        found.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    return found


def merged(*parts: Spent) -> Spent:
    whole = Spent(RDPAccountant())
    for part in parts:
        whole.merge(part.accountant.ledger, part.spans, part.made)
    return whole


@pytest.mark.parametrize("times", [1, 2])
def test_runs_add_up_and_a_run_is_counted_once(times: int) -> None:
    short, long = spent("a", {0: (KEYED, 2)}), spent("a", {0: (KEYED, 3), 1: (OTHER, 4)})
    other = spent("b", {0: (KEYED, 5)}, untold=1)
    whole = merged(*[short, long, other] * times)
    assert whole.accountant.ledger.steps == 13
    assert whole.provenance == {KEYED: 8, OTHER: 4, Provenance(): 1}


def test_what_two_sources_say_differently_is_unknown() -> None:
    assert merged(spent("a", {0: (KEYED, 3)}), spent("a", {0: (OTHER, 3)})).provenance == {Provenance(): 3}
    assert merged(spent("a", {0: (KEYED, 3)}), spent("b", {0: (OTHER, 3)})).provenance == {KEYED: 3, OTHER: 3}


def test_a_run_of_which_too_much_is_told_hides_nothing_of_another() -> None:
    boastful = spent("a", {0: (KEYED, 2)})
    boastful.tell(0, KEYED, 100)
    assert merged(boastful, spent("b", {}, untold=7)).provenance[Provenance()] == 7


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_provenance_is_read_back(sampler: str) -> None:
    whole = Provenance("", sampler, "keyed", secure=True, seeded=UNKNOWN)
    assert is_provenance(whole.plain())
    assert Provenance.read({**whole.plain(), "more": 1}) == whole


@pytest.mark.parametrize(
    ("name", "value"),
    [("sampler", "Poisson"), ("sampler", []), ("noise", None), ("noise", "x" * 2000), ("secure", 0), ("seeded", "no")],
)  # fmt: skip
def test_what_is_no_provenance_is_unknown(name: str, value: object) -> None:
    changed = {**KEYED.plain(), name: value}
    assert not is_provenance(changed)
    assert Provenance.read(changed) == Provenance()
    assert not is_provenance([*changed])
