"""One seed gives one training, bit for bit, in every clipper; the noise has the law that is accounted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, PrivacyEngine
from ghostgrad.accounting import RDPAccountant

MODES = ["hooks", "ghost", "bk", "functorch"]


def training(
    mode: str, seed: int | None, *, noise: float = 1.0, secure: bool = False, limit: int | None = None
) -> torch.Tensor:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 1, 6, 6), torch.randint(3, (32,)))
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    engine = PrivacyEngine(seed=seed, secure_mode=secure)
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.5), grad_sample_mode=mode,
        data_loader=DataLoader(data, batch_size=8), noise_multiplier=noise, max_grad_norm=0.5,
    )  # fmt: skip

    def epoch(batches: Any) -> None:
        for x, y in batches:
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        if limit is None:
            epoch(loader)
        else:
            with BatchMemoryManager(data_loader=loader, max_physical_batch_size=limit, optimizer=optimizer) as pieces:
                epoch(pieces)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_repeats_the_training_bit_for_bit(mode: str) -> None:
    assert torch.equal(training(mode, 7), training(mode, 7))
    assert not torch.equal(training(mode, 7), training(mode, 8))


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_all_clippers_train_the_same_model(noise: float) -> None:
    reference = training("hooks", 7, noise=noise)
    for mode in MODES:
        for limit in (None, 3):
            other = training(mode, 7, noise=noise, limit=limit)
            assert (other - reference).norm() <= 1e-4 * reference.norm()


def test_without_a_seed_no_two_trainings_are_alike() -> None:
    assert not torch.equal(training("bk", None), training("bk", None))


def test_secure_mode_trains() -> None:
    assert not torch.equal(training("bk", None, secure=True), training("bk", None, secure=True))


def test_two_models_of_one_engine_do_not_share_their_noise() -> None:
    torch.manual_seed(0)
    engine = PrivacyEngine(seed=0)
    gradients = []
    for _ in range(2):
        module = nn.Linear(4, 3)
        _, optimizer, _ = engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.0), data_loader=None, sample_rate=0.1,
            expected_batch_size=1.0, noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip
        optimizer.step()
        gradients.append(module.weight.grad.clone())
        engine.detach()
    assert not torch.equal(*gradients)
    assert engine.steps == len(engine.accountant) == 2


def noise_of_steps(sigma: float, bound: float, steps: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """The noise that steps release for two parameters, [steps, values], in units of sigma * C."""
    module = nn.Linear(40, 10)
    _, optimizer, _ = PrivacyEngine(seed=11).make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.0), data_loader=None, sample_rate=0.1,
        expected_batch_size=4.0, noise_multiplier=sigma, max_grad_norm=bound, noise_generator=generator,
    )  # fmt: skip
    drawn = []
    for _ in range(steps):
        optimizer.step()
        drawn.append(torch.cat([p.grad.flatten() for p in module.parameters()]).double() * 4.0)
        optimizer.zero_grad()
    return torch.stack(drawn) / (sigma * bound)


def variance_is_one(sample: torch.Tensor, significance: float = 1e-4) -> bool:
    """Chi-square test of a known mean of 0 and variance of 1."""
    total = sample.square().sum().item()
    tail = stats.chi2(sample.numel())
    return significance / 2 < tail.cdf(total) < 1 - significance / 2


@pytest.mark.parametrize("generator", [None, 5])
def test_the_released_noise_has_standard_deviation_sigma_times_c(generator: int | None) -> None:
    source = None if generator is None else torch.Generator().manual_seed(generator)
    drawn = noise_of_steps(1.3, 0.7, 40, source)
    n = drawn.numel()
    assert variance_is_one(drawn)
    assert not variance_is_one(drawn * 1.05)  # the test tells sigma that is off by 5 %
    assert not variance_is_one(drawn * 0.95)
    assert abs(drawn.mean().item()) < 4 / math.sqrt(n)
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-4
    weight, bias = drawn[:, :400], drawn[:, 400:]
    assert variance_is_one(weight)
    assert variance_is_one(bias)


def test_the_noise_is_independent_between_steps_and_parameters() -> None:
    drawn = noise_of_steps(1.0, 1.0, 60)
    steps = torch.corrcoef(drawn)
    values = torch.corrcoef(drawn[:, ::10].T)
    for matrix, samples in ((steps, drawn.shape[1]), (values, drawn.shape[0])):
        off = matrix - torch.diag(matrix.diag())
        pairs = len(matrix) * (len(matrix) - 1) / 2
        assert off.abs().max() < stats.norm.isf(1e-4 / pairs / 2) / math.sqrt(samples) * 1.3


def test_epsilon_is_that_of_the_reference_library() -> None:
    accountants = pytest.importorskip("dp_accounting")
    rdp = pytest.importorskip("dp_accounting.rdp")
    torch.manual_seed(0)
    engine = PrivacyEngine(seed=0)
    module = nn.Linear(2, 2)
    _, optimizer, _ = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.0), noise_multiplier=1.1, max_grad_norm=1.0,
        data_loader=DataLoader(TensorDataset(torch.randn(500, 2)), batch_size=25),
    )  # fmt: skip
    for _ in range(60):
        optimizer.step()
        optimizer.zero_grad()
    reference = rdp.RdpAccountant()
    event = accountants.PoissonSampledDpEvent(0.05, accountants.GaussianDpEvent(1.1))
    reference.compose(event, 60)
    assert engine.get_epsilon(1e-5) == pytest.approx(reference.get_epsilon(1e-5), rel=1e-3)


def test_a_target_is_calibrated_under_the_options_of_the_accountant() -> None:
    """Replacing a record costs more than removing one, so the same target takes more noise."""
    found = []
    for neighbouring in ("add-or-remove-one", "replace-one"):
        module = nn.Linear(4, 2)
        accountant = RDPAccountant(neighbouring=neighbouring)
        engine = PrivacyEngine(accountant=accountant, seed=0)
        _, optimizer, _ = engine.make_private_with_epsilon(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=None, sample_rate=0.1,
            expected_batch_size=4.0, target_epsilon=3.0, target_delta=1e-5, total_steps=20, max_grad_norm=1.0,
        )  # fmt: skip
        assert len(accountant) == 0
        for _ in range(20):
            optimizer.step()
            optimizer.zero_grad()
        assert 2.9 < engine.get_epsilon(1e-5) <= 3.0
        found.append(optimizer.noise_multiplier)
    assert found[1] > 1.2 * found[0]
