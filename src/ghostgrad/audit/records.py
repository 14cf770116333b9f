"""Canaries in the data: records that a fair coin puts into the dataset, and guesses of the coins after training."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset

from ghostgrad.accounting import Accountant
from ghostgrad.audit.evidence import Coins, Evidence, Floats, check_scores, default_guesses, guess_extremes
from ghostgrad.audit.result import AuditResult, Claim, judge
from ghostgrad.errors import ConfigurationError
from ghostgrad.spending import ShuffledSpending

Score = Callable[[Any], float]
"""From a canary to a number; higher means that it looks more as if it was trained on."""

ASSUMES_NOTHING = "nothing of how canaries influence each other, nor of the kind of mechanism"
NOT_SHOWN = (
    "The attack only uses what the score looks at; a score of the final model's loss sees far less than an attacker who sees "
    "every step.",
)
MAY_BE_PUBLISHED = (
    "The counts are a function of the trained model and the coins, and of the real records only through the audited training. "
    "To publish them, or to act on them in public, spends that training's epsilon, once for each run, if its claim is true; if "
    "it is contradicted, keep it to yourself. Scores and coins stay private."
)


class _Private(Protocol):
    """What an audit asks of a `PrivacyEngine`."""

    @property
    def accountant(self) -> Accountant: ...

    @property
    def guarantee(self) -> str: ...


class OneRun:
    """Canaries for one training: put `dataset` where the real one was, train, and ask for `result`.

    Each canary is in by a coin of its own, so one training tests all of them (Steinke, Nasr and Jagielski 2023). The real
    records are all in, untouched, and are protected as without the audit: canaries are records like any other. Do not make
    canaries out of real records: a record and its copy are two records, and together less protected.

    Whoever counts records learns how many coins fell for "in". To keep that out of the audit give ``make_private`` a
    ``sample_rate`` and ``expected_batch_size`` that do not depend on ``len(dataset)``.

    Args:
        dataset: the real records, map-style.
        canaries: records of the same form, made up or public: mislabelled, blank, out of the ordinary. Some hundred show more
            than some ten.
        seed: makes the coins reproducible. Default None takes them from the operating system.

    Attributes:
        dataset: the real records and the canaries that are in.
        included: the coins.

    Raises:
        ConfigurationError: no canaries, or a dataset without a length.

    >>> from torch.utils.data import TensorDataset
    >>> audit = OneRun(TensorDataset(torch.zeros(10, 2)), [(torch.ones(2),)] * 6, seed=0)
    >>> len(audit.dataset) == 10 + int(audit.included.sum())
    True
    """

    def __init__(self, dataset: Dataset[Any], canaries: Sequence[Any], *, seed: int | None = None) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ConfigurationError(
                f"dataset is a {type(dataset).__name__}, into which no record can be put; give a map-style one (with __len__)."
            )
        if len(canaries) == 0:
            raise ConfigurationError(
                "canaries is empty: without canaries there is no coin to guess. Give some records."
            )
        self.canaries = canaries
        self.included: Coins = (
            np.random.default_rng(secrets.randbits(128) if seed is None else seed).random(len(canaries)) < 0.5
        )
        kept = [canary for canary, coin in zip(canaries, self.included, strict=True) if coin]
        self.dataset: Dataset[Any] = ConcatDataset([dataset, _Records(kept)]) if kept else dataset

    def scores(self, score: Score) -> Floats:
        """The score of every canary, in or out."""
        return check_scores([float(score(canary)) for canary in self.canaries], self.included)

    def result(
        self,
        engine: _Private,
        score: Score,
        *,
        delta: float,
        guesses: int | Sequence[int] | None = None,
        confidence: float = 0.95,
    ) -> AuditResult:
        """Guess the coins from the scores and hold what was right against what the engine claims.

        Args:
            engine: whose private training ran on `dataset`, and on nothing else.
            score: see `loss_score` and `gradient_score` for two that are ready.
            delta: where epsilon is reported. The verdict looks at the whole curve.
            guesses: how many coins to guess; several numbers share the confidence. Default a tenth, a third and all.
            confidence: of the verdict. Default 0.95.

        Raises:
            ConfigurationError: nothing was trained, or without Poisson sampling (see `claim_of`).
        """
        return judge_guesses(
            self.scores(score),
            self.included,
            claim_of(engine),
            delta=delta,
            guesses=guesses,
            confidence=confidence,
            runs=1,
            assumes=ASSUMES_NOTHING,
        )


class _Records(Dataset[Any]):
    def __init__(self, records: Sequence[Any]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return self._records[index]


def claim_of(engine: _Private) -> Claim:
    """What the engine claims of the records in its dataset.

    Raises:
        ConfigurationError: it made no step; or without Poisson sampling, where the claim is about blanking a record in its place
            in the order, and a canary that is left out moves the places of others.
    """
    if len(engine.accountant) == 0:
        raise ConfigurationError("the engine has noted no step, so there is no claim to audit. Train first.")
    if ShuffledSpending.guarantee in engine.guarantee:
        raise ConfigurationError(
            f"the engine claims epsilon where {ShuffledSpending.guarantee}: a record that a coin leaves out of the dataset is "
            f"not blanked, it moves the others to other batches. Audit with poisson_sampling=True, or with "
            f"GradientCanaries, whose canaries leave everything in its place."
        )
    return Claim.of_accountant(engine.accountant)


def judge_guesses(
    scores: Floats,
    included: Coins,
    claim: Claim,
    *,
    delta: float,
    guesses: int | Sequence[int] | None,
    confidence: float,
    runs: int,
    assumes: str,
) -> AuditResult:
    """Guess the extremes of the scores, as many as was said before."""
    numbers = numbers_of_guesses(guesses, len(scores))

    def look(number: int) -> Callable[[float], Evidence]:
        return lambda level: guess_extremes(scores, included, number)

    return judge(
        {
            f"the {number} most extreme scores" if number < len(scores) else "all scores": look(number)
            for number in numbers
        },
        claim,
        attack="records put into the data by coins, scored after training",
        delta=delta,
        confidence=confidence,
        canaries=len(scores) // runs,
        runs=runs,
        assumes=assumes,
        does_not_show=NOT_SHOWN,
        may_be_published=MAY_BE_PUBLISHED,
    )


def numbers_of_guesses(guesses: int | Sequence[int] | None, canaries: int) -> tuple[int, ...]:
    """How many coins each look guesses, checked."""
    if guesses is None:
        return default_guesses(canaries)
    numbers = (guesses,) if isinstance(guesses, int) else tuple(dict.fromkeys(guesses))
    if not numbers or not all(isinstance(number, int) and 1 <= number <= canaries for number in numbers):
        raise ConfigurationError(f"guesses={guesses!r} must be whole numbers from 1 to the {canaries} canaries.")
    return numbers


def mislabelled(records: Sequence[tuple[Any, Any]], classes: int, *, seed: int | None = None) -> list[tuple[Any, Any]]:
    """Pairs ``(x, label)`` with a wrong label each, uniformly one of the others. Take records that are not in the dataset.

    >>> [label for _, label in mislabelled([("a", 0), ("b", 1)], classes=2)]
    [1, 0]
    """
    shifts = np.random.default_rng(seed).integers(1, classes, len(records)) if classes > 1 else None
    if shifts is None:
        raise ConfigurationError(f"classes={classes}: a wrong label needs at least two.")
    return [
        (x, _like(label, (int(label) + int(shift)) % classes))
        for (x, label), shift in zip(records, shifts, strict=True)
    ]


def blank(record: Any) -> Any:
    """The record with zeros in place of its tensors' values and numbers.

    >>> blank((torch.ones(2), 3))
    (tensor([0., 0.]), 0)
    """
    if isinstance(record, torch.Tensor):
        return torch.zeros_like(record)
    if isinstance(record, (tuple, list)):
        return type(record)(blank(part) for part in record)
    if isinstance(record, dict):
        return {key: blank(part) for key, part in record.items()}
    return type(record)(0) if isinstance(record, (int, float)) else record


def _like(label: Any, number: int) -> Any:
    return torch.full_like(label, number) if isinstance(label, torch.Tensor) else number
