"""The exact curves of one Gaussian and one sampled step: their bounds hold to the last digit, at any scale."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ghostgrad.accounting import Gaussian, PLDAccountant
from ghostgrad.accounting._closed_forms import ClosedForm, gaussian_delta, gaussian_form, sampled_delta, sampled_form

mpmath = pytest.importorskip("mpmath")


def _exact(epsilon: Any, mu: Any) -> Any:
    """Balle and Wang (2018), theorem 8, in 60 digits."""
    epsilon, mu = mpmath.mpf(epsilon), mpmath.mpf(mu)
    return mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("standard", [0.0, 1e-8, 0.3, 1.0, 5.0, 12.0, 30.0])
@pytest.mark.parametrize("mu", [1e-14, 1e-9, 1e-5, 9.99e-4, 1.01e-3, 0.3, 1.0, 40.0])
def test_gaussian_delta_has_ten_digits_at_any_mu(mu: float, standard: float) -> None:
    """Mills' ratios at the two ends of a short interval cancelled: 5 of 16 digits at mu = 1e-5, all of them at 1e-15."""
    epsilon = mu * (standard + mu / 2.0)
    with mpmath.workdps(60):
        assert abs(gaussian_delta(epsilon, mu) / _exact(epsilon, mu) - 1) < 5e-11


@pytest.mark.parametrize(("mu", "delta"), [(4.6e-10, 3.8e-14), (1.7e-11, 2.2e-15), (2e-13, 6.8e-17)])
def test_much_noise_has_bounds_on_either_side_of_the_truth(mu: float, delta: float) -> None:
    accountant = PLDAccountant()
    accountant.record(Gaussian(1.0 / mu))
    bounds = accountant.get_bounds(delta)
    with mpmath.workdps(60):
        assert _exact(bounds.upper, mu) <= delta <= _exact(bounds.lower, mu)


@pytest.mark.parametrize("rate", [1e-9, 0.01, 0.7])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 1e4, 1e7])
@pytest.mark.parametrize("epsilon", [1e-10, 1e-3, 0.5, 3.0])
def test_one_sampled_step_has_ten_digits(rate: float, sigma: float, epsilon: float) -> None:
    with mpmath.workdps(60):
        shifted = mpmath.log1p(mpmath.expm1(mpmath.mpf(epsilon)) / rate)
        exact = rate * _exact(shifted, 1 / mpmath.mpf(sigma))
        assert exact < 1e-300 or abs(sampled_delta(epsilon, rate, sigma, remove=True) / exact - 1) < 5e-11


@pytest.mark.parametrize(
    ("form", "delta"),
    [
        (gaussian_form(1.0 / 45.65342207410412), 0.008735565782005324),  # epsilon 5.6e-6: delta hardly falls there
        (gaussian_form(1.0), math.nextafter(gaussian_delta(0.0, 1.0), 0.0)),
        (sampled_form(0.3, 2.0), math.nextafter(sampled_delta(0.0, 0.3, 2.0, True), 0.0)),
        (gaussian_form(1.0), 1e-321),
        (sampled_form(0.1, 1.0), 1e-321),
        (gaussian_form(1.0), 5e-324),  # the smallest float above 0
    ],
)
def test_delta_of_epsilon_is_at_most_delta_to_the_last_digit(form: ClosedForm, delta: float) -> None:
    lower, upper = form.epsilon(delta)
    assert 0.0 <= lower <= upper < math.inf
    assert form.delta(upper)[1] <= delta
