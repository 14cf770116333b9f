"""A private step costs little more than a plain one: in time, in memory, in multiply-adds.

For every workload each method's update without noise is first held to the loop over single records. Then plain, ours and
Opacus are timed in turns (one step of each a round, in a rotated order), with noise, on one thread; what is shown is the
median of the ratios within a round. Peak memory is that of a process of its own. ``--write`` puts the table and the figures
into ``docs/performance.md`` and ``docs/performance/``.

    python benchmarks/step_time.py [--only mlp gpt] [--methods bk ghost opacus opacus-ghost] [--seconds 4] [--write]
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _harness import METHODS, clipped_mean_by_hand, distance, interleaved, peaks, prepare, put_between, ratios, work
from _workloads import WORKLOADS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
FIGURES = PAGE.with_suffix("")
BEGIN, END = "<!-- measured by benchmarks/step_time.py -->", "<!-- end -->"
TOLERANCE = 1e-3
"""How far an update may be from the loop's, relative to its norm: single precision, and factors rounded down."""

_COUNTED = {"plain", "bk", "ghost"}
"""Whose work is shown."""

_MOST_BYTES = 4 << 30
"""Per-sample gradients beyond this are not tried."""


@dataclass
class Result:
    """What was found for one workload; ratios are to the plain step."""

    name: str
    plain_ms: float = math.nan
    time: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(name: str, methods: list[str], *, rounds: int, seconds: float) -> Result:
    """Equality, then time, work and memory."""
    result, steps = Result(name), {"plain": prepare(name, "plain")[1]}
    truth = clipped_mean_by_hand(name)
    for method in methods:
        if method in ("hooks", "opacus") and (need := _per_sample_bytes(name)) > _MOST_BYTES:
            result.failed[method] = f"per-sample gradients of {need >> 30} GiB"
            continue
        try:
            gap = distance(name, method, truth)
            if gap > TOLERANCE:
                result.failed[method] = f"another update: off by {gap:.1e}"
                continue
            steps[method] = prepare(name, method)[1]
        except Exception as error:  # a peer that cannot train this model is a finding
            result.failed[method] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    ours_failed = [m for m in result.failed if not m.startswith("opacus")]
    if ours_failed:
        raise SystemExit(f"{name}: {result.failed}")
    times = interleaved(steps, rounds=rounds, seconds=seconds)
    result.plain_ms, result.time = 1e3 * statistics.median(times["plain"]), ratios(times)
    flops = {m: work(step) for m, step in steps.items() if m in _COUNTED}
    result.flops = {m: count / flops["plain"] for m, count in flops.items()}
    memory = peaks(name, list(steps))
    result.memory = {m: used / memory["plain"] for m, used in memory.items()}
    return result


def _per_sample_bytes(name: str) -> int:
    workload = WORKLOADS[name]
    return workload.n * sum(4 * p.numel() for p in workload.model().parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------- the page


def table(results: list[Result], methods: list[str]) -> str:
    """A row for each workload: time, memory and work of each method, in units of the plain step."""
    head = ["workload", "plain, ms", *(METHODS[m] for m in methods), *(f"memory, {m}" for m in ("bk", "ghost")),
            *(f"work, {m}" for m in ("bk", "ghost"))]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for r in results:
        title = f"{WORKLOADS[r.name].title}, B={WORKLOADS[r.name].n}"
        cells = [_cell(r.time, m, r.failed) for m in methods]
        rows.append([title, f"{r.plain_ms:.0f}", *cells, *(_cell(r.memory, m, {}) for m in ("bk", "ghost")),
                     *(_cell(r.flops, m, {}) for m in ("bk", "ghost"))])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(values: dict[str, float], method: str, failed: dict[str, str]) -> str:
    if method in failed:
        return "fails" if "another update" not in failed[method] else "wrong"
    return f"{values[method]:.2f}x" if method in values else ""


def failures(results: list[Result]) -> str:
    """Why a peer has no number."""
    return "\n".join(
        f"* {WORKLOADS[r.name].title}, {METHODS[m]}: {why}" for r in results for m, why in r.failed.items()
    )


def draw(results: list[Result], methods: list[str], quantity: str, path: Path) -> None:
    """Bars for each workload, one for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        heights = [getattr(r, quantity).get(method, 0) for r in results]
        axes.bar([x + i * width for x in range(len(results))], heights, width, label=METHODS[method])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 4, 8, 16], labels=["1", "2", "4", "8", "16"])
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(results))], [r.name for r in results])
    axes.set_ylabel(f"{quantity}, in units of the plain step")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})


def write(results: list[Result], methods: list[str]) -> None:
    """Replace what stands between the marks on the page, and the figures."""
    FIGURES.mkdir(exist_ok=True)
    for quantity in ("time", "memory"):
        draw(results, methods, quantity, FIGURES / f"{quantity}.svg")
    body = "\n\n".join(part for part in (table(results, methods), failures(results)) if part)
    put_between(PAGE, BEGIN, END, body)


def main() -> None:
    """Measure and print; write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS)[1:], default=["bk", "ghost", "opacus", "opacus-ghost"]
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=4.0, help="after so long a workload's rounds end")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for name in options.only:
        results.append(measure(name, options.methods, rounds=options.rounds, seconds=options.seconds))
        print(table(results[-1:], options.methods).splitlines()[-1], flush=True)
    print("\n" + table(results, options.methods) + "\n" + failures(results))
    if options.write:
        write(results, options.methods)


if __name__ == "__main__":
    main()
