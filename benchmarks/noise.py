"""What drawing the noise costs: keyed noise, secure mode and torch's own generator, for the same number of values.

First checked: each source gives values of the asked standard deviation and of the normal law, and the keyed ones are the same on
one thread and on two. Then each adds noise to the same tensor in turns, one thread; medians of the ratios to
``add_(torch.randn(...))`` of the same round. ``--write`` puts the table into ``docs/performance.md``.

    python benchmarks/noise.py [--seconds 8] [--write]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _harness import interleaved, put_between, ratios
from scipy import stats
from torch import Tensor

from ghostgrad.keys import RunKey
from ghostgrad.noise import GeneratorGaussian, KeyedGaussian

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- measured by benchmarks/noise.py -->", "<!-- end of noise -->"
SIZES = (10_000, 669_706, 10_000_000)
"""A bias-sized model, the wide MLP of the other tables, and a small transformer."""
SOURCES = {
    "randn": "`torch.randn`, added",
    "keyed": "keyed (the default)",
    "secure": "`secure_mode=True`",
    "generator": "`noise_generator=`",
}


def sources() -> dict[str, Callable[[Tensor], None]]:
    key = RunKey.from_seed(0)
    keyed, secure = KeyedGaussian(key), KeyedGaussian(key, secure=True)
    generator = GeneratorGaussian(torch.Generator().manual_seed(0))
    return {
        "randn": lambda target: target.add_(torch.randn(target.shape)),
        "keyed": lambda target: keyed.add_(target, std=1.0, step=1, index=0),
        "secure": lambda target: secure.add_(target, std=1.0, step=1, index=0),
        "generator": lambda target: generator.add_(target, std=1.0, step=1, index=0),
    }


def check() -> None:
    """Raise where a source does not draw what it says."""
    for name, add in sources().items():
        values = torch.zeros(200_000)
        add(values)
        if stats.kstest(values.numpy(), "norm").pvalue < 1e-4:
            raise SystemExit(f"{name}: the values are not standard normal")
        if name in ("keyed", "secure"):
            torch.set_num_threads(2)
            again = torch.zeros(200_000)
            add(again)
            torch.set_num_threads(1)
            if not torch.equal(values, again):
                raise SystemExit(f"{name}: other values on two threads")


def measure(size: int, seconds: float) -> str:
    """One line of the table."""
    target = torch.zeros(size)
    times = interleaved({k: partial(add, target) for k, add in sources().items()}, rounds=200, seconds=seconds)
    relative, plain = ratios(times, to="randn"), statistics.median(times["randn"])
    cells = " | ".join(f"{relative[name]:.2f}" for name in SOURCES if name != "randn")
    return f"| {size:,} | {plain * 1e3:.2f} ms | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each size")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    check()
    head = ["| values | " + " | ".join(SOURCES.values()) + " |", "|---:" * (len(SOURCES) + 1) + "|"]
    table = "\n".join(head + [measure(size, arguments.seconds) for size in SIZES])
    print(table)
    if arguments.write:
        put_between(PAGE, BEGIN, END, table)


if __name__ == "__main__":
    main()
