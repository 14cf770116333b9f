"""Whatever voids a guarantee, or whatever it rests on, is the first thing that any form of the report says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ghostgrad import PrivacyEngine, PrivacyReport
from ghostgrad.accounting import FixedSizeSampled, Gaussian, Opaque
from ghostgrad.report.view import lines

Train = Callable[..., PrivacyEngine]


def codes(report: PrivacyReport, effect: str) -> list[str]:
    return [finding["code"] for finding in report.data["findings"] if finding["effect"] == effect]


CLAIM = re.compile(r"-differentially private|No (finite|known) |Epsilon at delta")


def said_before_the_claim(report: PrivacyReport, words: str) -> None:
    """In every form the words come before what is claimed."""
    page = report.to_html()
    forms = (
        "\n".join(lines(report.data)), page[page.index("<body>") :], report.to_markdown().replace("\\", ""),
        report.to_latex().replace("\\_", "_"), json.loads(report.to_deployment_record())["deployment"]["privacy_loss"][
            "privacy_parameters_details"
        ],
    )  # fmt: skip
    for text in forms:
        claim = CLAIM.search(text)
        assert claim is not None
        assert 0 <= text.index(words) < claim.start()


def test_a_plain_run_holds_and_has_nothing_to_add(train: Train) -> None:
    report = train().report(deltas=[1e-5])
    assert report.holds == "yes"
    assert codes(report, "void") == codes(report, "assumed") == []


def test_no_noise(train: Train) -> None:
    report = train(noise_multiplier=0.0).report()
    assert report.holds == "no"
    assert codes(report, "void") == ["no-noise", "epsilon-infinite"]
    said_before_the_claim(report, "no noise was added")
    assert "infinity" in report.to_markdown()
    assert "No finite $\\varepsilon$" in report.to_latex()
    assert 'privacy_parameters"' not in report.to_deployment_record()


def test_noise_that_is_zero_in_a_single_step(train: Train) -> None:
    report = train(noise_multiplier=lambda step: 0.0 if step == 1 else 1.0).report()
    assert report.holds == "no"
    assert "no-noise" in codes(report, "void")


def test_a_seed(train: Train) -> None:
    report = train(engine=PrivacyEngine(seed=3)).report()
    assert report.holds == "no"
    assert codes(report, "void") == ["seeded"]
    said_before_the_claim(report, "Whoever knows or guesses the seed")


def test_a_seed_also_where_the_noise_has_a_generator_of_its_own(train: Train) -> None:
    report = train(engine=PrivacyEngine(seed=3), noise_generator=torch.Generator()).report()
    assert codes(report, "void") == ["seeded"]


def test_a_generator_of_the_user_s(train: Train) -> None:
    report = train(noise_generator=torch.Generator()).report()
    assert report.holds == "unknown"
    assert codes(report, "assumed") == ["noise-generator"]
    assert report.data["trainings"][0]["noise"]["seeded"] == "unknown"
    said_before_the_claim(report, "a generator of the user")


def test_batches_that_the_user_samples(train: Train) -> None:
    report = train(data_loader=None, sample_rate=0.2, expected_batch_size=8.0).report()
    assert report.holds == "unknown"
    assert codes(report, "assumed") == ["user-sampled"]
    sampling = report.data["trainings"][0]["sampling"]
    assert (sampling["assumed"], sampling["observed"], sampling["draws"]) == ("poisson", "unknown", "unknown")
    said_before_the_claim(report, "data_loader=None")


def test_batches_that_are_not_sampled(train: Train) -> None:
    report = train(poisson_sampling=False).report()
    assert report.holds == "yes"
    assert codes(report, "other")[0] == "not-amplified"
    assert report.data["neighbouring"] == "zero-out"
    said = report.to_html()
    assert said.index("nothing is amplified") < said.index("-differentially private")
    assert "blanking one privacy unit" in report.to_latex()


def test_releases_that_were_recorded_by_hand(train: Train) -> None:
    engine = train()
    engine.accountant.record(Opaque(0.1, 1e-7))
    engine.accountant.record(Gaussian(5.0), 2)
    report = engine.report(deltas=[1e-5, 1e-8])
    assert report.holds == "unknown"
    assert codes(report, "assumed") == ["by-hand-Gaussian", "opaque-events"]
    assert codes(report, "other")[0] == "epsilon-infinite-somewhere"
    said_before_the_claim(report, "1 release(s) were recorded by hand (Opaque)")


def test_an_infinite_epsilon_at_every_delta(train: Train) -> None:
    engine = train()
    engine.accountant.record(Opaque(0.1, 1e-2))
    report = engine.report(deltas=[1e-5])
    assert codes(report, "void") == ["epsilon-infinite"]
    said_before_the_claim(report, "Epsilon is infinite at every delta")


def test_a_relation_of_replacing_one_record() -> None:
    engine = PrivacyEngine()
    engine.accountant.record(FixedSizeSampled(0.1, Gaussian(4.0)))
    data = engine.report(deltas=[1e-5]).data
    assert data["neighbouring"] == "replace-one"
    assert {row["accountant"] for row in data["epsilon"]} == {"rdp", "pld"}


def test_a_ledger_that_no_accountant_reads(train: Train) -> None:
    engine = train(sample_rate=0.2)
    engine.accountant.record(FixedSizeSampled(0.1, Gaussian(4.0)))
    report = engine.report(deltas=[1e-5])
    assert codes(report, "void") == ["epsilon-unknown"]
    assert report.data["attacks"]["membership_advantage"] == "unknown"
    for text in (report.to_html(), report.to_markdown(), report.to_deployment_record(), report.to_latex()):
        assert "No accountant can read this ledger" in text


def test_a_ledger_that_was_loaded(train: Train) -> None:
    engine = PrivacyEngine()
    engine.accountant.load_state_dict(train().accountant.state_dict())
    report = engine.report(deltas=[1e-5])
    assert codes(report, "assumed") == ["carried-over"]
    said_before_the_claim(report, "3 of the 3 releases in the ledger were made elsewhere")


def test_a_gaussian_release_that_was_recorded_by_hand(train: Train) -> None:
    """It looks like one of the training's, and no training of the library made it."""
    engine = train()
    engine.accountant.step(noise_multiplier=1.0, sample_rate=1.0)
    report = engine.report(deltas=[1e-5])
    assert codes(report, "assumed") == ["carried-over"]
    said_before_the_claim(report, "1 of the 4 releases in the ledger were made elsewhere")


def test_nothing_released_yet(train: Train) -> None:
    assert codes(train(steps=0).report(), "other") == ["nothing-released"]


def test_a_delta_at_which_a_record_may_be_published(train: Train) -> None:
    engine = train()
    assert codes(engine.report(deltas=[0.025]), "other") == ["delta-too-large"]
    assert codes(engine.report(deltas=[0.0249]), "other") == []


def test_what_an_ended_training_did_is_kept(train: Train) -> None:
    engine = train(noise_multiplier=0.0)
    engine.detach()
    train(engine=engine, steps=2, poisson_sampling=False)
    report = engine.report()
    assert codes(report, "void") == ["no-noise", "epsilon-infinite"]
    assert [training["steps"] for training in report.data["trainings"]] == [3, 2]
    assert report.data["neighbouring"] == "zero-out"
    assert "Training 2: Sequential" in report.to_markdown()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"deltas": []}, "deltas"),
        ({"deltas": [0.0]}, "deltas=0.0"),
        ({"deltas": "1e-5"}, "deltas"),
        ({"privacy_unit": 3}, "privacy_unit"),
        ({"title": "x" * 10_001}, "title"),
        ({"statements": {"hyper_parameter": "none"}}, "did you mean 'hyper_parameters'"),
        ({"statements": {"metrics": 3}}, "metrics"),
        ({"statements": ["metrics"]}, "statements"),
        ({"not_private": "no"}, "not_private"),
    ],
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PrivacyEngine().report(**options)
