"""Batches of no records, whatever the collate function returns."""

from __future__ import annotations

import random
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, default_collate

from ghostgrad.errors import ConfigurationError
from ghostgrad.keys import RunKey
from ghostgrad.sampling import DPDataLoader

Pair = namedtuple("Pair", ["x", "y"])
RARE = 1e-9


class Encoding(UserDict):  # type: ignore[type-arg]
    """As HF's BatchEncoding: a mapping that also answers to attributes."""

    def __init__(self, data: dict[str, Any], kind: str = "pt") -> None:
        super().__init__(data)
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError as error:
            raise AttributeError(name) from error


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: list[str]
    temperature: float = 0.5


class Plain:
    def __init__(self, rows: list[Any]) -> None:
        self.x = torch.stack([row[0] for row in rows])
        self.note = "kept"


class Records:
    def __init__(self, records: list[Any]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index]


def empty_of(record: Any, collate: Callable[[list[Any]], Any] | None = None) -> Any:
    loader = DPDataLoader(Records([record] * 10), sample_rate=RARE, collate_fn=collate, drop_last=True)
    batch = next(iter(loader))
    assert (loader.feed.records, loader.feed.last, loader.feed.delivered) == (0, True, 1)
    return batch


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_tensors_keep_dtype_and_record_shape(dtype: torch.dtype) -> None:
    x, y = empty_of((torch.ones(3, 4, dtype=dtype), 1))
    assert (x.shape, x.dtype) == ((0, 3, 4), dtype)
    assert (y.shape, y.dtype) == ((0,), torch.int64)


def test_default_collate_of_dicts_lists_strings_and_numbers() -> None:
    record = {"x": torch.ones(2), "pair": [torch.ones(3), (1.0, "a")], "name": "b", "deep": {"z": np.ones(2)}}
    batch = empty_of(record)
    reference = default_collate([record, record])
    assert batch.keys() == reference.keys()
    assert batch["x"].shape == (0, 2)
    assert batch["pair"][0].shape == (0, 3)
    assert batch["pair"][1][0].shape == (0,)
    assert list(batch["pair"][1][1]) == []
    assert list(batch["name"]) == []
    assert batch["deep"]["z"].shape == (0, 2)


def test_pairs_are_not_taken_for_rows() -> None:
    # Two tensors of two features: everything has length 2, only the rows grow with the records.
    batch = empty_of((torch.ones(2), torch.ones(2, 2)))
    assert [tuple(entry.shape) for entry in batch] == [(0, 2), (0, 2, 2)]


def test_constants_of_length_two_stay() -> None:
    weights = torch.tensor([0.3, 0.7])
    batch = empty_of(torch.ones(5), lambda rows: {"x": torch.stack(rows), "weights": weights, "names": ["a", "b"]})
    assert batch["x"].shape == (0, 5)
    assert torch.equal(batch["weights"], weights)
    assert batch["names"] == ["a", "b"]


def test_named_tuples_ordered_dicts_and_encodings_keep_their_types() -> None:
    pair = empty_of(Pair(torch.ones(2), 3))
    assert isinstance(pair, Pair)
    assert (pair.x.shape, pair.y.shape) == ((0, 2), (0,))
    ordered = empty_of(torch.ones(2), lambda rows: OrderedDict(b=torch.stack(rows), a=1))
    assert isinstance(ordered, OrderedDict)
    assert list(ordered) == ["b", "a"]
    encoding = empty_of(torch.ones(2), lambda rows: Encoding({"input_ids": torch.stack(rows)}, kind="np"))
    assert isinstance(encoding, Encoding)
    assert (encoding.input_ids.shape, encoding["input_ids"].shape, encoding.kind) == ((0, 2), (0, 2), "np")
    proxy = empty_of(torch.ones(2), lambda rows: MappingProxyType({"x": torch.stack(rows)}))
    assert isinstance(proxy, Mapping)
    assert proxy["x"].shape == (0, 2)


def test_dataclasses_and_plain_objects() -> None:
    frozen = empty_of(torch.ones(2), lambda rows: Frozen(torch.stack(rows), ["text"] * len(rows)))
    assert (frozen.x.shape, frozen.y, frozen.temperature) == ((0, 2), [], 0.5)
    plain = empty_of((torch.ones(2),), Plain)
    assert isinstance(plain, Plain)
    assert (plain.x.shape, plain.note) == ((0, 2), "kept")


def test_lists_of_records_numpy_arrays_and_mappings_by_record() -> None:
    assert empty_of(torch.ones(2), list) == []
    array = empty_of(1.0, lambda rows: np.asarray(rows))
    assert (array.shape, array.dtype) == ((0,), np.float64)
    by_record = empty_of(torch.ones(2), lambda rows: {"x": torch.stack(rows), "by": dict(enumerate(rows))})
    assert by_record["x"].shape == (0, 2)


def test_second_dimension_batches_are_cut_there() -> None:
    batch = empty_of(torch.ones(7, 3), lambda rows: torch.stack(rows, dim=1))
    assert batch.shape == (7, 0, 3)


def test_batches_without_tensors() -> None:
    assert empty_of("text", lambda rows: {"texts": rows}) == {"texts": []}


def test_no_value_of_a_record_is_left() -> None:
    batch = empty_of((torch.full((1000,), 7.0), "secret"))
    assert batch[0].untyped_storage().nbytes() == 0
    assert "secret" not in repr(batch)


def test_each_empty_batch_is_a_new_one() -> None:
    data = Records([{"x": torch.ones(2), "name": "a"}] * 4)
    loader = DPDataLoader(data, sample_rate=RARE, accumulation_steps=3)
    passing = iter(loader)
    first = next(passing)
    first["name"].append("mine")
    first["more"] = 1
    second = next(passing)
    assert list(second) == ["x", "name"]
    assert second["name"] == []


def test_collate_that_takes_records_apart_is_served_fresh_records() -> None:
    class Fresh(Records):
        def __getitem__(self, index: int) -> Any:
            return dict(self.records[index])

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        labels = [row.pop("label") for row in rows]
        return {"x": torch.stack([row["x"] for row in rows]), "label": torch.tensor(labels)}

    data = Fresh([{"x": torch.ones(2), "label": 1}] * 4)
    batch = next(iter(DPDataLoader(data, sample_rate=RARE, collate_fn=collate)))
    assert (batch["x"].shape, batch["label"].shape) == ((0, 2), (0,))


def test_getitems_is_used_and_never_with_nothing() -> None:
    class Table(Records):
        def __getitem__(self, index: int) -> Any:
            raise AssertionError("one by one")

        def __getitems__(self, indices: list[int]) -> list[Any]:
            assert indices
            return [self.records[index] for index in indices]

    batch = next(iter(DPDataLoader(Table([torch.ones(2)] * 4), sample_rate=RARE)))
    assert batch.shape == (0, 2)


def test_only_a_servable_record_is_looked_at() -> None:
    class Forbidden(Records):
        def __getitem__(self, index: int) -> Any:
            assert index in (7, 9)
            return super().__getitem__(index)

    data = Forbidden([torch.ones(2)] * 10)
    user = DataLoader(data, batch_size=1, sampler=SubsetRandomSampler([7, 9]))  # type: ignore[arg-type]
    loader = DPDataLoader.from_data_loader(user, sample_rate=0.01, key=RunKey.from_seed(0))
    assert any(batch.shape[0] == 0 for batch in loader)


def test_template_is_made_when_needed_and_leaves_random_states_alone() -> None:
    fetched: list[int] = []

    class Augmenting(Records):
        def __getitem__(self, index: int) -> Any:
            fetched.append(index)
            return torch.rand(2) + random.random() + float(np.random.rand())

    loader = DPDataLoader(Augmenting([0] * 4), sample_rate=RARE)  # type: ignore[arg-type]
    assert fetched == []
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    passing = iter(loader)
    after_start = torch.random.get_rng_state()
    states = random.getstate(), np.random.get_state()[1].tolist()
    next(passing)
    assert len(fetched) == 5
    assert torch.equal(torch.random.get_rng_state(), after_start)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    next(passing)
    assert len(fetched) == 5


@pytest.mark.parametrize("k", [1, 3])
def test_empty_batches_come_first_in_the_middle_and_last(k: int) -> None:
    data = TensorDataset(torch.arange(30))
    places = set()
    for seed in range(20):
        loader = DPDataLoader(
            data, sample_rate=0.05 * k, drop_last=True, key=RunKey.from_seed(seed), accumulation_steps=k
        )
        parts = [
            part for step in range(loader.steps_per_epoch) for part in loader.batch_sampler.draw(epoch=0, step=step)
        ]  # type: ignore[union-attr]
        batches = [batch[0].tolist() for batch in loader]
        assert batches == parts
        if not batches[0]:
            places.add("first")
        if not batches[-1]:
            places.add("last")
        if any(not batch for batch in batches[1:-1]):
            places.add("middle")
    assert places == {"first", "middle", "last"}


@pytest.mark.parametrize(
    "collate",
    [lambda rows: torch.zeros(5), lambda rows: {"x": torch.cat(rows).sum()}],
    ids=["constant", "scalar"],
)
def test_a_structure_without_rows_is_refused(collate: Callable[[list[Any]], Any]) -> None:
    with pytest.raises(ConfigurationError, match="empty batch"):
        empty_of(torch.ones(2), collate)


def test_a_structure_that_changes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="same structure"):
        empty_of(torch.ones(2), lambda rows: torch.stack(rows) if len(rows) == 2 else rows)
