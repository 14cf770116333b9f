"""Each fault that loses privacy is caught by an audit through the public API; what an attack cannot see is named."""

from __future__ import annotations

import pytest
from _attacks import ATTACKS
from _faults import FAULTS

CAUGHT = [
    ("sigma halved", "gradient canaries"),
    ("no noise on one parameter", "gradient canaries"),
    ("no noise on one parameter", "long record"),
    ("divided by the drawn batch size", "blank record"),
    ("rows clipped, not records", "long record"),
    ("batches not drawn by Poisson", "one pass"),
    ("noise again after a resume", "gradient canaries after a resume"),
]
OUT_OF_REACH = [
    (
        "divided by the drawn batch size",
        "gradient canaries",
    ),  # a divisor is no noise, and what it tells is the batch's size
    ("rows clipped, not records", "gradient canaries"),  # canaries join the sum after clipping
    ("batches not drawn by Poisson", "gradient canaries"),  # and after sampling
    ("noise again after a resume", "gradient canaries"),  # each process by itself has fresh noise
    ("sigma halved", "one run, loss of the model"),  # the loss of the last model says little of any record
]


@pytest.mark.parametrize(("fault", "attack"), CAUGHT)
def test_a_fault_is_caught(fault: str, attack: str) -> None:
    with FAULTS[fault]():
        result = ATTACKS[attack].run(0, ATTACKS[attack].short)
    assert result.contradicted
    assert result.witness.lower > result.witness.claimed + 0.2
    assert result.confidence == 0.99


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"none"}))
def test_every_fault_has_an_attack_that_catches_it(fault: str) -> None:
    assert fault in {caught for caught, _ in CAUGHT}


def test_the_parameter_without_noise_is_named() -> None:
    with FAULTS["no noise on one parameter"]():
        result = ATTACKS["gradient canaries"].run(0, 60)
    assert result.where == "parameter 3 of the optimizer"
    assert "parameter 3" in str(result)


@pytest.mark.parametrize(("fault", "attack"), OUT_OF_REACH)
def test_what_an_attack_cannot_see_is_not_said_to_be_seen(fault: str, attack: str) -> None:
    with FAULTS[fault]():
        assert ATTACKS[attack].run(0, ATTACKS[attack].short).verdict == "consistent"
