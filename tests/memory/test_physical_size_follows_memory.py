"""`max_physical_batch_size="auto"`: pieces grow to what fits, and the steps stay those of whole batches."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, ConfigurationError, PrivacyEngine
from ghostgrad.sampling import _sizes, loader
from ghostgrad.sampling._sizes import GrowingSize, ProcessMemory

RECORDS = 96
MIB = 1 << 20


class Told:
    """Memory as it would be: so much for each record of the piece, and once more for the first."""

    def __init__(self, of_record: int, free: int = 1 << 40) -> None:
        self.of_record, self._free = of_record, free
        self.pieces: list[int] = []

    def free(self) -> int:
        return self._free

    def start(self) -> None:
        pass

    def peak(self) -> int:
        return self.of_record * self.pieces[-1] * (2 if len(self.pieces) == 1 else 1)


def train(size: Any, told: Told | None = None, *, passes: int = 1, **options: Any) -> tuple[list[int], Tensor]:
    """The sizes of the pieces, and the parameters at the end."""
    torch.manual_seed(0)
    x, y = torch.randn(RECORDS, 4, dtype=torch.float64), torch.randint(3, (RECORDS,))
    module = nn.Linear(4, 3).double()
    module, optimizer, batches = PrivacyEngine(seed=0).make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), noise_multiplier=1.0,
        max_grad_norm=0.1, data_loader=DataLoader(TensorDataset(x, y), batch_size=48, **options),
    )  # fmt: skip
    pieces = [] if told is None else told.pieces
    for _ in range(passes):
        manager = BatchMemoryManager(
            data_loader=batches, max_physical_batch_size=size, optimizer=optimizer,
            max_memory=10 * MIB if size == "auto" else None,
        )  # fmt: skip
        with manager as physical:
            for inputs, labels in physical:
                pieces.append(len(inputs))
                F.cross_entropy(module(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return pieces, torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told(MIB)
    monkeypatch.setattr("ghostgrad.memory.meter_of", lambda device: found)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_grow_to_what_fits_and_the_steps_are_those_of_whole_batches(told: Told, workers: int) -> None:
    pieces, parameters = train("auto", told, passes=3, num_workers=workers)
    _, whole = train(1000, passes=3)
    torch.testing.assert_close(parameters, whole, rtol=1e-9, atol=1e-9)
    assert pieces[:3] == [2, 4, 8] if workers == 0 else pieces[0] == 2
    assert max(pieces) == 9  # nine tenths of ten records
    assert sum(size == 9 for size in pieces) > len(pieces) / 2  # what was learned is kept from pass to pass


def test_they_shrink_when_records_turn_out_larger(told: Told) -> None:
    size = GrowingSize(10 * MIB, told)
    for of_record, expected in ((MIB, [4, 8, 9, 9]), (3 * MIB, [3, 3])):
        told.of_record = of_record
        for after in expected:
            told.pieces.append(size())
            with size.of_piece(size()):
                pass
            assert size() == after


def test_the_end_of_a_batch_teaches_nothing(told: Told) -> None:
    size = GrowingSize(10 * MIB, told)
    told.pieces.append(1)
    with size.of_piece(1):
        pass
    assert size() == 2


def test_a_budget_below_one_record_is_refused(told: Told) -> None:
    told.of_record = 11 * MIB
    with pytest.raises(ConfigurationError, match=r"one record needs 11\.0 MiB, and max_memory is 10\.0 MiB"):
        train("auto", told)


def test_without_a_budget_most_of_what_is_free_is_used(told: Told) -> None:
    told._free = 100 * MIB
    size = GrowingSize(None, told)
    for _ in range(8):
        told.pieces.append(size())
        with size.of_piece(size()):
            pass
    assert size() == 72


@pytest.mark.parametrize(
    ("size", "memory"), [("atuo", None), (0, None), ("auto", 0), ("auto", -1), ("auto", 1.5), (8, 100), (2.5, None)]
)
def test_bad_sizes_are_refused(size: Any, memory: Any) -> None:
    module = nn.Linear(2, 2)
    data = DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=4)
    module, optimizer, batches = PrivacyEngine().make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=data, noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    with pytest.raises(ConfigurationError):
        BatchMemoryManager(data_loader=batches, max_physical_batch_size=size, optimizer=optimizer, max_memory=memory)


def test_the_kernel_tells_what_a_piece_held_at_most() -> None:
    """In a process of its own: one that has idle memory is given that first, and needs no more."""
    script = """
import torch
from ghostgrad.sampling._sizes import ProcessMemory
meter = ProcessMemory()
meter.start()
held = torch.ones(64 << 18)
del held
large = meter.peak()
meter.start()
print(meter.free(), large, meter.peak())
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    free, large, small = map(int, told.split())
    assert free > 0
    assert small < 10 * MIB < 60 * MIB < large < 100 * MIB


def test_a_system_that_does_not_tell_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(_sizes, "_PEAK", tmp_path / "missing" / "file")
    with pytest.raises(ConfigurationError, match="Give a number"):
        ProcessMemory()


def test_ranks_need_a_number() -> None:
    data = DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=4)
    private = loader.DPDataLoader.from_data_loader(data)
    private._plan = private._plan.shared(0, 2)
    with pytest.raises(ConfigurationError, match="as a number"):
        private.physical(GrowingSize(None, Told(1)))
