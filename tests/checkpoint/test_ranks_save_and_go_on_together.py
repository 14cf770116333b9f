"""On several ranks rank 0 writes; all of them go on from one file as the uninterrupted training would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import PrivacyEngine
from ghostgrad.errors import CheckpointError
from ghostgrad.ledger import read_ledger


def private(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 3), torch.arange(24) % 2)
    module = nn.Linear(3, 2)
    engine = PrivacyEngine(ledger=folder / "run.jsonl")
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.Adam(module.parameters()), data_loader=DataLoader(data, batch_size=6),
        noise_multiplier=1.0, max_grad_norm=1.0, accumulation_steps=2,
    )  # fmt: skip
    return {"engine": engine, "module": module, "optimizer": optimizer, "loader": loader}


def train(run: dict[str, Any], batches: Any, count: int) -> None:
    for _, (x, y) in zip(range(count), batches, strict=False):
        nn.functional.cross_entropy(run["module"](x), y, reduction="sum").div(max(1, len(x))).backward()
        run["optimizer"].step()
        run["optimizer"].zero_grad()


def test_two_ranks_go_on_from_the_middle_of_a_pass(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"

    def whole(rank: int) -> Any:
        run = private(tmp_path)
        parts = {"module": run["module"], "optimizer": run["optimizer"]}
        batches = iter(run["loader"])
        train(run, batches, 1)
        with pytest.raises(CheckpointError, match="middle of a logical batch"):
            run["engine"].save_checkpoint(path, **parts)
        train(run, batches, 1)
        run["engine"].save_checkpoint(path, **parts)
        train(run, batches, 2)
        return [p.detach() for p in run["module"].parameters()], run["engine"].accountant.history

    def resumed(rank: int) -> Any:
        run = private(tmp_path)
        run["engine"].load_checkpoint(path, module=run["module"], optimizer=run["optimizer"])
        train(run, iter(run["loader"]), 2)
        return [p.detach() for p in run["module"].parameters()], run["engine"].accountant.history

    first = on_ranks(2, whole)
    second = on_ranks(2, resumed)
    for (expected, spent), (found, counted) in zip(first, second, strict=True):
        assert all(map(torch.equal, expected, found))
        assert spent == counted
    assert read_ledger(tmp_path / "run.jsonl").ledger.steps == 2


def test_a_damaged_file_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(b"nothing")

    def load(rank: int) -> str:
        run = private(tmp_path)
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            run["engine"].load_checkpoint(tmp_path / "checkpoint", module=run["module"], optimizer=run["optimizer"])
        return "refused"

    assert on_ranks(2, load) == ["refused", "refused"]
