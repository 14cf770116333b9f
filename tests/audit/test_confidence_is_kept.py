"""By simulation: what is private is contradicted as rarely as was promised, and half the noise is caught."""

from __future__ import annotations

import numpy as np
import pytest

from ghostgrad.audit import one_run_epsilon
from ghostgrad.audit.evidence import count_errors, default_guesses, guess_extremes, split_errors
from ghostgrad.audit.result import Claim, judge

SIMULATIONS, LEVEL = 1500, 0.05
MOST = LEVEL + 3 * (LEVEL * (1 - LEVEL) / SIMULATIONS) ** 0.5


def gaussian_game(generator, trials, sigma):
    coins = generator.random(trials) < 0.5
    return coins + sigma * generator.standard_normal(trials), coins


def test_randomised_response_is_contradicted_no_more_often_than_promised():
    generator, epsilon, m = np.random.default_rng(0), 1.0, 100
    success = np.exp(epsilon) / (1 + np.exp(epsilon))
    correct = generator.binomial(m, success, SIMULATIONS)
    shown = {v: one_run_epsilon(v, m, m, 0.0, 1 - LEVEL) for v in np.unique(correct).tolist()}
    above = np.mean([shown[v] > epsilon for v in correct.tolist()])
    assert 0.02 < above <= MOST  # as tight as whole numbers let it be
    assert np.mean([shown[v] > epsilon / 2 for v in correct.tolist()]) > 0.6


def test_randomised_response_that_sometimes_leaks_everything_is_too():
    """With probability delta all coins are in the open: (epsilon, delta), which the bound without delta would deny."""
    generator, epsilon, delta, m = np.random.default_rng(1), 1.0, 0.06, 50
    success = np.exp(epsilon) / (1 + np.exp(epsilon))
    correct = np.where(generator.random(SIMULATIONS) < delta, m, generator.binomial(m, success, SIMULATIONS))
    for used, honest in ((delta, True), (0.0, False)):
        shown = {v: one_run_epsilon(v, m, m, used, 1 - LEVEL) for v in np.unique(correct).tolist()}
        above = np.mean([shown[v] > epsilon for v in correct.tolist()])
        assert bool(above <= MOST) is honest


@pytest.mark.parametrize("form", ["threshold", "split", "one run"])
def test_the_gaussian_mechanism_is_contradicted_no_more_often_than_promised(form):
    generator, contradicted, games = np.random.default_rng(2), 0, 150 if form == "one run" else 400
    for _ in range(games):
        scores, coins = gaussian_game(generator, 200, sigma=1.0)
        contradicted += judged(form, scores, coins, claimed_sigma=1.0).contradicted
    assert contradicted <= games * LEVEL + 3 * (games * LEVEL * (1 - LEVEL)) ** 0.5


@pytest.mark.parametrize(
    ("form", "trials", "sigma"), [("threshold", 200, 0.5), ("split", 600, 0.5), ("one run", 6000, 0.25)]
)
def test_too_little_noise_is_caught(form, trials, sigma):
    generator = np.random.default_rng(3)
    caught = [judged(form, *gaussian_game(generator, trials, sigma), claimed_sigma=1.0).contradicted for _ in range(10)]
    assert sum(caught) >= 8


def judged(form, scores, coins, claimed_sigma):
    looks = {
        "threshold": {"half": lambda level: count_errors(scores, coins, 0.5, gaussian=True)},
        "split": {"split": lambda level: split_errors(scores, coins, level)},
        "one run": {
            str(k): (lambda level, k=k: guess_extremes(scores, coins, k)) for k in default_guesses(len(scores))
        },
    }[form]
    return judge(
        looks, Claim.of_gaussian(claimed_sigma), attack="", delta=1e-5, confidence=1 - LEVEL, canaries=1, runs=1,
        assumes="", does_not_show=(), may_be_published="",
    )  # fmt: skip


def test_the_best_of_many_looks_would_not_keep_the_confidence_and_a_paid_one_does():
    """Scores that say nothing: the best of twenty numbers of guesses says something far too often, unless each pays its share."""
    generator, free, paid, split, games, looks = np.random.default_rng(4), 0, 0, 0, 200, range(10, 201, 10)
    for _ in range(games):
        scores, coins = generator.standard_normal(200), generator.random(200) < 0.5
        found = [guess_extremes(scores, coins, number) for number in looks]
        free += any(guesses.epsilon_lower(0.0, LEVEL) > 0 for guesses in found)
        paid += any(guesses.epsilon_lower(0.0, LEVEL / len(looks)) > 0 for guesses in found)
        split += split_errors(scores, coins, LEVEL).mu_lower(LEVEL) > 0
    most = games * LEVEL + 3 * (games * LEVEL * (1 - LEVEL)) ** 0.5
    assert free > most
    assert max(paid, split) <= most


def test_guesses_follow_the_scores_and_not_the_coins():
    generator = np.random.default_rng(5)
    scores, coins = generator.standard_normal(501), generator.random(501) < 0.5
    for guesses in (1, 2, 7, 500, 501):
        found, turned = (guess_extremes(scores, c, guesses) for c in (coins, ~coins))
        assert found.correct + turned.correct == found.guesses == guesses
