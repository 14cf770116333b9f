"""Privacy loss distributions: tight upper and lower bounds, both directions, never below the truth."""

from __future__ import annotations

import math
import warnings
from typing import ClassVar, Literal

from ghostgrad.accounting._checks import check_delta, check_epsilon
from ghostgrad.accounting._solvers import (
    SMALLEST_SIGMA,
    Releases,
    closed_form,
    contour,
    convolution,
    exact_pairs,
    sort_releases,
)
from ghostgrad.accounting.base import Accountant, AccountingWarning, Bounds
from ghostgrad.accounting.rdp import RDPAccountant, readable_others
from ghostgrad.errors import ConfigurationError, choose

_DEEP = 1e-20
"""Below such a delta a composition is read twice, from epsilon and from delta."""


class PLDAccountant(Accountant):
    """Epsilon from the distribution of the privacy loss.

    Plain Gaussians and single steps have closed forms (Balle and Wang 2018; Zhu, Dong and Wang 2022). Many sampled
    steps are read by contour inversion of the moment generating function, to about 1e-8. Everything else is convolved on
    a mesh by connect-the-dots (Doroshenko et al. 2022), which is an upper bound, with exponential tilting. Where none of
    these applies (a sampled sigma below 0.05, `BestOf`) the Renyi bound answers; it also caps every answer.

    Guarantee: upper bound for adding and for removing one record, or for replacing one (``neighbouring``).

    Args:
        neighbouring: ``"add-or-remove-one"`` (default) or ``"replace-one"``.
        tolerance: Relative excess of epsilon that the mesh is chosen for; default 1e-4.

    >>> accountant = PLDAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    >>> round(accountant.get_epsilon(1e-5), 4)
    1.8282
    """

    mechanism: ClassVar[str] = "pld"

    def __init__(
        self, neighbouring: Literal["add-or-remove-one", "replace-one"] = "add-or-remove-one", tolerance: float = 1e-4
    ) -> None:
        super().__init__()
        self._replace = choose("neighbouring", neighbouring, ["add-or-remove-one", "replace-one"]) == "replace-one"
        self._tolerance = tolerance
        self._renyi = RDPAccountant()

    @property
    def neighbouring(self) -> str:
        """The relation the answers hold for."""
        return "replace-one" if self._replace else super().neighbouring

    def _read(self) -> tuple[Releases, float, RDPAccountant | None]:
        """The releases, the mass at infinite loss, and a Renyi accountant of the same relation if there is one."""
        others, infinite = readable_others(self.ledger, self._replace)
        releases = sort_releases(self.ledger.sampled_gaussians(), others, self._replace)
        self._renyi.ledger = self.ledger
        return releases, infinite, self._renyi if super().neighbouring == self.neighbouring else None

    def get_epsilon(self, delta: float) -> float:
        """Return the upper bound of epsilon at ``delta``.

        Warns:
            AccountingWarning: The mesh, at the limit of memory, may cost more than 10 % of epsilon.
        """
        return self._bounds(check_delta(delta), False).upper

    def get_bounds(self, delta: float) -> Bounds:
        """Return lower and upper bounds of epsilon at ``delta``, and the method that found them."""
        return self._bounds(check_delta(delta), True)

    def _bounds(self, delta: float, with_lower: bool) -> Bounds:
        releases, infinite, renyi = self._read()
        if releases.noiseless or delta <= infinite:
            return Bounds(math.inf, math.inf, delta, self.neighbouring, "no noise")
        if releases.empty:
            return Bounds(0.0, 0.0, delta, self.neighbouring, "closed form")
        inner = (delta - infinite) / (1.0 - infinite)
        found = self._solve(releases, inner, with_lower)
        if found is not None and (found[2] != "convolution" or renyi is None):
            lower, upper, method = found
        else:
            lower, upper, method = found or (0.0, math.inf, "none")
            if found is None and renyi is None:
                raise _no_bound(self.neighbouring)
            bound = self._renyi_epsilon(renyi, delta)
            if bound < upper:
                upper, method = bound, "rdp"
        return Bounds(min(lower, upper), upper, delta, self.neighbouring, method)

    @staticmethod
    def _renyi_epsilon(renyi: RDPAccountant | None, delta: float) -> float:
        if renyi is None:
            return math.inf
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AccountingWarning)
            return renyi.get_epsilon(delta)

    def _solve(self, releases: Releases, delta: float, with_lower: bool) -> tuple[float, float, str] | None:
        exact = closed_form(releases)
        if exact is not None:
            return (*exact.epsilon(delta), exact.name)
        if min((sigma for _, sigma in releases.sampled), default=1.0) < SMALLEST_SIGMA:
            return None
        line = contour(releases)
        answer = line.epsilon(delta) if line is not None else None
        if line is not None and answer is not None:
            lower, upper = answer
            if with_lower and not exact_pairs(releases):
                other = contour(releases, rounding_up=False)
                below = other.epsilon(delta) if other is not None else None
                lower = below[0] if below is not None else 0.0
            return lower, upper, line.name
        mesh = convolution(releases, self._tolerance)
        if mesh is None:
            return None
        lower, upper, excess = mesh.epsilon(delta, with_lower)
        if (releases.others or delta < _DEEP) and mesh.delta(upper)[1] > delta * (1.0 + 1e-3):
            # The two ways to read the composition contradict each other: take neither for a bound.
            return 0.0, math.inf, mesh.name
        if excess > 0.1 * upper > 0.0:
            _warn_coarse(upper, excess)
        return lower, upper, mesh.name

    def get_delta(self, epsilon: float) -> float:
        """Return the upper bound of delta at ``epsilon``."""
        epsilon = check_epsilon(epsilon)
        releases, infinite, renyi = self._read()
        if releases.noiseless:
            return 1.0
        if releases.empty:
            return infinite
        upper = self._solve_delta(releases, epsilon)
        if upper is None and renyi is None:
            raise _no_bound(self.neighbouring)
        total = 1.0 if upper is None else infinite + (1.0 - infinite) * upper
        return min(total, renyi.get_delta(epsilon)) if renyi is not None else total

    def _solve_delta(self, releases: Releases, epsilon: float) -> float | None:
        exact = closed_form(releases)
        if exact is not None:
            return exact.delta(epsilon)[1]
        if min((sigma for _, sigma in releases.sampled), default=1.0) < SMALLEST_SIGMA:
            return None
        line = contour(releases)
        answer = line.delta(epsilon) if line is not None else None
        if answer is not None:
            return answer[1]
        mesh = convolution(releases, self._tolerance)
        return mesh.delta(epsilon)[1] if mesh is not None else None


class PRVAccountant(PLDAccountant):
    """`PLDAccountant` under the name that Opacus has for its own.

    >>> PRVAccountant().mechanism
    'prv'
    """

    mechanism: ClassVar[str] = "prv"


def _no_bound(neighbouring: str) -> ConfigurationError:
    return ConfigurationError(
        f"neighbouring={neighbouring!r} has no bound for this ledger (a sampled sigma below {SMALLEST_SIGMA}, sampled "
        'Laplace noise or BestOf); ask for "add-or-remove-one".'
    )


def _warn_coarse(epsilon: float, excess: float) -> None:
    warnings.warn(
        f"epsilon={epsilon:.4g} may be {excess:.2g} above the truth (mesh at the limit of memory): it holds, but is loose; "
        'compare accountant="rdp".',
        AccountingWarning,
        stacklevel=5,
    )
