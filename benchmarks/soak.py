"""A long private training in which everything fails now and then: memory stays flat, and every release is right and counted.

Poisson batches (some empty) come from a worker in pieces of a memory manager; data, forward, backward and the loop between them
raise at random, and the loop tries again or leaves the pass. Each record's gradient is the record itself, so every released
sum is held to the records that are in it, and steps, ledger and ledger file to what the user's optimizer was given.
Each third of the steps has another clipper, with `detach` in between. Memory is looked at in windows.

    python benchmarks/soak.py [--steps 100000] [--workers 1]
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ghostgrad import BatchMemoryManager, PrivacyEngine
from ghostgrad.ledger import read_ledger

RECORDS, BATCH, PIECE, C, SIGMA = 120, 3, 2, 1.0, 0.01
MODES = ("bk", "ghost", "hooks")
WINDOWS = 20


class BrokenError(Exception):
    """What the training meets at random."""


class Records(Dataset[Any]):
    """Rows of norm 0.5 to 2 with their numbers; now and then one cannot be read."""

    def __init__(self, odds: float) -> None:
        drawn = torch.Generator().manual_seed(0)
        rows = torch.randn(RECORDS, 4, generator=drawn)
        self.x = rows / rows.norm(dim=1, keepdim=True) * (0.5 + 1.5 * torch.rand(RECORDS, 1, generator=drawn))
        self.odds = odds

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if random.random() < self.odds:
            raise BrokenError("data")
        return self.x[index], index


class Fragile(nn.Module):
    """A linear model that fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.fails = nn.Linear(4, 1, bias=False), ""

    def forward(self, x: Tensor) -> Tensor:
        if self.fails == "backward, behind the layer":
            x = x.clone().requires_grad_()
            x.register_hook(_break)
        out: Tensor = self.linear(x)
        if self.fails == "forward":
            raise BrokenError
        if self.fails == "backward, before the layer":
            out.register_hook(_break)
        return out


def _break(_: Tensor) -> None:
    raise BrokenError


class Counting(torch.optim.SGD):
    """The user's optimizer: what it is given was released."""

    released = 0

    def step(self, closure: Any = None) -> Any:
        self.released += 1
        return super().step(closure)


@dataclass
class Sum:
    """What the library's sum should hold."""

    rows: list[int] = field(default_factory=list)
    draws: set[int] = field(default_factory=set)
    ended: bool = True

    def add(self, rows: list[int], draw: int, *, last: bool) -> None:
        if not self.ended and draw not in self.draws:
            self.clear()  # the draw before was left in the middle
        self.rows += rows
        self.draws.add(draw)
        self.ended = last

    def clear(self) -> None:
        self.rows, self.draws, self.ended = [], set(), True


@dataclass
class Found:
    """What was counted, and memory at the end of each window."""

    steps: int = 0
    released: int = 0
    draws: int = 0
    """Releases that the ledger should hold: a step over several draws is several."""
    in_ledger: int = 0
    in_file: int = 0
    wrong: int = 0
    """Released gradients that are not the sum of the clipped records, up to noise."""
    empty: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    resident: list[float] = field(default_factory=list)
    """MiB."""
    objects: list[int] = field(default_factory=list)
    """Python's, that the garbage collector knows and that were not there before."""

    def faults(self, *, most_objects: int, most_mib: float) -> list[str]:
        """What does not hold; empty when all is well."""
        found = [
            (self.steps != self.released, f"{self.steps} steps counted, {self.released} released"),
            (self.draws != self.in_ledger, f"{self.draws} releases made, {self.in_ledger} in the ledger"),
            (self.draws != self.in_file, f"{self.draws} releases made, {self.in_file} in the ledger file"),
            (self.wrong > 0, f"{self.wrong} released sums are wrong"),
            (growth(self.objects) > most_objects, f"objects grow: {self.objects}"),
            (growth(self.resident) > most_mib, f"memory grows: {self.resident}"),
        ]
        return [words for fault, words in found if fault]


class Soak:
    """One engine with its ledger file."""

    def __init__(self, path: Path, steps: int, *, workers: int, seed: int, odds: float = 0.02) -> None:
        self.path, self.total, self.workers, self.odds = path, steps, workers, odds
        self.dice = random.Random(seed)
        self.engine, self.found = PrivacyEngine(seed=seed, ledger=path), Found()
        self.data = Records(odds / BATCH)

    def run(self) -> Found:
        gc.collect()
        gc.freeze()  # what was there before is neither counted nor looked through
        try:
            for number, mode in enumerate(MODES, start=1):
                self._train(mode, until=self.total * number // len(MODES))
        finally:
            gc.unfreeze()
        found = self.found
        found.steps, found.in_ledger = self.engine.steps, len(self.engine.accountant)
        found.in_file = read_ledger(self.path).ledger.steps
        return found

    def _train(self, mode: str, until: int) -> None:
        module = Fragile()
        inner = Counting(module.parameters(), lr=0.001)
        self.module, self.optimizer, loader = self.engine.make_private(
            module=module, optimizer=inner, noise_multiplier=SIGMA, max_grad_norm=C, grad_sample_mode=mode,
            data_loader=DataLoader(
                self.data, batch_size=BATCH, num_workers=self.workers, persistent_workers=self.workers > 0
            ),
        )  # fmt: skip
        self.sum = Sum()
        while self.engine.steps < until:
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=PIECE, optimizer=self.optimizer
            ) as pieces:
                try:
                    self._pass(pieces, until)
                except BrokenError as error:
                    self.found.broken["data"] += str(error) != ""
            if not loader.feed.last:
                self.sum.clear()
        self.found.released += inner.released
        self.engine.detach()

    def _pass(self, pieces: Any, until: int) -> None:
        for x, numbers in pieces:
            if self.engine.steps == until:
                return
            feed, rows = pieces.feed, numbers.tolist()
            self.found.empty += not feed.records
            while not self._backward(x):
                # Whether there is a step must not tell that a draw was empty, so that one is always tried again.
                if rows and self.dice.random() < 0.5:
                    raise BrokenError
            self.sum.add(rows, feed.logical_batch, last=feed.last)
            self._maybe_leave("between backward and step", rows)
            self._step()
            self._maybe_leave("between step and zero_grad", rows)
            self.optimizer.zero_grad()

    def _backward(self, x: Tensor) -> bool:
        places = ("forward", "backward, before the layer", "backward, behind the layer")
        self.module.fails = self.dice.choice(places) if self.dice.random() < self.odds else ""
        try:
            self.module(x).sum().div(max(1, len(x))).backward()
        except BrokenError:
            self.found.broken[self.module.fails] += 1
            return False
        return True

    def _maybe_leave(self, place: str, rows: list[int]) -> None:
        if rows and self.dice.random() < self.odds / 2:
            self.found.broken[place] += 1
            self.optimizer.zero_grad()
            if self.optimizer.total.complete:
                self.sum.clear()
            raise BrokenError

    def _step(self) -> None:
        before = self.engine.steps
        self.optimizer.step()
        if self.engine.steps == before:
            return
        draws = max(1, len(self.sum.draws))
        rows = self.data.x[self.sum.rows]
        clipped = rows * (C / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)
        gap = self.module.linear.weight.grad * self.optimizer.expected_batch_size * draws - clipped.sum(0)
        self.found.wrong += bool(gap.abs().max() > 8 * SIGMA * C)
        self.found.draws += draws
        self.sum.clear()
        if self.engine.steps % max(1, self.total // WINDOWS) == 0:
            gc.collect()
            self.found.resident.append(resident())
            self.found.objects.append(len(gc.get_objects()))


def growth(windows: Sequence[float]) -> float:
    """From the third quarter to the last; the least of each, as what is on its way comes and goes."""
    half, rest = len(windows) // 2, len(windows) * 3 // 4
    return min(windows[rest:]) - min(windows[half:rest])


def resident() -> float:
    """Resident memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        soak = Soak(Path(folder) / "run.jsonl", arguments.steps, workers=arguments.workers, seed=arguments.seed)
        found = soak.run()
        seconds = time.perf_counter() - start
    print(f"{found.released} releases in {seconds:.0f} s; {found.empty} empty draws; raised: {dict(found.broken)}")
    print(
        f"steps {found.steps}, in the ledger {found.in_ledger}, in the file {found.in_file}, wrong sums {found.wrong}"
    )
    print("resident MiB:", ", ".join(f"{value:.1f}" for value in found.resident))
    print("objects:", ", ".join(map(str, found.objects)))
    faults = found.faults(most_objects=100, most_mib=2.0)
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
