"""Attacks through the public API, each on a tiny training that a fault would make leak. All are seeded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import PrivacyEngine
from ghostgrad.audit import AuditResult, GradientCanaries, OneRun, Releases, gradient_score, loss_score, mislabelled

DELTA, CONFIDENCE = 1e-5, 0.99


class Sum(nn.Module):
    """The sum of a linear map over positions, without bias: a record's gradient is the sum of its rows, at any weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x).sum((1, 2))


def private(engine: PrivacyEngine, module: nn.Module, data: Any, batch_size: int, sigma: float, **options: Any) -> Any:
    """Module, optimizer and loader, in the smallest training that has all parts."""
    options = {"max_grad_norm": 1.0, "lr": 0.0, **options}
    sgd = torch.optim.SGD(module.parameters(), lr=options.pop("lr"))
    loader = DataLoader(data, batch_size=batch_size, shuffle=options.pop("shuffle", False))
    return engine.make_private(module=module, optimizer=sgd, data_loader=loader, noise_multiplier=sigma, **options)


def train(module: nn.Module, optimizer: Any, loader: Any) -> None:
    """One pass over records whose loss is the model's output."""
    for (x,) in loader:
        module(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------- gradient space


def _canaries(trials: int, seed: int, **options: Any) -> GradientCanaries:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    data = TensorDataset(torch.randn(4 * trials, 4), torch.randint(2, (4 * trials,)))
    model, optimizer, loader = private(PrivacyEngine(seed=seed), model, data, 4, 1.0)
    with GradientCanaries(optimizer, seed=seed, **options) as canaries:
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return canaries


def noise(seed: int, trials: int = 60) -> AuditResult:
    """Canaries in the gradients of a small network."""
    return _canaries(trials, seed).result(delta=DELTA, confidence=CONFIDENCE)


def resumed_noise(seed: int, trials: int = 60) -> AuditResult:
    """The same, before and after a resume in another process; only what is new after it is counted."""
    before = _canaries(trials, seed)
    return _canaries(trials, seed + 1000, after=before).result(delta=DELTA, confidence=CONFIDENCE)


# ---------------------------------------------------------------------------------- input space, many runs


def blank_record(seed: int, trials: int = 80) -> AuditResult:
    """A record with no gradient at all, told by how large the released noise is."""

    def loop(engine: PrivacyEngine, dataset: Any) -> Callable[[Any], float]:
        made = private(engine, Sum(400), dataset, 4, 1.0, sample_rate=1.0, expected_batch_size=4.0)
        with Releases(made[1]) as releases:
            train(*made)
        return lambda _: -float(releases.steps[0].norm())

    halfway = -(400**0.5) * (1 / 4 + 1 / 5) / 2  # noise divided by 4 or by 5
    return _many(loop, TensorDataset(torch.zeros(4, 1, 400)), (torch.zeros(1, 400),), seed, trials, halfway)


def long_record(seed: int, trials: int = 160) -> AuditResult:
    """A record of eight rows, each of the largest norm, all in one direction."""
    canary = torch.zeros(8, 8)
    canary[:, 0] = 1.0

    def loop(engine: PrivacyEngine, dataset: Any) -> Callable[[Any], float]:
        made = private(engine, Sum(8), dataset, 4, 1.0, sample_rate=1.0, expected_batch_size=4.0)
        with Releases(made[1]) as releases:
            train(*made)
        return lambda _: float(releases.steps[0][0])

    return _many(loop, TensorDataset(torch.zeros(4, 8, 8)), (canary,), seed, trials)


def one_pass(seed: int, trials: int = 120) -> AuditResult:
    """The largest release of one pass with little noise. Poisson samples leave the canary out of a third of all passes."""
    canary = torch.zeros(1, 2)
    canary[0, 0] = 1.0

    def loop(engine: PrivacyEngine, dataset: Any) -> Callable[[Any], float]:
        made = private(engine, Sum(2), dataset, 2, 0.15, shuffle=True, sample_rate=0.2, expected_batch_size=2.0)
        with Releases(made[1]) as releases:
            train(*made)
        return lambda _: 2 * max(float(step[0]) for step in releases.steps)

    return _many(loop, TensorDataset(torch.zeros(9, 1, 2)), (canary,), seed, trials, 0.6)


def _many(
    loop: Any, data: Any, canary: tuple[Tensor, ...], seed: int, trials: int, threshold: float | None = None
) -> AuditResult:
    engine = PrivacyEngine(accountant="pld")
    return engine.audit(
        loop, data, [canary], delta=DELTA, runs=trials, threshold=threshold, confidence=CONFIDENCE, seed=seed
    )


# ---------------------------------------------------------------------------------- input space, one run


def one_run_by_gradients(seed: int, trials: int = 1500) -> AuditResult:
    """Orthogonal canaries of the largest norm in one full-batch step, scored by every release."""
    directions = torch.eye(trials).unsqueeze(1)
    audit = OneRun(TensorDataset(torch.zeros(4, 1, trials)), [(row,) for row in directions], seed=seed)
    engine = PrivacyEngine(accountant="pld", seed=seed)
    model, optimizer, loader = private(
        engine, Sum(trials), audit.dataset, 4, 1.0, sample_rate=1.0, expected_batch_size=4.0
    )
    with Releases(optimizer) as releases:
        train(model, optimizer, loader)
    score = gradient_score(releases, model, lambda module, record: module(record[0][None]).sum())
    return audit.result(engine, score, delta=DELTA, confidence=CONFIDENCE)


def one_run_by_loss(seed: int, trials: int = 300) -> AuditResult:
    """Mislabelled records in the data of a small classifier, scored by the loss of the trained model."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(200, 8, generator=generator), torch.randint(2, (200,), generator=generator)
    fresh = torch.randn(trials, 8, generator=generator)
    canaries = mislabelled([(row, torch.tensor(0)) for row in fresh], classes=2)
    audit = OneRun(TensorDataset(x, y), canaries, seed=seed)
    engine = PrivacyEngine(accountant="pld", seed=seed)
    torch.manual_seed(seed)
    model, optimizer, loader = private(engine, nn.Linear(8, 2), audit.dataset, 20, 1.0, lr=1.0)
    for rows, labels in loader:
        F.cross_entropy(model(rows), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    score = loss_score(model, lambda module, record: F.cross_entropy(module(record[0][None]), record[1][None]))
    return audit.result(engine, score, delta=DELTA, confidence=CONFIDENCE)


@dataclass(frozen=True)
class Attack:
    """An attack, the part of the training it looks at, and how many trials its long form has."""

    run: Callable[[int, int], AuditResult]
    short: int
    long: int


ATTACKS = {
    "gradient canaries": Attack(noise, 60, 400),
    "gradient canaries after a resume": Attack(resumed_noise, 60, 400),
    "blank record": Attack(blank_record, 80, 300),
    "long record": Attack(long_record, 160, 400),
    "one pass": Attack(one_pass, 120, 300),
    "one run, every release": Attack(one_run_by_gradients, 1500, 4000),
    "one run, loss of the model": Attack(one_run_by_loss, 300, 1000),
}
