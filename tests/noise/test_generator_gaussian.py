"""Noise from the user's own generator."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from ghostgrad.errors import ConfigurationError
from ghostgrad.noise import GeneratorGaussian


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_values_are_those_of_randn() -> None:
    tensor = torch.ones(3, 4, dtype=torch.float64)
    GeneratorGaussian(generator()).add_(tensor, std=2.0, step=0, index=0)
    expected = 1 + 2.0 * torch.randn(3, 4, generator=generator(), dtype=torch.float64)
    assert torch.allclose(tensor, expected)


def test_each_call_draws_anew_with_the_given_std() -> None:
    noise = GeneratorGaussian(generator())
    draws = torch.zeros(2, 50_000)
    for row in draws:
        noise.add_(row, std=0.5, step=0, index=0)
    assert abs(float(torch.corrcoef(draws)[0, 1])) < 0.02
    assert stats.kstest(draws.flatten().numpy(), stats.norm(scale=0.5).cdf).pvalue > 1e-3
    assert stats.kstest(draws.flatten().numpy(), stats.norm(scale=0.525).cdf).pvalue < 1e-6


def test_zero_std_draws_nothing() -> None:
    source = generator()
    before = source.get_state()
    tensor = torch.zeros(5)
    GeneratorGaussian(source).add_(tensor, std=0.0, step=0, index=0)
    assert torch.equal(tensor, torch.zeros(5))
    assert torch.equal(source.get_state(), before)


def test_shares_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="offset=4"):
        GeneratorGaussian(generator()).add_(torch.zeros(5), std=1.0, step=0, index=0, offset=4)


@pytest.mark.parametrize("std", [-0.1, float("nan"), float("inf")])
def test_impossible_std_is_refused(std: float) -> None:
    with pytest.raises(ConfigurationError, match="std="):
        GeneratorGaussian(generator()).add_(torch.zeros(5), std=std, step=0, index=0)


def test_other_sources_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"torch\.Generator"):
        GeneratorGaussian(7)  # type: ignore[arg-type]


def test_many_parameters_at_once_are_drawn_in_their_order() -> None:
    together = [(4, torch.zeros(5)), (0, torch.zeros(2, 2))]
    GeneratorGaussian(torch.Generator().manual_seed(0)).add_all_(together, std=2.0, step=0)
    again = GeneratorGaussian(torch.Generator().manual_seed(0))
    for _, tensor in together:
        alone = torch.zeros_like(tensor)
        again.add_(alone, std=2.0, step=0, index=0)
        assert torch.equal(tensor, alone)
