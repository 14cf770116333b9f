"""Fifty seeds of every kind of training: no audit says that epsilon is larger than claimed."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _attacks import ATTACKS, noise, one_run_by_gradients
from _faults import noise_scaled
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, PrivacyEngine
from ghostgrad.audit import Errors, GradientCanaries
from ghostgrad.audit.evidence import count_errors

SEEDS = range(50)
TRAININGS: dict[str, dict[str, Any]] = {
    "bk": {"grad_sample_mode": "bk"},
    "ghost, memory manager": {"grad_sample_mode": "ghost", "physical": 2},
    "hooks, per layer": {"grad_sample_mode": "hooks", "clipping": "per_layer"},
    "functorch, automatic": {"grad_sample_mode": "functorch", "clipping": "automatic"},
    "adaptive": {"clipping": "adaptive", "noise_multiplier": 0.8},
    "own batches, sum": {"poisson_sampling": False, "loss_reduction": "sum"},
    "accumulation": {"accumulation_steps": 2, "records": 80},
    "ghost, accumulation by hand, random directions": {
        "grad_sample_mode": "ghost", "backwards": 2, "records": 80, "directions": "random"
    },
}  # fmt: skip


def audited(seed: int, **options: Any) -> GradientCanaries:
    """A pass over a small network's records, audited, with the noise as it is accounted."""
    physical, backwards = options.pop("physical", None), options.pop("backwards", 1)
    directions, records = options.pop("directions", "dirac"), options.pop("records", 40)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = TensorDataset(torch.randn(records, 3), torch.randint(2, (records,)))
    options = {"noise_multiplier": 1.0, "max_grad_norm": 0.7, **options}
    model, optimizer, loader = PrivacyEngine(seed=seed).make_private(
        module=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.01), data_loader=DataLoader(data, batch_size=4),
        **options,
    )  # fmt: skip
    manager: Any = contextlib.nullcontext(loader)
    if physical:
        manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer)
    with GradientCanaries(optimizer, directions=directions, seed=seed) as canaries, manager as batches:
        for number, (x, y) in enumerate(batches):
            F.cross_entropy(model(x), y, reduction=options.get("loss_reduction", "mean")).backward()
            if number % backwards == backwards - 1:
                optimizer.step()
                optimizer.zero_grad()
    return canaries


def pooled(found: list[GradientCanaries]) -> Errors:
    """The errors over all seeds, which show far more than those of one."""
    scores, coins = (np.concatenate([getattr(c, name) for c in found]) for name in ("scores", "included"))
    return count_errors(scores, coins, 0.5, gaussian=True)


@pytest.mark.parametrize("training", TRAININGS)
def test_the_noise_of_fifty_trainings_is_what_is_claimed(training: str) -> None:
    options, start = TRAININGS[training], 100 * list(TRAININGS).index(training)
    found = [audited(start + seed, **options) for seed in SEEDS]
    assert not any(canaries.result(delta=1e-5, confidence=0.99).contradicted for canaries in found)
    assert 0.5 < pooled(found).mu_lower(0.001) <= 1 / options.get("noise_multiplier", 1.0)


@pytest.mark.parametrize("training", ["bk", "adaptive"])
def test_three_quarters_of_the_noise_would_be_noticed_in_the_fifty(training: str) -> None:
    options = TRAININGS[training]
    with noise_scaled(0.75):
        found = pooled([audited(seed, **options) for seed in SEEDS])
    assert found.mu_lower(0.05) > 1 / options.get("noise_multiplier", 1.0)


def test_half_the_noise_is_caught_in_nearly_every_audit() -> None:
    with noise_scaled(0.5):
        found = [noise(seed, 120).contradicted for seed in range(6)]
    assert sum(found) >= 5  # of 40 seeds all are; of 60 steps each, three quarters


def test_all_canaries_of_one_run_are_guessed_no_better_than_claimed() -> None:
    found = [one_run_by_gradients(seed, 150) for seed in SEEDS]
    assert not any(result.contradicted for result in found)
    assert sum(result.epsilon_lower > 0.3 for result in found) > 25


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_contradicts_a_correct_training(attack: str) -> None:
    assert ATTACKS[attack].run(1, ATTACKS[attack].short).verdict == "consistent"
