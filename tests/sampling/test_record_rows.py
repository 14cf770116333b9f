"""Batches whose records cannot be told apart are refused, without saying how many were drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from ghostgrad.errors import ConfigurationError
from ghostgrad.sampling import DPDataLoader

ROWS = [torch.full((3, 4), float(value)) for value in range(12)]


def batches(collate: Callable[[list[Any]], Any]) -> list[Any]:
    user = DataLoader(ROWS, batch_size=5, collate_fn=collate)  # type: ignore[arg-type]
    return list(DPDataLoader.from_data_loader(user, poisson_sampling=False))


REFUSED = {
    "packed": torch.cat,
    "merged": lambda rows: torch.stack(rows).mean(0),
    "one dropped": lambda rows: torch.stack(rows[1:]),
    "packed with offsets": lambda rows: {"tokens": torch.cat(rows), "offsets": torch.arange(len(rows) + 1) * 3},
    "one added": lambda rows: [torch.stack([*rows, rows[0]])],
    "rows in the third dimension": lambda rows: torch.stack(rows, dim=2),
}


@pytest.mark.parametrize("case", REFUSED)
def test_merged_records_are_refused(case: str) -> None:
    with pytest.raises(ConfigurationError, match="one row for each record") as caught:
        batches(REFUSED[case])
    assert not any(character.isdigit() for character in str(caught.value))


ACCEPTED = {
    "default": default_collate,
    "second dimension": lambda rows: torch.stack(rows, dim=1),
    "list of tensors": list,
    "tuple of lists": lambda rows: (rows, "meta"),
    "no tensors": lambda rows: {"total": len(rows), "texts": "joined"},
    "with constants": lambda rows: {"weights": torch.ones(7), "deep": {"x": [torch.stack(rows)]}},
    "array": lambda rows: {"x": torch.stack(rows).numpy()},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_one_entry_a_record_is_accepted(case: str) -> None:
    assert len(batches(ACCEPTED[case])) == 3


def test_batches_that_refer_to_themselves_are_walked_once() -> None:
    def collate(rows: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = {"x": torch.stack(rows)}
        return {"self": batch, "again": batch}

    assert len(batches(collate)) == 3

    def circle(rows: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = {"packed": torch.cat(rows)}
        batch["self"] = batch
        return batch

    with pytest.raises(ConfigurationError):
        batches(circle)
