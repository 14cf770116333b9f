"""Lengths of padded records as a tensor or as a list of numbers, data with the batch or with time first, empty batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ghostgrad import PrivacyEngine

MODES = ["hooks", "ghost", "bk", "functorch"]
LENGTHS = [3, 5, 1, 7, 4]
C = 0.3


class Encoder(nn.Module):
    """A layer on each time, then a packed recurrent one; the mean over each record's own times goes into the head."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.each = nn.Linear(2, 4)
        self.rnn = nn.GRU(4, 4, batch_first=batch_first, bidirectional=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Any) -> Tensor:
        h = torch.tanh(self.each(x))
        packed = pack_padded_sequence(h, lengths, batch_first=self.batch_first, enforce_sorted=False)
        out, steps = pad_packed_sequence(self.rnn(packed)[0], batch_first=self.batch_first)
        return self.head(out.sum(1 if self.batch_first else 0) / steps.unsqueeze(1))  # type: ignore[no-any-return]


def batch(lengths: list[int], *, batch_first: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(LENGTHS), max(LENGTHS), 2, generator=generator, dtype=torch.float64)[: len(lengths)]
    for record, length in zip(x, lengths, strict=True):
        record[length:] = 0
    labels = torch.arange(len(lengths)) % 3
    return (x if batch_first else x.transpose(0, 1)), labels


def textbook(model: nn.Module, x: Tensor, labels: Tensor, *, batch_first: bool) -> Tensor:
    total = torch.zeros(())
    for i, length in enumerate(LENGTHS):
        one = x[i : i + 1] if batch_first else x[:, i : i + 1]
        loss = F.cross_entropy(model(one, torch.tensor([length])), labels[i : i + 1])
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        total = total + grad * min(1.0, C / float(grad.norm()))
    return total


def released(model: nn.Module, mode: str, batch_first: bool, *parts: tuple[Tensor, Any, Tensor]) -> Tensor:
    model = copy.deepcopy(model)
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=1.0, noise_multiplier=0.0, max_grad_norm=C, grad_sample_mode=mode, batch_first=batch_first,
    )  # fmt: skip
    for x, lengths, labels in parts:
        F.cross_entropy(model(x, lengths), labels).backward()
    optimizer.step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize("mode", MODES)
def test_the_step_is_that_of_the_loop_over_records(mode: str, batch_first: bool, as_list: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(batch_first=batch_first).double()
    x, labels = batch(LENGTHS, batch_first=batch_first)
    lengths = LENGTHS if as_list else torch.tensor(LENGTHS)
    truth = textbook(model, x, labels, batch_first=batch_first)
    assert (released(model, mode, batch_first, (x, lengths, labels)) - truth).norm() <= 1e-9 * truth.norm()


@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_may_come_first_or_last(mode: str, batch_first: bool, as_list: bool) -> None:
    """Packing takes no length of 0, which is what a row of zeros in the place of no records would have."""
    torch.manual_seed(0)
    model = Encoder(batch_first=batch_first).double()
    x, labels = batch(LENGTHS, batch_first=batch_first)
    full = (x, LENGTHS if as_list else torch.tensor(LENGTHS), labels)
    empty = (x[:0] if batch_first else x[:, :0], [] if as_list else torch.tensor([], dtype=torch.long), labels[:0])
    before = released(model, mode, batch_first, full)
    assert not released(model, mode, batch_first, empty).any()
    torch.testing.assert_close(released(model, mode, batch_first, empty, full), before, rtol=0, atol=0)
    torch.testing.assert_close(released(model, mode, batch_first, full, empty), before, rtol=0, atol=0)


@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
def test_a_check_cuts_lengths_with_their_records(as_list: bool) -> None:
    torch.manual_seed(0)
    x, labels = batch(LENGTHS, batch_first=True)
    report = PrivacyEngine().check(
        (x, LENGTHS if as_list else torch.tensor(LENGTHS), labels),
        lambda module, parts: F.cross_entropy(module(parts[0], parts[1]), parts[2]),
        module=Encoder(batch_first=True).double(),
        verbose=False,
    )
    assert report.holds
