"""Figures carry the right data and labels; no display is needed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ghostgrad.accounting import RDPAccountant
from ghostgrad.accounting.plots import plot_epsilon, plot_profile, plot_trade_off
from ghostgrad.errors import MissingDependencyError

pytest.importorskip("matplotlib")


@pytest.fixture
def accountant() -> RDPAccountant:
    held = RDPAccountant()
    held.step(noise_multiplier=1.0, sample_rate=0.01, steps=500)
    held.step(noise_multiplier=0.8, sample_rate=0.01, steps=500)
    return held


def test_epsilon_grows_to_the_ledger_s_own(accountant: RDPAccountant) -> None:
    (line,) = plot_epsilon(accountant, 1e-5, points=10).get_lines()
    steps, epsilons = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert steps[-1] == 1000
    assert (np.diff(epsilons) > 0).all()
    assert epsilons[-1] == accountant.get_epsilon(1e-5)


def test_curves_are_labelled_with_their_relation(accountant: RDPAccountant) -> None:
    for axes in (plot_profile(accountant), plot_trade_off(accountant)):
        assert "add-or-remove-one" in axes.get_title()


def test_missing_matplotlib_is_said(accountant: RDPAccountant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"ghostgrad\[report\]"):
        plot_profile(accountant)
