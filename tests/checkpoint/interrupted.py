"""A private training that can be killed anywhere and goes on from its last checkpoint, and what it released on the way."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ghostgrad import BatchMemoryManager, PrivacyEngine
from ghostgrad.journal import digest
from ghostgrad.noise import KeyedGaussian

RECORDS, PASSES = 24, 3


@dataclass(frozen=True)
class Settings:
    """What is combined; every training has dropout and a learning rate that changes at every step."""

    mode: str = "bk"
    limit: int | None = None
    accumulation: int = 1
    workers: int = 0
    clipping: str = "flat"
    optimizer: str = "adam"
    seed: int | None = None
    poisson: bool = True
    augmented: bool = False
    scheduled: bool = False
    ledger: bool = True


class Records(Dataset[Any]):
    """Made-up records, with a random change at each visit if ``augmented``."""

    def __init__(self, augmented: bool) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(RECORDS, 5, generator=drawn), torch.randint(3, (RECORDS,), generator=drawn)
        self.augmented = augmented

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[index]
        return (x + 0.1 * torch.randn(5) if self.augmented else x), self.y[index]


class Training:
    """The user's script: everything is built anew in each process, and the checkpoint is loaded where there is one."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.path, self.settings = folder / "checkpoint", settings
        torch.manual_seed(int.from_bytes(os.urandom(4), "big"))  # stands anywhere, as in a new process
        module = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))
        inner = {
            "adam": lambda: torch.optim.Adam(module.parameters(), lr=0.05),
            "momentum": lambda: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9),
        }[settings.optimizer]()
        options = {"ledger": folder / "run.jsonl"} if settings.ledger else {}
        self.engine = PrivacyEngine(seed=settings.seed, **options)
        self.module, self.optimizer, self.loader = self.engine.make_private(
            module=module, optimizer=inner, clipping=settings.clipping,
            noise_multiplier=(lambda step: 1.0 + step / 10) if settings.scheduled else 1.0,
            max_grad_norm=(lambda step: 0.7 / (1 + step)) if settings.scheduled else 0.7,
            grad_sample_mode=settings.mode, accumulation_steps=settings.accumulation, poisson_sampling=settings.poisson,
            data_loader=DataLoader(
                Records(settings.augmented), batch_size=4, shuffle=True, num_workers=settings.workers
            ),
        )  # fmt: skip
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.97)
        if self.path.exists():
            self.engine.load_checkpoint(self.path, **self.parts)

    @property
    def parts(self) -> dict[str, Any]:
        return {"module": self.module, "optimizer": self.optimizer, "extra": {"schedule": self.schedule}}

    def save(self) -> None:
        self.engine.save_checkpoint(self.path, **self.parts)

    def run(self, at: Callable[[Training, str], None]) -> None:
        """``at(training, place)`` is called all over the loop."""
        for _ in range(self.loader.completed_passes, PASSES):
            with self._batches() as batches:
                for x, y in batches:
                    at(self, "drawn")
                    F.cross_entropy(self.module(x), y, reduction="sum").div(max(1, len(x))).backward()
                    at(self, "summed")
                    before = self.optimizer.steps
                    self.optimizer.step()
                    at(self, "stepped")
                    self.optimizer.zero_grad()
                    if self.optimizer.steps > before:
                        self.schedule.step()
                    at(self, "cleared")
            at(self, "passed")

    @contextlib.contextmanager
    def _batches(self) -> Iterator[Any]:
        if self.settings.limit is None:
            yield self.loader
        else:
            with BatchMemoryManager(
                data_loader=self.loader, max_physical_batch_size=self.settings.limit, optimizer=self.optimizer
            ) as pieces:
                yield pieces

    def outcome(self) -> dict[str, Any]:
        return {
            "parameters": [p.detach() for p in self.module.parameters()],
            "optimizer": self.optimizer.state_dict(),
            "rate": self.schedule.get_last_lr(),
            "bound": self.optimizer.max_grad_norm,
            "history": self.engine.accountant.history,
            "steps": self.engine.steps,
            "random": torch.get_rng_state(),
        }


def in_a_process(function: Callable[[], None], kill_after: float | None = None) -> bool:
    """Run in a forked process; whether it came to its end. Kills it after so many seconds, if it is still there.

    Raises:
        AssertionError: with the traceback, if it failed.
    """
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        try:
            torch.set_num_threads(1)
            function()
            sending.send("")
        except BaseException:
            sending.send(traceback.format_exc())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking beside threads
        process = context.Process(target=run)
        process.start()
    sending.close()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join(120)
    assert not process.is_alive()
    if process.exitcode == -signal.SIGKILL:
        return False
    said = receiving.recv()
    assert not said, said
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def note_releases(file: Path) -> None:
    """From now on, write down each noise vector's address and the sums that it is added to."""
    add_all = KeyedGaussian.add_all_

    def noted(self: Any, parts: Any, *, std: float, step: int) -> None:
        line = f"{self._key.mark} {self._course.hex()} {step} {digest(part for _, part in parts)}\n"
        with open(file, "a") as notes:
            notes.write(line)
        add_all(self, parts, std=std, step=step)

    KeyedGaussian.add_all_ = noted  # type: ignore[method-assign] - in a process of its own


def releases(file: Path) -> dict[str, set[str]]:
    """The different sums that each noise vector was added to."""
    found: dict[str, set[str]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        address, _, sums = line.rpartition(" ")
        found.setdefault(address, set()).add(sums)
    return found


def uninterrupted(folder: Path, settings: Settings) -> dict[str, Any]:
    """Train to the end; ``first`` is the checkpoint before the first batch, with which others share the key."""

    def run() -> None:
        training = Training(folder, settings)
        training.save()
        training.path.rename(folder / "first")
        if settings.ledger:
            shutil.copy(folder / "run.jsonl", folder / "first.jsonl")
        training.run(lambda *_: None)
        torch.save(training.outcome(), folder / "outcome")

    assert in_a_process(run)
    return torch.load(folder / "outcome", weights_only=True)


def interrupted(
    folder: Path, settings: Settings, first: Path, kills: int, dice: random.Random, *, most: int = 60
) -> dict[str, Any]:
    """Train to the end from ``first``, killed on the way and resumed from the last checkpoint each time."""
    shutil.copy(first, folder / "checkpoint")
    if settings.ledger:
        shutil.copy(first.with_name("first.jsonl"), folder / "run.jsonl")
    for life in range(kills + 1):
        saves = {dice.randrange(most) for _ in range(4)}
        end = dice.randrange(most) if life < kills else None

        def run(saves: set[int] = saves, end: int | None = end) -> None:
            note_releases(folder / "releases")
            training, visited = Training(folder, settings), 0

            def at(training: Training, place: str) -> None:
                nonlocal visited
                if any(visited - 4 < point <= visited for point in saves) and place in ("drawn", "cleared", "passed"):
                    training.save()
                if visited == end:
                    die()
                visited += 1

            training.run(at)
            torch.save(training.outcome(), folder / "outcome")

        if in_a_process(run):
            break
    return torch.load(folder / "outcome", weights_only=True)


def equal(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
