"""On several ranks rank 0 writes; all of them go on from one file as the uninterrupted training would."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import die
from ranks import on_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ghostgrad import BatchMemoryManager, PrivacyEngine
from ghostgrad.distributed import current
from ghostgrad.errors import CheckpointError, ConfigurationError, LedgerError, PrivacyError
from ghostgrad.ledger import read_ledger


class Augmented(Dataset[Any]):
    """Records that come out a little different at each visit, by the global generator of their rank."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.x = torch.randn(24, 3, generator=drawn)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.x[index] + 0.1 * torch.randn(3), index % 2


def private(folder: Path, *, ledger: bool = True, limit: int | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))  # each rank draws its own dropout
    engine = PrivacyEngine(ledger=folder / "run.jsonl" if ledger else None)
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.Adam(module.parameters()), data_loader=DataLoader(Augmented(), batch_size=6),
        noise_multiplier=1.0, max_grad_norm=1.0, accumulation_steps=2,
    )  # fmt: skip
    return {"engine": engine, "module": module, "optimizer": optimizer, "loader": loader, "limit": limit}


def parameters(run: dict[str, Any]) -> list[torch.Tensor]:
    return [p.detach() for p in run["module"].parameters()]


def batches_of(run: dict[str, Any]) -> Iterator[Any]:
    if run["limit"] is None:
        yield from run["loader"]
    else:
        with BatchMemoryManager(
            data_loader=run["loader"], max_physical_batch_size=run["limit"], optimizer=run["optimizer"]
        ) as pieces:
            yield from pieces


def train(run: dict[str, Any], batches: Any, count: int) -> None:
    for _, (x, y) in zip(range(count), batches, strict=False):
        nn.functional.cross_entropy(run["module"](x), y, reduction="sum").div(max(1, len(x))).backward()
        run["optimizer"].step()
        run["optimizer"].zero_grad()


@pytest.mark.parametrize("ledger", [False, True])
@pytest.mark.parametrize(
    ("limit", "before", "after"), [(None, 2, 2), (None, 1, 3), (2, 3, 4)], ids=["between", "accumulated", "piece"]
)
def test_two_ranks_go_on_bit_for_bit(limit: int | None, before: int, after: int, ledger: bool, tmp_path: Path) -> None:
    """After a step and in the middle of a logical batch; every rank with its own share, sum, dropout and augmentation."""
    path = tmp_path / "checkpoint"

    def outcome(run: dict[str, Any]) -> Any:
        report = run["engine"].report(deltas=[1e-5])
        return parameters(run), run["engine"].accountant.history, (report.holds, report.data["releases"])

    def whole(rank: int) -> Any:
        run = private(tmp_path, ledger=ledger, limit=limit)
        batches = batches_of(run)
        train(run, batches, before)
        run["engine"].save_checkpoint(path, module=run["module"], optimizer=run["optimizer"])
        train(run, batches, after)
        return outcome(run)

    def resumed(rank: int) -> Any:
        run = private(tmp_path, ledger=ledger, limit=limit)
        run["engine"].load_checkpoint(path, module=run["module"], optimizer=run["optimizer"])
        train(run, batches_of(run), after)
        return outcome(run)

    first = on_ranks(2, whole)
    second = on_ranks(2, resumed)
    assert first[0][1]
    for (expected, spent, said), (found, counted, says) in zip(first, second, strict=True):
        assert all(map(torch.equal, expected, found))
        assert spent == counted
        assert said == says == first[0][2]  # every rank says the same, also where only rank 0 has the ledger file
        assert says[0] == "yes"
    if ledger:
        assert read_ledger(tmp_path / "run.jsonl").ledger.steps == sum(entry[-1] for entry in spent)


def test_ranks_that_are_killed_go_on_bit_for_bit(tmp_path: Path) -> None:
    """One is killed, in the middle of anything; the other raises, and both are started again from what was saved."""
    one, parts = tmp_path / "one", tmp_path / "parts"
    one.mkdir()
    parts.mkdir()

    def to_the_end(rank: int, folder: Path, *, victim: int | None = None, moment: int = 0) -> Any:
        moments = itertools.count(1)

        def here() -> None:
            if next(moments) == moment and rank == victim:
                die()

        run = private(folder)
        saved = {"module": run["module"], "optimizer": run["optimizer"]}
        if folder == parts:
            run["engine"].load_checkpoint(parts / "checkpoint", **saved)
        else:
            run["engine"].save_checkpoint(parts / "checkpoint", **saved)
            if rank == 0:
                shutil.copy(one / "run.jsonl", parts / "run.jsonl")
        try:
            while run["loader"].completed_passes < 2:
                for x, y in run["loader"]:
                    here()
                    nn.functional.cross_entropy(run["module"](x), y, reduction="sum").div(max(1, len(x))).backward()
                    here()
                    run["optimizer"].step()
                    here()
                    run["optimizer"].zero_grad()
                    if folder == parts:
                        run["engine"].save_checkpoint(parts / "checkpoint", **saved)
        except RuntimeError:  # the process group's, as the other rank is gone
            return None
        return parameters(run), run["engine"].accountant.history

    expected = on_ranks(2, lambda rank: to_the_end(rank, one))
    for victim, moment in [(0, 2), (1, 5), (0, 6), (1, 10)]:
        assert on_ranks(2, lambda rank: to_the_end(rank, parts, victim=victim, moment=moment)) == [None, None]  # noqa: B023
    for (found, counted), (wanted, spent) in zip(
        on_ranks(2, lambda rank: to_the_end(rank, parts)), expected, strict=True
    ):
        assert all(map(torch.equal, found, wanted))
        assert counted == spent
    assert read_ledger(parts / "run.jsonl").ledger == read_ledger(one / "run.jsonl").ledger


def test_ranks_do_not_go_on_from_the_state_of_another() -> None:
    """Their sums would be others, under the same noise."""

    def run(rank: int) -> tuple[str, int]:
        first = private(Path(), ledger=False)
        train(first, iter(first["loader"]), 2)
        state = current().collect(first["engine"].state_dict())[0]
        again = private(Path(), ledger=False)
        try:
            again["engine"].load_state_dict(state)
            said = "nothing"
        except (CheckpointError, ConfigurationError) as error:
            said = str(error)
        fresh = private(Path(), ledger=False)
        fresh["engine"].load_state_dict(state, fresh_key=True)
        train(fresh, iter(fresh["loader"]), 2)
        return said, fresh["engine"].steps

    for said, steps in on_ranks(2, run):
        assert "the state is that of rank 0, and was given to rank 1 of 2" in said
        assert steps == 2


@pytest.mark.parametrize(("saved", "resumed"), [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_ranks_draws_from_another_key(saved: int, resumed: int, tmp_path: Path) -> None:
    """The last bits of a sum depend on it; what was spent is kept, and a logical batch that was begun is begun again."""
    path = tmp_path / "checkpoint"

    def save(rank: int) -> str:
        run = private(tmp_path, ledger=False)
        train(run, iter(run["loader"]), 3)  # one step and a half
        run["engine"].save_checkpoint(path, module=run["module"], optimizer=run["optimizer"])
        return run["engine"]._key.mark

    def go_on(rank: int) -> tuple[str, int, int, list[torch.Tensor]]:
        run = private(tmp_path, ledger=False)
        parts = {"module": run["module"], "optimizer": run["optimizer"]}
        with pytest.raises(CheckpointError, match="ranks"):
            run["engine"].load_checkpoint(path, **parts)
        run["engine"].load_checkpoint(path, **parts, acknowledge=["ranks"])
        assert not run["optimizer"].total.holds
        train(run, iter(run["loader"]), 2)
        return run["engine"]._key.mark, run["engine"].steps, len(run["engine"].accountant), parameters(run)

    (mark,) = set(on_ranks(saved, save))
    found = on_ranks(resumed, go_on)
    for other, steps, counted, values in found:
        assert other == found[0][0] != mark
        assert steps == counted == 2
        assert all(map(torch.equal, values, found[0][3]))


def test_a_full_disk_at_rank_0_is_told_to_all_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"

    def both(rank: int) -> tuple[str, int]:
        run = private(tmp_path, ledger=False)
        parts = {"module": run["module"], "optimizer": run["optimizer"]}
        batches = iter(run["loader"])
        train(run, batches, 2)
        run["engine"].save_checkpoint(path, **parts)
        before = path.read_bytes()
        written = os.fsync
        os.fsync = full
        try:
            train(run, batches, 2)
            with pytest.raises((CheckpointError, ConfigurationError)) as raised:
                run["engine"].save_checkpoint(path, **parts)
        finally:
            os.fsync = written
        assert path.read_bytes() == before
        train(run, run["loader"], 2)
        return f"{type(raised.value).__name__}: {raised.value}", run["engine"].steps

    (alone, steps), (other, counted) = on_ranks(2, both)
    assert alone.startswith("CheckpointError")
    assert other.startswith("ConfigurationError: rank 0 could not go on")
    assert "No space left" in alone
    assert "No space left" in other
    assert steps == counted == 3


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_ledger_file_that_takes_no_more_stops_every_rank(tmp_path: Path) -> None:
    def both(rank: int) -> str:
        run = private(tmp_path)
        batches = iter(run["loader"])
        train(run, batches, 2)
        before = [p.clone() for p in parameters(run)]
        written = os.fsync
        os.fsync = full
        try:
            with pytest.raises((LedgerError, PrivacyError)) as raised:
                train(run, batches, 2)
        finally:
            os.fsync = written
        assert all(map(torch.equal, parameters(run), before))
        train(run, run["loader"], 2)  # there is room again
        return f"{type(raised.value).__name__}: {raised.value}"

    alone, other = on_ranks(2, both)
    assert alone.startswith("LedgerError")
    assert other.startswith("PrivacyError: rank 0 could not go on")
    assert "No space left" in alone
    assert "No space left" in other
    text = read_ledger(tmp_path / "run.jsonl")
    assert [entry.step for entry in text.entries if entry.kind == "release"] == [1, 3]  # that of step 2 was never used
    assert text.ledger.steps == 3  # the release that could not be written stays counted


def test_a_damaged_file_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(b"nothing")

    def load(rank: int) -> str:
        run = private(tmp_path)
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            run["engine"].load_checkpoint(tmp_path / "checkpoint", module=run["module"], optimizer=run["optimizer"])
        return "refused"

    assert on_ranks(2, load) == ["refused", "refused"]
