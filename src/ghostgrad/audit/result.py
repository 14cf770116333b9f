"""What an audit found: an epsilon that is exceeded, the epsilon that is claimed, and what neither says."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ghostgrad.accounting import Accountant
from ghostgrad.accounting._checks import check_delta
from ghostgrad.accounting._closed_forms import gaussian_epsilon
from ghostgrad.accounting.plots import axes_or_new
from ghostgrad.audit.bounds import check_confidence
from ghostgrad.audit.evidence import Evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DELTAS = (1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, *(round(0.05 * i, 2) for i in range(1, 20)))
"""Where a claim is held against the evidence, beside the delta asked for. One event of small probability covers all; with few
trials much is shown at a large delta only (at epsilon 0, delta is the advantage over guessing)."""

_ALWAYS_OPEN = (
    "A consistent verdict does not prove the claim: another attack, or more canaries, may find more.",
    "What was computed on the private data outside the audited training (tuning, metrics) is not audited.",
)


@dataclass(frozen=True)
class Claim:
    """The guarantee that is doubted: epsilon at every delta, and its words.

    >>> Claim.of_gaussian(1.0).epsilon(0.1) < Claim.of_gaussian(0.5).epsilon(0.1)
    True
    """

    text: str
    epsilon: Callable[[float], float]

    @classmethod
    def of_accountant(cls, accountant: Accountant) -> Claim:
        """All that an accountant has noted."""
        text = f"{len(accountant)} releases by {accountant.mechanism}, {accountant.neighbouring}"
        return cls(text, accountant.get_epsilon)

    @classmethod
    def weakest(cls, claims: Sequence[Claim]) -> Claim:
        """What holds for each of several trainings: the largest epsilon at every delta."""
        text = claims[0].text if len(claims) == 1 else f"{claims[0].text}; the weakest of {len(claims)} ledgers"
        return cls(text, lambda delta: max(claim.epsilon(delta) for claim in claims))

    @classmethod
    def of_gaussian(cls, noise_multiplier: float) -> Claim:
        """One release of the Gaussian mechanism, unsampled."""
        if noise_multiplier == 0.0:
            return cls("one release without noise", lambda delta: math.inf)
        text = f"one release at noise multiplier {noise_multiplier:g}, add-or-remove-one"
        return cls(text, lambda delta: gaussian_epsilon(1.0 / noise_multiplier, delta))


@dataclass(frozen=True)
class Comparison:
    """The epsilon that the evidence exceeds, and the epsilon that is claimed, at one delta."""

    delta: float
    lower: float
    claimed: float

    @property
    def contradicts(self) -> bool:
        """Whether more is shown than is claimed, beyond rounding."""
        return self.lower > self.claimed + 1e-9 * max(1.0, self.claimed)


@dataclass(frozen=True)
class AuditResult:
    """An audit's finding; ``str()`` is a text.

    Attributes:
        attack: what was done.
        delta: the delta that was asked for.
        confidence: if the claim is true, the verdict is "contradicted" with probability at most ``1 - confidence``.
        epsilon_lower: the epsilon that is exceeded at ``delta``, with that confidence; 0 shows nothing.
        epsilon_claimed: what the accountant says at ``delta``.
        claim: what is claimed.
        verdict: ``"contradicted"`` if at some delta more is shown than is claimed there, else ``"consistent"``.
        witness: the comparison that contradicts most; the one at ``delta`` where none does.
        evidence: the counts that show most, and which of ``looks`` they are.
        looks: counts that were looked at; each pays its share of ``1 - confidence`` (Bonferroni).
        canaries, runs: coins tossed in a run, and runs.
        curve: the comparison at every delta.
        assumes: what must hold for the confidence, beside fair coins.
        does_not_show: what the verdict leaves open.
        may_be_published: what the result itself tells of private records.
    """

    attack: str
    delta: float
    confidence: float
    epsilon_lower: float
    epsilon_claimed: float
    claim: str
    verdict: Literal["consistent", "contradicted"]
    witness: Comparison
    evidence: Evidence
    where: str
    looks: int
    canaries: int
    runs: int
    curve: tuple[Comparison, ...]
    assumes: str
    does_not_show: tuple[str, ...]
    may_be_published: str

    @property
    def contradicted(self) -> bool:
        """Whether the claim is contradicted."""
        return self.verdict == "contradicted"

    def to_json(self) -> str:
        """All fields as JSON; an infinite epsilon is ``null``."""
        plain = {**asdict(self), "bound": self.evidence.bound}
        return json.dumps(_finite(plain), indent=2)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the epsilon shown and the epsilon claimed over delta; return the axes. Needs the extra ``report``."""
        drawn = axes_or_new(axes)
        deltas = [point.delta for point in self.curve]
        claimed = [point.claimed if math.isfinite(point.claimed) else math.nan for point in self.curve]
        drawn.semilogx(deltas, claimed, label="claimed: at most")
        drawn.semilogx(deltas, [point.lower for point in self.curve], label=f"shown: more than ({self.confidence:.4g})")
        if self.contradicted:
            drawn.plot([self.witness.delta], [self.witness.lower], "x", color="black", label="contradiction")
        drawn.set(xlabel="delta", ylabel="epsilon", title=self.verdict, ylim=(0, None))
        drawn.legend()
        return drawn  # type: ignore[no-any-return]

    def __str__(self) -> str:
        at = self.witness
        head = (
            f"{self.verdict}: at delta {at.delta:g} epsilon is above {at.lower:.4g}, and at most {at.claimed:.4g} is claimed"
            if self.contradicted
            else f"{self.verdict}: epsilon at delta {self.delta:g} is above {self.epsilon_lower:.4g}; "
            f"{self.epsilon_claimed:.4g} is claimed"
        )
        rows = [
            f"attack: {self.attack}; {self.canaries} canaries, {self.runs} run(s)",
            f"found: {self.evidence}{f' ({self.where})' if self.where else ''}",
            f"bound: {self.evidence.bound}; confidence {self.confidence:.4g} over {self.looks} looks",
            f"claim: {self.claim}",
            f"assumes: {self.assumes}",
            *(f"not shown: {text}" for text in self.does_not_show),
            f"publishing: {self.may_be_published}",
        ]
        return "\n".join(
            [head, *(textwrap.fill(row, 110, initial_indent="  ", subsequent_indent="    ") for row in rows)]
        )


def judge(
    looks: Mapping[str, Callable[[float], Evidence]],
    claim: Claim,
    *,
    attack: str,
    delta: float,
    confidence: float,
    canaries: int,
    runs: int,
    assumes: str,
    does_not_show: Sequence[str],
    may_be_published: str,
) -> AuditResult:
    """Hold each look's counts against the claim at every delta; each look is given its share of the error probability.

    Args:
        looks: by name, what counts the look has when it may be wrong with a given probability. All were decided on before
            the scores were seen.
        claim: what is doubted.
    """
    delta, level = check_delta(delta), (1.0 - check_confidence(confidence)) / len(looks)
    deltas = sorted({*_DELTAS, delta})
    claimed = {at: claim.epsilon(at) for at in deltas}
    found = {name: count(level) for name, count in looks.items()}
    curves = {
        name: tuple(Comparison(at, evidence.epsilon_lower(at, level), claimed[at]) for at in deltas)
        for name, evidence in found.items()
    }
    strongest = {name: max(curve, key=lambda point: point.lower - point.claimed) for name, curve in curves.items()}
    asked = {name: curve[deltas.index(delta)] for name, curve in curves.items()}
    worst = max(strongest, key=lambda name: strongest[name].lower - strongest[name].claimed)
    contradicted = strongest[worst].contradicts
    shown = worst if contradicted else max(asked, key=lambda name: asked[name].lower)
    return AuditResult(
        attack=attack,
        delta=delta,
        confidence=confidence,
        epsilon_lower=max(point.lower for point in asked.values()),
        epsilon_claimed=claimed[delta],
        claim=claim.text,
        verdict="contradicted" if contradicted else "consistent",
        witness=strongest[worst] if contradicted else asked[shown],
        evidence=found[shown],
        where=shown,
        looks=len(looks),
        canaries=canaries,
        runs=runs,
        curve=curves[shown],
        assumes=assumes,
        does_not_show=(*does_not_show, *_ALWAYS_OPEN),
        may_be_published=may_be_published,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
