"""Puts a report together from the facts of an engine. No torch: the facts come as plain data."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ghostgrad.accounting import Accountant
from ghostgrad.accounting._checks import check_delta
from ghostgrad.errors import ConfigurationError, choose
from ghostgrad.provenance import Provenance
from ghostgrad.report.findings import find, verdict
from ghostgrad.report.numbers import UNKNOWN
from ghostgrad.report.privacy_report import FORMAT, VERSION, PrivacyReport
from ghostgrad.report.reading import accountants, attacks, epsilons, figures, kept, releases, tightest
from ghostgrad.spending import ShuffledSpending

DEFAULT_DELTAS = (1e-5, 1e-6, 1e-8)

NOT_COVERED = {
    "hyper_parameters": "Choosing hyper-parameters, the best of several runs or the epoch to keep by the private data is a "
    "release of its own.",
    "metrics": "Losses, accuracies and other numbers computed on the private records are not private when they are published.",
    "preprocessing": "Vocabularies, normalisation constants, filters and features that were computed on the private data.",
    "starting_weights": "Weights that the training started from, where they have seen the same records.",
    "other_trainings": "Other engines, runs and releases on the same records: their epsilons add up with this one.",
    "groups": "A person with several records: epsilon protects one privacy unit. For k of them it is up to k epsilon, at a "
    "larger delta.",
    "dataset_size": "The number of records, which is the expected batch size divided by the sample rate, is treated as public.",
    "floating_point": "Gaps of floating-point numbers, for an attacker who sees released values exactly, unless the noise is of "
    "the secure kind; and the time and memory that a step takes.",
}
"""What no epsilon of a training counts; what the user says about each goes beside it."""

_NOT_PRIVATE = (
    "These depend on private records and no noise was added to them. They are for the eyes of those who may see the records; "
    "do not publish a report that holds them."
)


def make_report(
    *,
    accountant: Accountant,
    trainings: Sequence[Mapping[str, Any]],
    steps: int,
    made: Mapping[Provenance, int],
    guarantee: str,
    budget: tuple[float, float] | None,
    deltas: Sequence[float],
    privacy_unit: str,
    title: str,
    statements: Mapping[str, str] | None,
    not_private: Mapping[str, Any] | None = None,
) -> PrivacyReport:
    """The report of one engine.

    Args:
        accountant: what was released.
        trainings: `training_facts` of each.
        steps: logical steps made, also by other trainings than these.
        made: how many releases in which way.
        guarantee: neighbouring relation and sampling, as a sentence.
        budget: target epsilon and delta that are kept.
        deltas, privacy_unit, title, statements: as in ``PrivacyEngine.report``.
        not_private: what the user asked to see beside, or None.

    Raises:
        ConfigurationError: as in ``PrivacyEngine.report``.
    """
    asked = _checked_deltas(deltas)
    stated = _checked_statements(statements)
    for name, text in (("privacy_unit", privacy_unit), ("title", title)):
        _check_text(name, text)
    neighbouring = _relation(accountant, trainings, guarantee)
    held = accountants(accountant.ledger, neighbouring, accountant)
    tight = tightest(held)
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "title": title,
        "holds": UNKNOWN,
        "findings": [],
        "privacy_unit": privacy_unit,
        "neighbouring": neighbouring,
        "guarantee": guarantee,
        "accountant": accountant.mechanism,
        "epsilon": epsilons(held, asked),
        "releases": releases(accountant.ledger, steps, [{"releases": count, **how.plain()} for how, count in made.items()]),
        "ledger": kept(accountant.ledger),
        "budget": None if budget is None else {"epsilon": budget[0], "delta": budget[1]},
        "trainings": [dict(training) for training in trainings],
        "attacks": attacks(tight),
        "figures": figures(tight, asked[0]),
        "not_covered": [{"what": what, "why": why, "stated": stated.get(what, UNKNOWN)} for what, why in NOT_COVERED.items()],
        "not_private": None if not_private is None else {"warning": _NOT_PRIVATE, **not_private},
        "libraries": _libraries(),
    }  # fmt: skip
    data["findings"] = find(data)
    data["holds"] = verdict(data["findings"])
    return PrivacyReport.from_data(data)


def _relation(accountant: Accountant, trainings: Sequence[Mapping[str, Any]], guarantee: str) -> str:
    """The relation that every part holds for.

    A Poisson-sampled step bounds blanking a record as it bounds removing it (a blank adds nothing to the sum), so that with
    any training on its own batches the whole holds for blanking.
    """
    if accountant.neighbouring == "replace-one":
        return "replace-one"
    blanked = any(training["sampling"]["assumed"] != "poisson" for training in trainings)
    # Of a training that came with a checkpoint or a ledger file the sentence is what is known.
    return "zero-out" if blanked or ShuffledSpending.guarantee in guarantee else "add-or-remove-one"


def _checked_deltas(deltas: Sequence[float]) -> list[float]:
    if isinstance(deltas, (str, bytes, Mapping)) or not isinstance(deltas, Sequence) or not deltas:
        raise ConfigurationError(
            f"deltas={deltas!r} must be a list of one or more numbers in (0, 1), the main one first."
        )
    return list(dict.fromkeys(float(check_delta(delta, "deltas")) for delta in deltas))


def _checked_statements(statements: Mapping[str, str] | None) -> dict[str, str]:
    if statements is not None and not isinstance(statements, Mapping):
        raise ConfigurationError(f"statements={statements!r} must be a mapping from {', '.join(NOT_COVERED)} to text.")
    for name, text in (statements or {}).items():
        choose("statements", name, NOT_COVERED)
        _check_text(f"statements[{name!r}]", text)
    return dict(statements or {})


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str) or len(text) > 10_000:
        raise ConfigurationError(f"{name}={str(text)[:60]!r} must be text of at most 10,000 characters.")


def _libraries() -> list[dict[str, str]]:
    names = ("ghostgrad", "torch", "numpy", "scipy", "cryptography")
    found = [{"name": name, "version": _installed(name)} for name in names]
    return [{"name": "python", "version": platform.python_version()}, *found]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
