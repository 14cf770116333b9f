"""Figures of a ledger's privacy (the ``report`` extra: matplotlib)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ghostgrad.accounting.base import Accountant
from ghostgrad.accounting.reading import epsilon_over_releases, privacy_profile, trade_off
from ghostgrad.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes_or_new(axes: Axes | None) -> Any:
    """Those that are given, or the axes of a new figure; raises ``MissingDependencyError`` without matplotlib."""
    if axes is not None:
        return axes
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is not installed, so nothing can be drawn; pip install 'ghostgrad[report]'."
        ) from error
    return Figure(figsize=(5.5, 3.6), layout="constrained").add_subplot()


def plot_epsilon(accountant: Accountant, delta: float, axes: Axes | None = None, points: int = 40) -> Axes:
    """Draw epsilon at ``delta`` over the steps of the ledger, at about ``points`` of them; return the axes.

    >>> from ghostgrad.accounting import RDPAccountant
    >>> accountant = RDPAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=100)
    >>> plot_epsilon(accountant, 1e-5, points=3).get_xlabel()
    'steps'
    """
    drawn, curve = axes_or_new(axes), epsilon_over_releases(accountant, delta, points)
    drawn.plot(curve.x, curve.y)
    drawn.set(xlabel="steps", ylabel=curve.quantity, title=f"{curve.neighbouring}, {curve.accountant}")
    return drawn  # type: ignore[no-any-return]


def plot_profile(accountant: Accountant, axes: Axes | None = None) -> Axes:
    """Draw delta over epsilon; return the axes.

    >>> from ghostgrad.accounting import RDPAccountant
    >>> accountant = RDPAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=100)
    >>> plot_profile(accountant).get_yscale()
    'log'
    """
    curve, drawn = privacy_profile(accountant), axes_or_new(axes)
    drawn.semilogy(curve.x, curve.y)
    drawn.set(xlabel="epsilon", ylabel="delta", title=f"{curve.neighbouring}, {curve.accountant}")
    return drawn  # type: ignore[no-any-return]


def plot_trade_off(accountant: Accountant, axes: Axes | None = None) -> Axes:
    """Draw the attacker's least miss rate over the false positive rate, and guessing; return the axes.

    >>> from ghostgrad.accounting import RDPAccountant
    >>> accountant = RDPAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=100)
    >>> plot_trade_off(accountant).get_xlabel()
    'false positive rate'
    """
    curve, drawn = trade_off(accountant), axes_or_new(axes)
    drawn.plot(curve.x, curve.y, label="best attack")
    drawn.plot([0.0, 1.0], [1.0, 0.0], linestyle="--", color="grey", label="guessing")
    drawn.legend()
    drawn.set(xlabel="false positive rate", ylabel="miss rate", title=f"{curve.neighbouring}, {curve.accountant}")
    return drawn  # type: ignore[no-any-return]
