"""One interface for all accountants: arguments, state, registry, edge cases."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ghostgrad.accounting import (
    Accountant,
    FixedSizeSampled,
    Gaussian,
    GaussianAccountant,
    Laplace,
    Opaque,
    PLDAccountant,
    PoissonSampled,
    RDPAccountant,
    create_accountant,
    register_accountant,
    registered_accountants,
)
from ghostgrad.errors import ConfigurationError

ALL = ["rdp", "pld", "prv", "gdp"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 2.0, math.nan, math.inf, "1e-5", None, True])
def test_delta_outside_the_open_interval_is_refused(name: str, delta: Any) -> None:
    accountant = create_accountant(name)
    for ask in (accountant.get_epsilon, accountant.get_bounds):
        with pytest.raises(ConfigurationError, match="delta="):
            ask(delta)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("epsilon", [-1.0, math.nan, math.inf])
def test_impossible_epsilon_is_refused(name: str, epsilon: float) -> None:
    with pytest.raises(ConfigurationError, match="epsilon="):
        create_accountant(name).get_delta(epsilon)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"sample_rate": -0.1},
        {"sample_rate": 1.1},
        {"sample_rate": math.nan},
        {"steps": -1},
        {"steps": 1.5},
        {"steps": math.inf},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ALL)
def test_impossible_steps_are_refused_and_leave_no_trace(name: str, wrong: dict[str, Any]) -> None:
    accountant = create_accountant(name)
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        accountant.step(**{"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 1, **wrong})
    assert len(accountant) == 0


@pytest.mark.parametrize("name", ALL)
def test_edge_cases_are_answered(name: str) -> None:
    accountant = create_accountant(name)
    assert accountant.get_epsilon(1e-5) == 0.0
    accountant.step(noise_multiplier=0.0, sample_rate=0.0, steps=3)
    accountant.step(noise_multiplier=1.0, sample_rate=0.5, steps=0)
    assert accountant.get_epsilon(1e-5) == 0.0
    assert accountant.get_delta(0.0) == 0.0
    accountant.step(noise_multiplier=0.0, sample_rate=0.5)
    assert accountant.get_epsilon(1e-5) == math.inf
    assert accountant.get_delta(10.0) == 1.0
    assert accountant.get_bounds(1e-5).upper == math.inf


@pytest.mark.parametrize("name", ALL)
def test_state_survives_json_and_another_method(name: str) -> None:
    accountant = create_accountant(name)
    accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=100)
    accountant.step(noise_multiplier=1.2, sample_rate=0.01, steps=50)
    state = json.loads(json.dumps(accountant.state_dict()))
    for other in ALL:
        again = create_accountant(other)
        again.load_state_dict(state)
        assert again.ledger == accountant.ledger
        assert len(again) == 150
    assert accountant.history == [(1.0, 0.01, 100), (1.2, 0.01, 50)]


def test_state_of_opacus_is_read() -> None:
    accountant = RDPAccountant()
    accountant.load_state_dict({"history": [(1.0, 0.01, 100)], "mechanism": "prv"})
    assert accountant.history == [(1.0, 0.01, 100)]
    accountant.history = [(2.0, 0.02, 5)]
    assert len(accountant) == 5


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"history": []}, "mechanism"),
        ({"history": [], "mechanism": "magic"}, "magic"),
        ({"history": [(1.0, 0.1)], "mechanism": "rdp"}, r"\(1.0, 0.1\)"),
        ({"history": [], "mechanism": "rdp", "ledger": {"format": "ghostgrad-ledger", "version": 7}}, "version=7"),
        (None, "NoneType"),
    ],
)
def test_foreign_states_are_refused_by_name(state: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        RDPAccountant().load_state_dict(state)


def test_own_accountants_can_be_registered() -> None:
    class Doubled(Accountant):
        mechanism = "doubled"

        def get_epsilon(self, delta: float) -> float:
            return 2.0 * len(self)

        def get_delta(self, epsilon: float) -> float:
            return 1.0

    register_accountant("doubled", Doubled)
    assert "doubled" in registered_accountants()
    accountant = create_accountant("doubled")
    accountant.step(noise_multiplier=1.0, sample_rate=0.1, steps=2)
    assert accountant.get_bounds(1e-5).upper == 4.0
    assert create_accountant(accountant) is accountant
    with pytest.raises(ConfigurationError, match="did you mean 'pld'"):
        create_accountant("pldd")


def test_central_limit_is_marked_as_no_bound_and_matches_opacus() -> None:
    rows = csv.DictReader((Path(__file__).parent / "reference_epsilons.csv").read_text().splitlines())
    for row in list(rows)[::5]:
        phases = json.loads(row["phases"])
        if len(phases) > 1 or phases[0][0] == 1.0 or not row["eps_opacus_gdp"]:
            continue
        accountant = GaussianAccountant()
        accountant.step(noise_multiplier=phases[0][1], sample_rate=phases[0][0], steps=phases[0][2])
        assert accountant.get_epsilon(float(row["delta"])) == pytest.approx(float(row["eps_opacus_gdp"]), rel=1e-4)
        bounds = accountant.get_bounds(1e-5)
        assert (bounds.lower, bounds.upper) == (0.0, math.inf)
        assert "no bound" in bounds.method


def test_central_limit_refuses_what_it_has_no_limit_for() -> None:
    accountant = GaussianAccountant()
    accountant.record(Laplace(1.0))
    with pytest.raises(ConfigurationError, match="no central limit"):
        accountant.get_epsilon(1e-5)


def test_relation_is_named_and_relations_are_not_mixed() -> None:
    for accountant in (RDPAccountant(), PLDAccountant()):
        accountant.record(FixedSizeSampled(0.01, Gaussian(2.0)), 1000)
        assert accountant.get_bounds(1e-5).neighbouring == "replace-one"
        accountant.record(PoissonSampled(0.01, Gaussian(2.0)))
        with pytest.raises(ConfigurationError, match="one kind of sampling"):
            accountant.get_epsilon(1e-5)


def test_fixed_size_renyi_bound_is_above_the_mesh() -> None:
    renyi, loss = RDPAccountant(), PLDAccountant()
    for accountant in (renyi, loss):
        accountant.record(FixedSizeSampled(0.01, Gaussian(2.0)), 1000)
    assert loss.get_epsilon(1e-5) < renyi.get_epsilon(1e-5) < 1.5 * loss.get_epsilon(1e-5)


def test_failure_mass_is_exact_in_the_mesh() -> None:
    accountant = PLDAccountant()
    accountant.record(Opaque(0.5, 1e-6), 2)
    assert accountant.get_delta(5.0) == pytest.approx(2e-6, rel=1e-5)
    assert accountant.get_epsilon(1e-6) == math.inf


def test_accounting_imports_no_torch() -> None:
    code = (
        "import ghostgrad.accounting, ghostgrad.schedulers, ghostgrad.__main__, sys; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
