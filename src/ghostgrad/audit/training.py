"""A user's whole training as the thing that is audited, once or many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from ghostgrad.accounting import Ledger
from ghostgrad.accounting._checks import check_delta
from ghostgrad.audit.bounds import check_confidence
from ghostgrad.audit.evidence import Coins, Evidence, Floats, count_errors, split_errors
from ghostgrad.audit.records import (
    ASSUMES_NOTHING,
    MAY_BE_PUBLISHED,
    NOT_SHOWN,
    OneRun,
    Score,
    _Private,
    claim_of,
    judge_guesses,
    numbers_of_guesses,
)
from ghostgrad.audit.result import AuditResult, Claim, judge
from ghostgrad.errors import ConfigurationError
from ghostgrad.keys import RunKey

Engine = TypeVar("Engine", bound=_Private)


def audit_training(
    new_engine: Callable[[int | None], Engine],
    train: Callable[[Engine, Dataset[Any]], Score],
    dataset: Dataset[Any],
    canaries: Sequence[Any],
    *,
    delta: float,
    runs: int,
    guesses: int | Sequence[int] | None,
    threshold: float | None,
    confidence: float,
    seed: int | None,
) -> AuditResult:
    """``PrivacyEngine.audit`` with engines that ``new_engine`` makes, given a seed or None."""
    many = _is_many(runs, canaries, guesses, threshold)
    # Found out now, not after the trainings.
    check_delta(delta)
    check_confidence(confidence)
    numbers_of_guesses(guesses, runs * len(canaries))
    games: list[tuple[Floats, Coins]] = []
    claims: list[tuple[Ledger, Claim]] = []
    for run in range(runs):
        game = OneRun(dataset, canaries, seed=_derived(seed, "coins", run))
        engine = new_engine(_derived(seed, "engine", run))
        games.append((game.scores(train(engine, game.dataset)), game.included))
        if engine.accountant.ledger not in [ledger for ledger, _ in claims]:
            claims.append((engine.accountant.ledger, claim_of(engine)))
    scores, included = (np.concatenate(part) for part in zip(*games, strict=True))
    claim = Claim.weakest([claim for _, claim in claims])
    size_is_public = (
        "" if len(claims) == 1 else "; the number of records is public (give a sample_rate, and it need not be)"
    )
    if not many:
        return judge_guesses(
            scores, included, claim, delta=delta, guesses=guesses, confidence=confidence, runs=runs,
            assumes=ASSUMES_NOTHING + size_is_public,
        )  # fmt: skip

    def look(level: float) -> Evidence:
        return split_errors(scores, included, level) if threshold is None else count_errors(scores, included, threshold)

    return judge(
        {"threshold chosen on the first half of the runs" if threshold is None else f"threshold {threshold:g}": look},
        claim,
        attack="one record put into the data by a coin in every run, scored after training",
        delta=delta,
        confidence=confidence,
        canaries=1,
        runs=runs,
        assumes="runs that are independent of each other" + size_is_public,
        does_not_show=NOT_SHOWN,
        may_be_published=MAY_BE_PUBLISHED,
    )


def _is_many(runs: int, canaries: Sequence[Any], guesses: object, threshold: float | None) -> bool:
    """Whether error rates over runs are counted: several runs of one canary."""
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise ConfigurationError(f"runs={runs!r} must be a whole number, at least 1.")
    many = runs > 1 and len(canaries) == 1
    if threshold is not None and not many:
        raise ConfigurationError(
            f"threshold={threshold} with {len(canaries)} canaries and runs={runs}: a threshold goes with one canary and many "
            f"runs; several canaries are guessed by the order of their scores."
        )
    if guesses is not None and many:
        raise ConfigurationError(
            f"guesses={guesses} with one canary and runs={runs}: every run is guessed, by the threshold. Leave guesses out."
        )
    return many


def _derived(seed: int | None, purpose: str, run: int) -> int | None:
    return None if seed is None else int.from_bytes(RunKey.from_seed(seed).derive(f"audit {purpose}", run)[:8], "big")
