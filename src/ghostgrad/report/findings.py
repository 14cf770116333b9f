"""What voids a guarantee, what it rests on, and how it differs from the usual one: read off the facts of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Finding = dict[str, str]


def find(data: Mapping[str, Any]) -> list[Finding]:
    """All findings, the worst first: ``void``, then ``assumed``, then ``other``."""
    return [*_voids(data), *_assumptions(data), *_differences(data)]


def verdict(findings: list[Finding]) -> str:
    """Whether the guarantee holds: ``no`` with a void, ``unknown`` where it rests on what the user stated, else ``yes``."""
    effects = {finding["effect"] for finding in findings}
    return "no" if "void" in effects else "unknown" if "assumed" in effects else "yes"


def _finding(code: str, effect: str, statement: str) -> Finding:
    return {"code": code, "effect": effect, "statement": statement}


def _voids(data: Mapping[str, Any]) -> Iterator[Finding]:
    trainings, uppers = data["trainings"], [row["upper"] for row in data["epsilon"] if row["bound"]]
    if data["releases"]["least_noise_multiplier"] == 0 or any(t["noise_multiplier"] == 0 for t in trainings):
        yield _finding(
            "no-noise", "void", "Noise multiplier 0: no noise was added, so nothing is private. Epsilon is infinite."
        )
    if uppers and all(upper == "inf" for upper in uppers):
        yield _finding("epsilon-infinite", "void", "Epsilon is infinite at every delta: nothing is guaranteed.")
    if uppers and all(upper == "unknown" for upper in uppers):
        yield _finding(
            "epsilon-unknown",
            "void",
            "No accountant can read this ledger, so epsilon is unknown: nothing is guaranteed.",
        )
    if any(t["noise"]["seeded"] is True for t in trainings) or any(m["seeded"] is True for m in _told(data)):
        yield _finding(
            "seeded",
            "void",
            "A seed determines the noise and the sampling. Whoever knows or guesses the seed can subtract the noise; against "
            "them nothing holds. Train without a seed before you publish.",
        )


def _assumptions(data: Mapping[str, Any]) -> Iterator[Finding]:
    trainings, told = data["trainings"], _told(data)
    if any(t["sampling"]["observed"] == "unknown" for t in trainings) or any(m["sampler"] == "unknown" for m in told):
        yield _finding(
            "user-sampled",
            "assumed",
            "Batches were drawn outside of the library (data_loader=None). Epsilon holds if they were Poisson samples at the "
            "stated rate; what they were is unknown. If they were shuffled, epsilon is too small.",
        )
    if any(t["noise"]["seeded"] == "unknown" for t in trainings) or any(m["seeded"] == "unknown" for m in told):
        yield _finding(
            "noise-generator",
            "assumed",
            "The noise comes from a generator of the user's. Whether its seed or state is secret is unknown; against whoever "
            "knows it nothing holds. It is not a cryptographic generator.",
        )
    if untold := _untold(data):
        yield _finding(
            "carried-over",
            "assumed",
            f"{untold:,} of the {data['releases']['count']:,} releases in the ledger were made elsewhere: recorded by hand, or "
            f"loaded with a ledger, a checkpoint or a ledger file that does not tell how. How batches were drawn and noise was "
            f"made for them is unknown.",
        )
    for kind in data["releases"]["by_hand"]:
        opaque = kind["kind"] == "Opaque"
        what = "known only by the epsilon and delta that the user stated" if opaque else "as the user described them"
        yield _finding(
            "opaque-events" if opaque else f"by-hand-{kind['kind']}",
            "assumed",
            f"{kind['count']:,} release(s) were recorded by hand ({kind['kind']}), {what}. The library did not make them and "
            f"cannot vouch for them.",
        )


def _told(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The ways in which releases were made, but for those of which nothing is known."""
    return [made for made in data["releases"]["made"] if made["noise"] != "unknown"]


def _untold(data: Mapping[str, Any]) -> int:
    """Releases that look like those of a training, and of which nothing tells how they were made."""
    others = sum(int(kind["count"]) for kind in data["releases"]["by_hand"])
    return max(0, int(data["releases"]["count"]) - others - sum(int(made["releases"]) for made in _told(data)))


def _differences(data: Mapping[str, Any]) -> Iterator[Finding]:
    trainings = data["trainings"]
    if data["neighbouring"] == "zero-out":
        yield _finding(
            "not-amplified",
            "other",
            "Batches were not sampled at random (poisson_sampling=False). The guarantee is for datasets that differ by blanking "
            "one record, which keeps its place; nothing is amplified. It cannot be compared with one for adding or removing.",
        )
    if data["neighbouring"] == "replace-one":
        yield _finding("replace-one", "other", "The guarantee is for datasets that differ by replacing one record.")
    if data["releases"]["count"] == 0:
        yield _finding("nothing-released", "other", "Nothing was released yet: no step was made.")
    if any(row["bound"] and row["upper"] == "inf" for row in data["epsilon"]):
        yield _finding("epsilon-infinite-somewhere", "other", "Epsilon is infinite at some of the deltas below.")
    large = [t for t in trainings if _delta_too_large(data, t)]
    if large:
        yield _finding(
            "delta-too-large",
            "other",
            "The first delta is not below one over the number of records: releasing a whole record at random would be allowed.",
        )


def _delta_too_large(data: Mapping[str, Any], training: Mapping[str, Any]) -> bool:
    """Whether delta n >= 1, where rate and batch size say n. They are public."""
    rate, size = training["sample_rate"], training["expected_batch_size"]
    if isinstance(rate, str) or isinstance(size, str) or not size:
        return False
    return bool(data["epsilon"][0]["delta"] >= rate / size)
