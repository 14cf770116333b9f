"""A compiled model is trained as fast as an eager one, and nothing is compiled again for another batch size.

Every step has another number of records, as under Poisson sampling. First checked: one private step of the compiled model is
that of the eager one. Then plain and private, eager and compiled, take their steps in turns on one thread; medians of the ratios
to the eager step of the same kind and round. ``--write`` puts the table into ``docs/performance.md``.

    python benchmarks/compiled.py [--seconds 20] [--write]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import interleaved, put_between
from _workloads import WORKLOADS, Workload
from torch import nn
from torch._dynamo.utils import counters

from ghostgrad import PrivacyEngine

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- measured by benchmarks/compiled.py -->", "<!-- end of compiled -->"
SHARES = (1.0, 0.75, 1.125, 0.5, 0.875, 1.25)
"""Batch sizes of the steps, in units of the workload's own."""
TOLERANCE = 1e-5


def stepper(workload: Workload, *, private: bool, compiled: bool) -> tuple[nn.Module, Callable[[], None]]:
    """The model, and one step on the next batch size."""
    torch.manual_seed(0)
    model = workload.model()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
    if private:
        model, optimizer, _ = PrivacyEngine(seed=0).make_private(
            module=model, optimizer=optimizer, data_loader=None, sample_rate=0.1, expected_batch_size=float(workload.n),
            noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip
    run: Any = torch.compile(model, dynamic=True) if compiled else model
    batches = [workload.batch(max(2, round(share * workload.n))) for share in SHARES]
    turn = iter(range(10**9))

    def step() -> None:
        x, y = batches[next(turn) % len(batches)]
        workload.records_loss(run(x.clone()), y).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def check(workload: Workload) -> None:
    """Raise where compiling changes what is trained."""
    (eager, one), (compiled, other) = (stepper(workload, private=True, compiled=c) for c in (False, True))
    one()
    other()
    gap = max(
        float((a - b).detach().abs().max()) for a, b in zip(eager.parameters(), compiled.parameters(), strict=True)
    )
    if gap > TOLERANCE:
        raise SystemExit(f"{workload.title}: compiled and eager steps differ by {gap:.1e}")


def row(name: str, seconds: float) -> list[str]:
    """One workload."""
    workload = WORKLOADS[name]
    check(workload)
    kinds = [(private, compiled) for private in (False, True) for compiled in (False, True)]
    steps = {
        f"{private} {compiled}": stepper(workload, private=private, compiled=compiled)[1] for private, compiled in kinds
    }
    for step in steps.values():
        for _ in SHARES:
            step()
    before = counters["frames"]["total"]
    times = interleaved(steps, rounds=1000, seconds=seconds)
    cells = [workload.title]
    for private in (False, True):
        pairs = zip(times[f"{private} True"], times[f"{private} False"], strict=True)
        cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}x")
    return [*cells, str(counters["frames"]["total"] - before)]


def main() -> None:
    """Measure and print; write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = ["workload", "plain, compiled to eager", "private, compiled to eager", "compiled again"]
    rows = [head, ["---", "---:", "---:", "---:"], *(row(name, options.seconds) for name in ("mlp", "gpt"))]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    print(text)
    if options.write:
        put_between(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main()
