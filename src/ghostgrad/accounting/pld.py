"""Privacy loss distributions: tight upper and lower bounds, both directions, never below the truth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import ClassVar, Literal

from ghostgrad.accounting._checks import check_count, check_delta, check_epsilon
from ghostgrad.accounting._convolution import Convolution
from ghostgrad.accounting._pilots import LARGEST
from ghostgrad.accounting._solvers import Releases, closed_form, contour, convolution, exact_pairs, sort_releases
from ghostgrad.accounting.base import AccountingWarning, Bounds, DeltaBounds, EitherNeighbour
from ghostgrad.accounting.rdp import RDPAccountant, finite_share, readable_others

Answer = tuple[float, float, str]

_SMALL = 1e-4
"""An epsilon at which the Renyi bound may well be 0, which saves looking closer."""

_LEAST_DELTA = 1e-300
"""Below, floats have fewer digits; only the Renyi bound, which works with logarithms, keeps them."""


class PLDAccountant(EitherNeighbour):
    """Epsilon from the distribution of the privacy loss.

    Plain Gaussians and single steps have closed forms (Balle and Wang 2018; Zhu, Dong and Wang 2022). Many sampled
    steps are read by contour inversion of the moment generating function, to about 1e-8. Everything else is convolved on
    a mesh by connect-the-dots (Doroshenko et al. 2022), which is an upper bound, with exponential tilting. Where none of
    these applies (a sampled sigma below 0.05, `BestOf`) the Renyi bound answers; it also caps every answer.

    Guarantee: upper bound for adding and for removing one record, or for replacing one (``neighbouring``).

    Args:
        neighbouring: ``"add-or-remove-one"`` (default) or ``"replace-one"``.
        tolerance: Relative excess of epsilon that the mesh is chosen for, in (0, 1); default 1e-4.
        mesh_points: The most points of a mesh, at least 1024; default 2^21, 200 MB. Fewer are faster and looser.

    Raises:
        ConfigurationError: An argument is none of these.

    >>> accountant = PLDAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    >>> round(accountant.get_epsilon(1e-5), 4)
    1.8282
    """

    mechanism: ClassVar[str] = "pld"

    def __init__(
        self,
        neighbouring: Literal["add-or-remove-one", "replace-one"] = "add-or-remove-one",
        tolerance: float = 1e-4,
        mesh_points: int = LARGEST,
    ) -> None:
        super().__init__(neighbouring)
        self._tolerance = max(check_delta(tolerance, "tolerance"), 1e-7)
        self._largest = max(1024, check_count(mesh_points, "mesh_points"))
        self._renyi = RDPAccountant(neighbouring)

    def _read(self) -> tuple[Releases, float]:
        """The releases and the mass at infinite loss; the Renyi accountant gets the same ledger."""
        others, infinite = readable_others(self.ledger, self.replace)
        self._renyi.ledger = self.ledger
        return sort_releases(self.ledger.sampled_gaussians(), others, self.replace), infinite

    def get_epsilon(self, delta: float) -> float:
        """Return the upper bound of epsilon at ``delta``.

        Warns:
            AccountingWarning: The mesh, at the limit of memory, may cost more than 10 % of epsilon; or the Renyi bound
                answered and its best order is an end of the orders.
        """
        return self._bounds(check_delta(delta), False).upper

    def get_bounds(self, delta: float) -> Bounds:
        """Return lower and upper bounds of epsilon at ``delta``, and the method that found the upper one."""
        return self._bounds(check_delta(delta), True)

    def _bounds(self, delta: float, with_lower: bool) -> Bounds:
        releases, infinite = self._read()
        if releases.empty and delta >= infinite:
            return Bounds(0.0, 0.0, delta, self.neighbouring, "closed form")
        if releases.noiseless or delta < infinite:
            return Bounds(math.inf, math.inf, delta, self.neighbouring, "no noise")
        inner = finite_share(delta, infinite)
        lower, upper, method = (
            self._solve(releases, inner, delta, with_lower) if inner > 0.0 else (0.0, math.inf, "none")
        )
        if method not in ("closed form", "contour inversion") or math.isinf(upper):
            bound, said = self._renyi_bound(delta)
            if bound < upper or math.isinf(upper):
                upper, method = bound, "rdp"
                for warning in said:
                    warnings.warn(warning, stacklevel=4)
        return Bounds(min(lower, upper), upper, delta, self.neighbouring, method)

    def _renyi_bound(self, delta: float) -> tuple[float, list[Warning | str]]:
        """The Renyi epsilon and what it warns of, to be said only where it is the answer."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", AccountingWarning)
            return self._renyi.get_epsilon(delta), [warning.message for warning in said]

    def _solve(self, releases: Releases, delta: float, whole: float, with_lower: bool) -> Answer:
        """Lower and upper bounds of epsilon; 0 and infinity where only the Renyi bound can answer."""
        exact = closed_form(releases) if delta >= _LEAST_DELTA else None
        if exact is not None:
            return (*exact.epsilon(delta), exact.name)
        line = contour(releases, delta)
        answer = line.epsilon(delta) if line is not None else None
        if line is not None and answer is not None:
            lower, upper = answer
            if with_lower and not exact_pairs(releases):
                other = contour(releases, delta, rounding_up=False)
                below = other.epsilon(delta) if other is not None else None
                lower = below[0] if below is not None else 0.0
            cap = self._renyi_bound(whole)[0] if upper < _SMALL else math.inf
            upper = _confirmed(lambda epsilon: self._solve_delta(releases, epsilon)[1], upper, delta, cap)
            return lower, upper, line.name
        mesh = convolution(releases, self._tolerance, delta, self._largest)
        if mesh is None:
            return 0.0, math.inf, "none"
        lower, upper, excess = mesh.epsilon(delta, with_lower)
        cap = self._renyi_bound(whole)[0]
        upper = _confirmed(lambda epsilon: mesh.delta(epsilon)[1], upper, delta * (1.0 - 1e-6), cap)
        if excess > 0.1 * upper > 0.0:
            _warn_coarse(upper, excess)
        return lower, upper, mesh.name

    def get_delta(self, epsilon: float) -> float:
        """Return the upper bound of delta at ``epsilon``."""
        return self.get_delta_bounds(epsilon).upper

    def get_delta_bounds(self, epsilon: float) -> DeltaBounds:
        """Return lower and upper bounds of delta at ``epsilon``, and the method that found the upper one."""
        epsilon = check_epsilon(epsilon)
        releases, infinite = self._read()
        if releases.noiseless:
            return DeltaBounds(1.0, 1.0, epsilon, self.neighbouring, "no noise")
        lower, upper, method = (0.0, 0.0, "closed form") if releases.empty else self._solve_delta(releases, epsilon)
        lower, upper = (min(1.0, infinite + (1.0 - infinite) * value) for value in (lower, upper))
        bound = self._renyi.get_delta(epsilon)
        if bound < upper or (bound == upper and method == "none"):
            upper, method = bound, "rdp"
        return DeltaBounds(min(lower, upper), upper, epsilon, self.neighbouring, method)

    def _solve_delta(self, releases: Releases, epsilon: float) -> Answer:
        exact = closed_form(releases)
        if exact is not None:
            return (*exact.delta(epsilon), exact.name)
        epsilon = min(epsilon, 1e6)  # delta only falls; products further out leave the range of floats
        line = contour(releases)
        answer = line.delta(epsilon) if line is not None else None
        if line is not None and answer is not None:
            lower = answer[0] if exact_pairs(releases) else 0.0
            return lower, answer[1], line.name
        mesh: Convolution | None = convolution(releases, self._tolerance, largest=self._largest)
        return (*mesh.delta(epsilon), mesh.name) if mesh is not None else (0.0, 1.0, "none")


class PRVAccountant(PLDAccountant):
    """`PLDAccountant` under the name that Opacus has for its own.

    >>> PRVAccountant().mechanism
    'prv'
    """

    mechanism: ClassVar[str] = "prv"


def _confirmed(delta_of: Callable[[float], float], upper: float, delta: float, cap: float = math.inf) -> float:
    """The least epsilon from ``upper`` on at which reading delta confirms it: the two ways must not contradict.

    Infinite from ``cap`` on, where another bound is better anyhow.
    """
    failed, step, size = 0.0, 0.0, max(upper, 1e-6)
    while upper + step * size < cap and step < 10.0:
        if delta_of(upper + step * size) <= delta:
            break
        failed, step = step, 4.0 * max(step, 2.5e-6)
    else:
        return math.inf
    while step > 1.3 * failed > 0.01:  # closer only where much is at stake
        middle = math.sqrt(step * failed)
        failed, step = (middle, step) if delta_of(upper + middle * size) > delta else (failed, middle)
    return upper + step * size


def _warn_coarse(epsilon: float, excess: float) -> None:
    warnings.warn(
        f"epsilon={epsilon:.4g} may be {excess:.2g} above the truth (mesh at the limit of memory): it holds, but is loose; "
        'compare accountant="rdp".',
        AccountingWarning,
        stacklevel=5,
    )
