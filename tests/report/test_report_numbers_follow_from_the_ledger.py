"""Every number of a report is the accountants' own, shown on the side that does not flatter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ghostgrad import PrivacyEngine
from ghostgrad.accounting import (
    GaussianAccountant,
    PLDAccountant,
    RDPAccountant,
    membership_advantage,
    posterior_bound,
    register_accountant,
    tpr_at_fpr,
)
from ghostgrad.report import reading
from ghostgrad.report.charts import line_chart, ticks
from ghostgrad.report.numbers import at_least, at_most, shown

Train = Callable[..., PrivacyEngine]


def with_ledger(kind: Any, engine: PrivacyEngine) -> Any:
    accountant = kind()
    accountant.ledger = engine.accountant.ledger
    return accountant


def test_epsilon_by_each_accountant(train: Train) -> None:
    engine = train(noise_multiplier=2.0, sample_rate=0.2, steps=60)
    rows = {(row["accountant"], row["delta"]): row for row in engine.report(deltas=[1e-5, 1e-7]).data["epsilon"]}
    for delta in (1e-5, 1e-7):
        assert rows["rdp", delta]["upper"] == engine.get_epsilon(delta)
        bounds = with_ledger(PLDAccountant, engine).get_bounds(delta)
        assert rows["pld", delta]["upper"] == pytest.approx(bounds.upper, rel=1e-6)
        assert rows["pld", delta]["lower"] == pytest.approx(bounds.lower, rel=1e-6)
        assert rows["gdp", delta]["upper"] == with_ledger(GaussianAccountant, engine).get_epsilon(delta)
        assert [rows[name, delta]["bound"] for name in ("rdp", "pld", "gdp")] == [True, True, False]
        assert rows["rdp", delta]["lower"] == "unknown"


def test_what_an_attacker_can_reach(train: Train) -> None:
    engine = train(noise_multiplier=2.0, sample_rate=0.2, steps=60)
    found, pld = engine.report().data["attacks"], with_ledger(PLDAccountant, engine)
    assert found["membership_advantage"] == pytest.approx(membership_advantage(pld).value, rel=1e-6)
    assert [part["false_positives"] for part in found["true_positives"]] == [0.001, 0.01]
    for part in found["true_positives"]:
        assert part["upper"] == pytest.approx(tpr_at_fpr(pld, part["false_positives"]).value, rel=1e-4)
    for part in found["posterior"]:
        assert part["upper"] == pytest.approx(posterior_bound(pld, part["prior"], part["failure"]).value, rel=1e-4)
    for part in found["reconstruction"]:
        assert part["upper"] == pytest.approx(tpr_at_fpr(pld, part["baseline"]).value, rel=1e-4)
        assert part["upper"] >= part["baseline"]


def test_reconstruction_of_one_unsampled_gaussian_is_the_normal_s_own() -> None:
    """One Gaussian release of noise multiplier 1: 1 - f(b) = Phi(Phi^-1(b) + 1) (Dong, Roth and Su 2022, equation 6)."""
    engine = PrivacyEngine()
    engine.accountant.step(noise_multiplier=1.0, sample_rate=1.0)
    normal = torch.distributions.Normal(0.0, 1.0)
    for part in engine.report().data["attacks"]["reconstruction"]:
        exact = float(normal.cdf(normal.icdf(torch.tensor(part["baseline"], dtype=torch.float64)) + 1.0))
        assert exact * (1 - 1e-6) <= part["upper"] <= exact * 1.03


def test_figures_end_where_the_table_is(train: Train) -> None:
    data = train(steps=5).report(deltas=[1e-6]).data
    curve = data["figures"]["epsilon"]
    pld = next(row for row in data["epsilon"] if row["accountant"] == "pld")
    assert (curve["x"][0], curve["x"][-1]) == (0.0, 5.0)
    assert curve["y"][-1] == pytest.approx(pld["upper"], rel=1e-5)
    trade_off = data["figures"]["trade_off"]
    assert max(x + y for x, y in zip(trade_off["x"], trade_off["y"], strict=True)) <= 1.0 + 1e-6
    advantage = max(1 - x - y for x, y in zip(trade_off["x"], trade_off["y"], strict=True))
    assert advantage == pytest.approx(data["attacks"]["membership_advantage"], rel=0.02)


def test_the_mechanism_as_it_was_set(train: Train) -> None:
    engine = train(clipping="per_layer", max_grad_norm=[0.1, 0.2, 0.3, 0.4], grad_sample_mode="ghost", sample_rate=0.2)
    data = engine.report().data
    (training,) = data["trainings"]
    assert training["max_grad_norm"] == [0.1, 0.2, 0.3, 0.4]
    assert training["sensitivity"] == pytest.approx(math.sqrt(0.3))
    assert (training["clipper"], training["clipping"], training["optimizer"]) == ("ghost", "per_layer", "SGD")
    assert (training["expected_batch_size"], training["sample_rate"], training["steps"]) == (8.0, 0.2, 3)
    assert (training["sampling"]["draws"], training["sampling"]["passes"]) == (3, 1)
    assert [(m["path"], m["rule"], m["parameters"]) for m in training["modules"]] == [
        ("0", "linear", 25),
        ("2", "linear", 18),
    ]
    assert training["trainable_parameters"] == 43
    assert (data["releases"]["count"], data["releases"]["phases"], data["releases"]["steps"]) == (3, 1, 3)
    assert training["noise"]["secure"] is False


def test_a_weight_that_two_modules_share_is_counted_once(train: Train) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    module[2].weight = module[0].weight
    (training,) = train(module=module).report().data["trainings"]
    assert (
        sum(part["parameters"] for part in training["modules"]) == training["trainable_parameters"] == 16 + 4 + 4 + 15
    )


def test_schedules_that_vary_are_read_from_the_ledger(train: Train) -> None:
    engine = train(noise_multiplier=lambda step: 1.0 + step, max_grad_norm=lambda step: 1.0 / (1 + step))
    data = engine.report().data
    assert (data["releases"]["least_noise_multiplier"], data["releases"]["largest_noise_multiplier"]) == (1.0, 3.0)
    assert data["releases"]["phases"] == 3
    (training,) = data["trainings"]
    assert training["noise_multiplier"] == 3.0
    assert training["noise_multiplier_varies"] is training["max_grad_norm_varies"] is True


def test_a_budget_that_is_kept_is_said() -> None:
    engine, module = PrivacyEngine(), nn.Linear(4, 2)
    data = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.randint(2, (40,)))
    engine.make_private_with_epsilon(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), target_epsilon=2.0, target_delta=1e-3, epochs=1,
        data_loader=torch.utils.data.DataLoader(data, batch_size=8), max_grad_norm=1.0,
    )  # fmt: skip
    assert engine.report().data["budget"] == {"epsilon": 2.0, "delta": 1e-3}


def test_an_accountant_of_the_user_s_own_has_a_row_too(train: Train) -> None:
    class Mine(RDPAccountant):
        mechanism = "mine"

    register_accountant("mine", Mine)
    engine = train(engine=PrivacyEngine(accountant="mine"))
    data = engine.report(deltas=[1e-5]).data
    assert data["accountant"] == "mine"
    assert [row["accountant"] for row in data["epsilon"]] == ["rdp", "pld", "gdp", "mine"]


def test_adaptive_clipping_says_what_it_releases(train: Train) -> None:
    (training,) = train(clipping="adaptive").report().data["trainings"]
    assert training["also_released"] == [
        "a noisy count of unclipped records in each step, within the step's noise multiplier"
    ]
    assert training["gradient_noise_multiplier"] > training["noise_multiplier"] == 1.0


def test_a_ledger_of_very_many_phases_is_left_out_but_accounted(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_ENTRIES", 30)
    monkeypatch.setattr(reading, "_MOST_PHASES", 20)
    engine = train()
    for number in range(30):
        engine.accountant.step(noise_multiplier=5.0 + number / 1000, sample_rate=0.001)
    report = engine.report(deltas=[1e-5])
    assert report.data["ledger"] == "unknown"
    assert report.data["releases"]["phases"] == 31
    assert report.data["attacks"]["accountant"] == "rdp"
    assert report.data["epsilon"][0]["upper"] == engine.get_epsilon(1e-5)


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_bounds_are_never_shown_on_the_flattering_side(number: float) -> None:
    least, most = (Decimal(text.replace(",", "")) for text in (at_least(number), at_most(number)))
    exact = Decimal(str(number))
    assert least <= exact <= most
    assert most - least <= exact * Decimal("1.001e-3")
    assert abs(Decimal(shown(number).replace(",", "")) - exact) <= exact * Decimal("5.001e-4")


@given(st.floats(min_value=1e-9, max_value=1e9))
def test_marks_of_an_axis_are_few_and_within_it(top: float) -> None:
    marks = ticks(top)
    assert 3 <= len(marks) <= 6
    assert marks[0] == 0.0
    assert marks[-1] <= top * (1 + 1e-9)


def test_a_chart_draws_the_curve_it_was_given() -> None:
    drawn = line_chart({"x": [0, 1, 2], "y": [0.0, "inf", 1.0], "x_label": "<x>", "y_label": "y"}, title="T & t")
    assert "&lt;x&gt;" in drawn
    assert "T &amp; t" in drawn
    (points,) = re.findall(r'class="curve" points="([^"]*)"', drawn)
    assert points == "54.0,236.0 448.0,14.0"
