"""Where the time of a private step goes, part by part, in units of the plain step: what cannot be less, and what could.

A stopwatch is put around the library's own functions; each part is counted without what it calls of the others. First checked:
the noise-free update is that of the loop over single records. ``--write`` puts the table into ``docs/performance.md``.

    python benchmarks/parts_of_a_step.py [--only mlp vit] [--seconds 4] [--write]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _harness import clipped_mean_by_hand, distance, interleaved, prepare, put_between
from _workloads import WORKLOADS

from ghostgrad.clipping.clipper import Clipper
from ghostgrad.noise.gaussian import KeyedGaussian
from ghostgrad.optimizer import DPOptimizer
from ghostgrad.recording.recorder import Phase, Recorder

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- measured by benchmarks/parts_of_a_step.py -->", "<!-- end of parts -->"
TOLERANCE = 1e-3
PARTS = ["forward", "backward", "second backward", "norms", "sums", "noise", "step"]


class Stopwatch:
    """Which part of a step the time goes to; the innermost that is open."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._open = ["forward"]
        self._since = time.process_time()

    def to(self, part: str) -> None:
        """What was open until now gets the time since it was opened."""
        now = time.process_time()
        self.spent[self._open[-1]] += now - self._since
        self._since = now
        self._open.append(part)

    def back(self) -> None:
        """The innermost part ends."""
        now = time.process_time()
        self.spent[self._open.pop()] += now - self._since
        self._since = now

    def around(self, owner: Any, name: str, part: Callable[..., str | None]) -> Callable[[], None]:
        """Watch a function; returns what ends that."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **options: Any) -> Any:
            found = part(*args, **options)
            if found is None:
                return original(*args, **options)
            self.to(found)
            try:
                return original(*args, **options)
            finally:
                self.back()

        setattr(owner, name, watched)
        return lambda: setattr(owner, name, original)


@contextmanager
def watching() -> Iterator[Stopwatch]:
    """A stopwatch around the parts of private steps, and of plain ones where they are torch's."""
    watch = Stopwatch()

    def is_(part: str) -> Callable[..., str]:
        return lambda *args, **options: part

    def second(recorder: Any, recording: Any, phase: Phase, *args: Any, **options: Any) -> str | None:
        return "second backward" if phase is Phase.SUM else None

    ends = [
        watch.around(torch.Tensor, "backward", is_("backward")),
        watch.around(Recorder, "_run", second),
        watch.around(Clipper, "measure", is_("norms")),
        watch.around(Clipper, "settle", is_("norms")),
        watch.around(Clipper, "add", is_("norms")),
        watch.around(Clipper, "_add", is_("sums")),
        watch.around(KeyedGaussian, "add_all_", is_("noise")),
        watch.around(DPOptimizer, "step", is_("step")),
        watch.around(torch.optim.SGD, "step", is_("step")),
    ]
    try:
        yield watch
    finally:
        for end in ends:
            end()


def rows(name: str, seconds: float) -> list[list[str]]:
    """The plain step and ours; medians over the rounds, in units of the plain step."""
    truth, found = clipped_mean_by_hand(name), {}
    ours = {"bk": "bk", "ghost": "ghost", "two-passes": "two passes"}
    for method in ours:
        if distance(name, method, truth) > TOLERANCE:
            raise SystemExit(f"{name}: {method} gives another update")
    with watching() as watch:
        steps = {method: prepare(name, method)[1] for method in ("plain", *ours)}
        parts: dict[str, list[Counter[str]]] = {method: [] for method in steps}

        def timed(method: str) -> None:
            watch.spent.clear()
            watch.to("forward")
            steps[method]()
            watch.back()
            parts[method].append(watch.spent.copy())

        interleaved({m: functools.partial(timed, m) for m in steps}, rounds=25, seconds=seconds)
    whole = statistics.median(each.total() for each in parts["plain"])
    found = []
    for method, title in {"plain": "plain", **ours}.items():
        medians = [statistics.median(each[part] for each in parts[method]) / whole for part in PARTS]
        found.append(["", title, *(f"{m:.2f}" if m >= 0.005 else "" for m in medians), f"{sum(medians):.2f}"])
    found[0][0] = WORKLOADS[name].title
    return found


def main() -> None:
    """Measure and print; write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), default=["mlp", "cnn", "vit", "gpt", "layers"])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each workload")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = ["workload", "step", *PARTS, "together"]
    lines = [head, ["---", "---", *["---:"] * (len(PARTS) + 1)]]
    for name in options.only:
        lines += rows(name, options.seconds)
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    print(text)
    if options.write:
        put_between(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main()
