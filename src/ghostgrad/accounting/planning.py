"""Planning before training: one table of what a run will cost, and what else could be had for it."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from ghostgrad.accounting._attacks import true_positive_bound
from ghostgrad.accounting._checks import check_count, check_delta, check_noise, check_positive
from ghostgrad.accounting.base import Accountant, AccountingWarning, create_accountant
from ghostgrad.accounting.calibration import smallest_noise, total_steps
from ghostgrad.accounting.pld import PLDAccountant
from ghostgrad.accounting.reading import membership_advantage
from ghostgrad.errors import ConfigurationError

ACCOUNTANTS = ("pld", "rdp", "gdp")
_MESH_POINTS = 1 << 15
_LABELS = {"pld": "pld (bound, tight)", "rdp": "rdp (bound)", "gdp": "gdp (approximation, can be too low)"}


@dataclass(frozen=True)
class Row:
    """One what-if: a setting and what it comes to."""

    change: str
    batch_size: int
    steps: int
    noise_multiplier: float
    epsilon: float


@dataclass(frozen=True)
class Plan:
    """What a run costs. ``signal_to_noise`` maps a batch size to batch size / noise multiplier at the same epsilon.

    The noise on the mean gradient has standard deviation ``max_grad_norm * noise_multiplier / batch_size`` per
    coordinate, so this ratio is what training feels; larger is better.
    """

    dataset_size: int
    batch_size: int
    sample_rate: float
    steps: int
    delta: float
    noise_multiplier: float
    accountant: str
    neighbouring: str
    epsilons: dict[str, float]
    membership_advantage: float
    tpr_at_fpr_0_01: float
    signal_to_noise: dict[int, float]
    what_if: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; an infinite epsilon is the string ``"inf"``."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _accountant(name: str) -> Accountant:
    """A fresh accountant; the privacy loss on a mesh that answers in a tenth of a second, and is above finer ones."""
    return PLDAccountant(mesh_points=_MESH_POINTS) if name in ("pld", "prv") else create_accountant(name)


def epsilon_of(accountant: str, sigma: float, rate: float, steps: int, delta: float) -> float:
    """Return epsilon of ``steps`` Poisson-sampled Gaussian steps, without warnings.

    >>> round(epsilon_of("pld", 1.0, 0.01, 1000, 1e-5), 3)
    1.828
    """
    held = _accountant(accountant)
    held.step(noise_multiplier=sigma, sample_rate=rate, steps=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccountingWarning)
        return held.get_epsilon(delta)


def make_plan(
    *,
    dataset_size: int,
    batch_size: int,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    accountant: str = "pld",
) -> Plan:
    """Return the plan of a run: the noise for ``epsilon``, or the epsilon of ``noise_multiplier``.

    Guarantee: add or remove one record, Poisson sampling at ``batch_size / dataset_size``.

    Raises:
        ConfigurationError: Not exactly one of ``epsilon`` and ``noise_multiplier``, of ``epochs`` and ``steps``; the
            batch is larger than the dataset; anything out of range.

    >>> plan = make_plan(dataset_size=60000, batch_size=600, epochs=10, epsilon=3.0, delta=1e-5)
    >>> plan.steps, plan.epsilons["pld"] <= 3.0
    (1000, True)
    """
    size, batch = check_count(dataset_size, "dataset_size"), check_count(batch_size, "batch_size")
    if not 1 <= batch <= size:
        raise ConfigurationError(f"batch_size={batch} is not between 1 and dataset_size={size}; pass an expected size.")
    if (epsilon is None) == (noise_multiplier is None):
        raise ConfigurationError(
            f"epsilon={epsilon}, noise_multiplier={noise_multiplier}: pass exactly one of the two."
        )
    delta, rate = check_delta(delta), batch / size
    count = total_steps(steps, epochs, rate)
    if noise_multiplier is None:
        sigma = _noise(check_positive(epsilon, "epsilon"), delta, rate, count, accountant)
    else:
        sigma = check_noise(noise_multiplier)
    held = _accountant("pld")
    held.step(noise_multiplier=sigma, sample_rate=rate, steps=count)
    epsilons = {name: epsilon_of(name, sigma, rate, count, delta) for name in ACCOUNTANTS}
    if accountant not in epsilons:
        epsilons[accountant] = epsilon_of(accountant, sigma, rate, count, delta)
    return Plan(
        dataset_size=size,
        batch_size=batch,
        sample_rate=rate,
        steps=count,
        delta=delta,
        noise_multiplier=sigma,
        accountant=accountant,
        neighbouring=held.neighbouring,
        epsilons=epsilons,
        membership_advantage=membership_advantage(held).value,
        tpr_at_fpr_0_01=true_positive_bound(held, 0.01, precision=1e-2),
        signal_to_noise=_signal_to_noise(epsilon, size, batch, delta, epochs, count),
        what_if=_what_if(sigma, epsilon, size, batch, count, delta),
    )


def _noise(epsilon: float, delta: float, rate: float, steps: int, accountant: str) -> float:
    what = f"epsilon={epsilon} at delta={delta}"
    return smallest_noise(lambda sigma: epsilon_of(accountant, sigma, rate, steps, delta), epsilon, what, closest=1e-5)


def _signal_to_noise(
    epsilon: float | None, size: int, batch: int, delta: float, epochs: float | None, steps: int
) -> dict[int, float]:
    """Batch size over the noise that the same epsilon needs there; epochs are kept (or steps, if those were given)."""
    if epsilon is None:
        return {}
    found = {}
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        other = round(batch * factor)
        if 1 <= other <= size:
            count = steps if epochs is None else total_steps(None, epochs, other / size)
            found[other] = other / _noise(epsilon, delta, other / size, count, "rdp")
    return found


def _what_if(sigma: float, epsilon: float | None, size: int, batch: int, steps: int, delta: float) -> tuple[Row, ...]:
    rate = batch / size
    settings = [
        ("half the steps", batch, max(1, steps // 2), sigma),
        ("twice the steps", batch, 2 * steps, sigma),
        ("half the batch", max(1, batch // 2), steps, sigma),
        ("noise + 10 %", batch, steps, 1.1 * sigma),
        ("noise - 10 %", batch, steps, 0.9 * sigma),
    ]
    rows = [Row(name, b, n, s, epsilon_of("pld", s, b / size, n, delta)) for name, b, n, s in settings]
    if epsilon is not None:
        rows += [
            Row(name, batch, steps, _noise(target, delta, rate, steps, "rdp"), target)
            for name, target in (("half of epsilon (rdp)", epsilon / 2.0), ("twice epsilon (rdp)", 2.0 * epsilon))
        ]
    return tuple(rows)


def _lines(plan: Plan) -> list[str]:
    lines = [
        f"dataset {plan.dataset_size:,} records, expected batch {plan.batch_size:,} (sample rate {plan.sample_rate:.6g}), "
        f"{plan.steps:,} steps",
        f"neighbouring: {plan.neighbouring}; Poisson sampling; delta {plan.delta:g}",
        "",
        f"noise multiplier  {plan.noise_multiplier:.6g}",
        *(f"epsilon  {value:<10.5g}  {_LABELS.get(name, name)}" for name, value in plan.epsilons.items()),
        f"any membership attack: true minus false positives <= {plan.membership_advantage:.4g}, "
        f"true positives at 1 % false <= {plan.tpr_at_fpr_0_01:.4g}",
    ]
    if plan.signal_to_noise:
        best = max(plan.signal_to_noise.values())
        lines += ["", "batch size  batch / noise multiplier (at this epsilon, by rdp; more is better)"]
        lines += [
            f"{batch:>10,}  {value:>9.5g}  {'#' * max(1, round(40 * value / best))}"
            for batch, value in plan.signal_to_noise.items()
        ]
    lines += ["", f"{'what if':<24}{'batch':>12}{'steps':>16}{'noise':>10}{'epsilon':>10}"]
    lines += [
        f"{row.change:<24}{row.batch_size:>12,}{row.steps:>16,}{row.noise_multiplier:>10.4g}{row.epsilon:>10.4g}"
        for row in plan.what_if
    ]
    return lines
