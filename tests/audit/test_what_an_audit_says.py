"""The audit as users meet it: the loop stays as it is, real records keep their protection, and the result says what it is."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ghostgrad import PrivacyEngine
from ghostgrad.audit import (
    AuditResult,
    GradientCanaries,
    OneRun,
    Releases,
    blank,
    gradient_score,
    loss_score,
    mislabelled,
)
from ghostgrad.errors import ConfigurationError, MissingDependencyError

DELTA = 1e-5


def records(n: int = 32, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=generator), torch.randint(2, (n,), generator=generator))


def loss(module: nn.Module, record: Any) -> torch.Tensor:
    return F.cross_entropy(module(record[0][None]), record[1][None])


def loop(engine: PrivacyEngine, dataset: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), data_loader=DataLoader(dataset, batch_size=8),
        **options,
    )  # fmt: skip
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, loader


def train(engine: PrivacyEngine, dataset: Any) -> Any:
    return loss_score(loop(engine, dataset)[0], loss)


def canaries(m: int = 40) -> list[Any]:
    return mislabelled([*records(m, seed=1)], classes=2, seed=0)


def result(**options: Any) -> AuditResult:
    return PrivacyEngine(seed=5).audit(train, records(), canaries(), **{"delta": DELTA, "seed": 3, **options})


# ---------------------------------------------------------------------------------- a training with canaries in its data


def test_an_audit_leaves_the_engine_and_its_ledger_alone_and_claims_what_the_loop_would() -> None:
    engine = PrivacyEngine(accountant="pld")
    found = engine.audit(train, records(), canaries(), delta=DELTA, seed=3)
    assert len(engine.accountant) == 0
    assert engine.steps == 0
    plain = PrivacyEngine(accountant="pld")
    loop(plain, OneRun(records(), canaries(), seed=None).dataset)
    assert (
        0.5 < found.epsilon_claimed / plain.get_epsilon(DELTA) < 2
    )  # the rate depends on how many coins fell for "in"
    assert "pld" in found.claim


def test_a_seed_repeats_an_audit_and_without_one_runs_differ() -> None:
    assert result() == result()
    assert {OneRun(records(), canaries()).included.tobytes() for _ in range(3)} != {b""}
    assert len({OneRun(records(), canaries()).included.tobytes() for _ in range(3)}) == 3


def test_several_canaries_are_guessed_over_all_runs_and_one_canary_by_its_error_rates() -> None:
    many = result(runs=3, guesses=[10, 60])
    assert (many.canaries, many.runs, many.evidence.canaries, many.looks) == (40, 3, 120, 2)
    one = PrivacyEngine().audit(train, records(), canaries(1), delta=DELTA, runs=12, threshold=-1.0, seed=0)
    assert one.evidence.included + one.evidence.excluded == 12
    half = PrivacyEngine().audit(train, records(), canaries(1), delta=DELTA, runs=12, seed=0)
    assert half.evidence.included + half.evidence.excluded == 6


def test_the_dataset_holds_all_records_and_the_canaries_that_are_in() -> None:
    data = records()
    audit = OneRun(data, canaries(), seed=0)
    held = [audit.dataset[i] for i in range(len(audit.dataset))]
    assert all(torch.equal(held[i][0], data[i][0]) for i in range(len(data)))
    kept = [record for record, coin in zip(canaries(), audit.included, strict=True) if coin]
    assert [record[1] for record in held[len(data) :]] == [label for _, label in kept]
    assert 5 < len(kept) < 35


def test_coins_are_fair() -> None:
    coins = np.concatenate([OneRun(records(), canaries(400), seed=seed).included for seed in range(10)])
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / len(coins) ** 0.5


def test_a_canary_that_was_trained_on_has_the_higher_scores() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 300), torch.randint(2, (32,)))
    audit = OneRun(data, [(torch.randn(300), torch.tensor(i % 2)) for i in range(40)], seed=1)
    model = nn.Linear(300, 2)
    model, optimizer, loader = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=DataLoader(audit.dataset, batch_size=8),
        noise_multiplier=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    with Releases(optimizer) as releases:
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(releases.steps) == len(loader)
    assert releases.steps[0].shape == (602,)
    scores = audit.scores(gradient_score(releases, model, loss))
    assert model.training
    assert scores[audit.included].mean() > 3 * abs(scores[~audit.included].mean())


def test_scores_leave_the_model_and_its_gradients_as_they_are() -> None:
    model, optimizer, loader = loop(PrivacyEngine(seed=0), records())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with Releases(optimizer) as releases:
        optimizer.step()
    optimizer.zero_grad()
    loss_score(model, loss)(records()[0])
    gradient_score(releases, model, loss)(records()[0])
    assert all(p.grad is None for p in model.parameters())
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()  # refuses what is not the clipper's
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------- canaries in the gradients


def test_the_context_leaves_the_optimizer_as_it_found_it() -> None:
    _, optimizer, _ = loop(PrivacyEngine(seed=0), records())
    noise = optimizer.noise
    with GradientCanaries(optimizer) as audit:
        assert optimizer.noise is not noise
    assert optimizer.noise is noise
    optimizer.step()
    assert audit.scores.size == 0


def test_real_records_are_released_with_the_same_sum_and_noise_as_without_the_audit() -> None:
    """With and without canaries, what is released differs by the canaries alone: of norm C, one for each parameter."""
    grads = []
    for audited in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 2).double()
        model, optimizer, loader = PrivacyEngine(seed=0).make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), noise_multiplier=1.0, max_grad_norm=0.3,
            data_loader=DataLoader(TensorDataset(torch.randn(32, 4).double(), torch.randint(2, (32,))), batch_size=8),
        )  # fmt: skip
        audit = GradientCanaries(optimizer, seed=1)
        if audited:
            audit.__enter__()
        released = []
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            released.append([p.grad.clone() for p in model.parameters()])
            optimizer.zero_grad()
        grads.append(released)
    coins = audit.included.reshape(4, 2)
    for step, (plain, with_canaries) in enumerate(zip(*grads, strict=True)):
        for index, (a, b) in enumerate(zip(plain, with_canaries, strict=True)):
            changed = (8 * (b - a)).flatten()
            assert changed.count_nonzero() == int(coins[step, index])
            assert changed.sum() == pytest.approx(0.3 * coins[step, index], abs=1e-9)


@pytest.mark.parametrize("directions", ["dirac", "random"])
@pytest.mark.parametrize("options", [{}, {"loss_reduction": "sum"}, {"clipping": "per_layer"}])
def test_scores_are_the_coins_and_noise_of_sigma(directions: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).to(torch.float64)
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=None, sample_rate=0.1,
        expected_batch_size=5, noise_multiplier=0.7, max_grad_norm=2.0, **options,
    )  # fmt: skip
    with GradientCanaries(optimizer, directions=directions, seed=0) as audit:
        for _ in range(400):
            optimizer.step()
            optimizer.zero_grad()
    rest = audit.scores - audit.included
    assert abs(rest.mean()) < 4 * 0.7 / rest.size**0.5
    assert rest.std() == pytest.approx(0.7, rel=0.08)


def test_the_records_own_gradients_are_not_in_the_scores() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=None, sample_rate=0.5,
        expected_batch_size=64, noise_multiplier=1e-9, max_grad_norm=1.0,
    )  # fmt: skip
    with GradientCanaries(optimizer, seed=0) as audit:
        for _ in range(5):
            F.cross_entropy(model(torch.randn(64, 4).double()), torch.randint(2, (64,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert np.abs(audit.scores - audit.included).max() < 1e-6


def test_a_schedule_is_claimed_by_its_least_noise_and_half_precision_is_read() -> None:
    model = nn.Linear(4, 2).to(torch.bfloat16)
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=None, sample_rate=0.5,
        expected_batch_size=4, noise_multiplier=lambda step: 2.0 - step / 10, max_grad_norm=1.0,
    )  # fmt: skip
    with GradientCanaries(optimizer, seed=0) as audit:
        for _ in range(10):
            optimizer.step()
            optimizer.zero_grad()
    assert "noise multiplier 1.1" in audit.result(delta=DELTA).claim


def test_without_noise_nothing_is_claimed_and_nothing_contradicted() -> None:
    _, optimizer, _ = loop(PrivacyEngine(seed=0), records(), noise_multiplier=0.0)
    with GradientCanaries(optimizer, seed=0) as audit:
        optimizer.step()
    found = audit.result(delta=DELTA)
    assert (found.verdict, found.epsilon_claimed) == ("consistent", float("inf"))
    assert json.loads(found.to_json())["epsilon_claimed"] is None
    found.plot()


# ---------------------------------------------------------------------------------- the result


def test_the_text_says_all_that_a_reader_needs() -> None:
    text = str(result())
    for part in (
        "consistent",
        "delta 1e-05",
        "is claimed",
        "40 canaries",
        "guesses right",
        "confidence 0.95",
        "theorem 5.2",
    ):
        assert part in text
    for part in ("assumes:", "not shown:", "does not prove the claim", "publishing:"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_json_holds_every_field_and_no_private_value() -> None:
    found = result()
    plain = json.loads(found.to_json())
    assert plain["verdict"] == "consistent"
    assert plain["evidence"]["canaries"] == 40
    assert {"delta", "lower", "claimed"} == set(plain["curve"][0])
    assert not {"scores", "coins", "included"} & set(plain)


def test_the_figure_shows_both_curves_and_the_contradiction() -> None:
    pytest.importorskip("matplotlib")
    axes = result().plot()
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "delta", "epsilon")
    assert [line.get_label().split(":")[0] for line in axes.get_lines()] == ["claimed", "shown"]
    assert result().plot(axes) is axes


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"ghostgrad\[report\]"):
        result().plot()


def test_blank_and_mislabelled_records_have_the_form_of_their_models() -> None:
    assert blank({"x": torch.ones(2), "text": "a", "pair": (1, 2.5)})["pair"] == (0, 0.0)
    assert blank([torch.ones(1, dtype=torch.long)])[0].dtype == torch.long
    wrong = mislabelled([*records(50)], classes=3, seed=0)
    assert all(int(a[1]) != int(b[1]) and 0 <= int(a[1]) < 3 for a, b in zip(wrong, records(50), strict=True))
    assert wrong[0][1].dtype == torch.long


# ---------------------------------------------------------------------------------- what is refused


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": 0}, "runs=0"),
        ({"guesses": 41}, "1 to the 40 canaries"),
        ({"guesses": []}, "1 to the 40 canaries"),
        ({"threshold": 0.5}, "one canary and many"),
        ({"confidence": 1.0}, r"between 0\.5 and 1"),
        ({"delta": 0.0}, "delta"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    def never(engine: PrivacyEngine, dataset: Any) -> Any:
        raise AssertionError("trained before the arguments were looked at")

    with pytest.raises(ConfigurationError, match=message):
        PrivacyEngine().audit(never, records(), canaries(), **{"delta": DELTA, **options})


def test_games_that_show_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="canaries is empty"):
        OneRun(records(), [])
    with pytest.raises(ConfigurationError, match="map-style"):
        OneRun(_Stream(), canaries())
    with pytest.raises(ConfigurationError, match="every run is guessed"):
        PrivacyEngine().audit(train, records(), canaries(1), delta=DELTA, runs=2, guesses=1)
    with pytest.raises(ConfigurationError, match="Train first"):
        OneRun(records(), canaries()).result(PrivacyEngine(), lambda record: 0.0, delta=DELTA)
    with pytest.raises(ConfigurationError, match="at least two"):
        mislabelled([*records(2)], classes=1)


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="40 canaries is NaN"):
        OneRun(records(), canaries()).scores(lambda record: float("nan"))
    assert OneRun(records(), canaries()).scores(lambda record: float("-inf")).shape == (40,)


def test_of_runs_with_other_claims_the_weakest_is_doubted() -> None:
    sigmas = iter([1.0, 0.7, 2.0])

    def other(engine: PrivacyEngine, dataset: Any) -> Any:
        return loss_score(loop(engine, dataset, noise_multiplier=next(sigmas), sample_rate=0.2)[0], loss)

    found = PrivacyEngine().audit(other, records(), canaries(), delta=DELTA, runs=3, seed=0)
    weakest = PrivacyEngine(seed=0)
    loop(weakest, records(), noise_multiplier=0.7, sample_rate=0.2)
    assert found.epsilon_claimed == weakest.get_epsilon(DELTA)
    assert "weakest of 3" in found.claim
    assert "number of records is public" in found.assumes


def test_without_poisson_sampling_records_are_not_left_out_but_blanked() -> None:
    def own(engine: PrivacyEngine, dataset: Any) -> Any:
        return loss_score(loop(engine, dataset, poisson_sampling=False)[0], loss)

    with pytest.raises(ConfigurationError, match="GradientCanaries"):
        PrivacyEngine().audit(own, records(), canaries(), delta=DELTA)


def test_only_a_private_optimizer_can_be_audited() -> None:
    model = nn.Linear(2, 2)
    for audit in (GradientCanaries, Releases):
        with pytest.raises(ConfigurationError, match="make_private returned"):
            audit(torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
    _, optimizer, _ = loop(PrivacyEngine(), records())
    with pytest.raises(ConfigurationError, match="did you mean 'dirac'"):
        GradientCanaries(optimizer, directions="dirak")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no logical step"):
        GradientCanaries(optimizer).result(delta=DELTA)
