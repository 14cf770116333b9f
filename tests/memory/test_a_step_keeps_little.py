"""Live bytes of tensors: what a private step holds at most beside the plain one, and what is said before it is too much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch_tells import what_is_packed

from ghostgrad import PrivacyEngine
from ghostgrad.clipping import clipper

N, TIME, WIDTH, WORDS = 8, 64, 64, 200


class Transformer(nn.Module):
    def __init__(self, layers: int = 3, checkpointed: bool = False, words: int = WORDS) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        torch.manual_seed(0)
        self.words = nn.Embedding(words, WIDTH)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, F.gelu, batch_first=True) for _ in range(layers)]
        )
        self.head = nn.Linear(WIDTH, words)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids)
        for layer in self.layers:
            h = checkpoint(layer, h, use_reentrant=False) if self.checkpointed else layer(h)
        return self.head(h)


def peak(mode: str | None, n: int = N, *, checkpointed: bool = False, words: int = WORDS, **options: Any) -> int:
    """The most bytes of tensors that are alive during a step, the parameters among them."""
    model: nn.Module = Transformer(checkpointed=checkpointed, words=words)
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if mode is not None:
        model, optimizer, _ = PrivacyEngine(seed=0).make_private(
            module=model, optimizer=optimizer, data_loader=None, sample_rate=0.5, expected_batch_size=float(n),
            noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode=mode, **options,
        )  # fmt: skip

    def step() -> None:
        ids = torch.randint(words, (n, TIME))
        F.cross_entropy(model(ids).transpose(1, 2), ids, reduction="none").mean(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    changes: list[tuple[int, int]] = []
    waiting = list(recorded.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    alive = most = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        alive += change
        most = max(most, alive)
    return size + most


@pytest.fixture(scope="module")
def plain() -> int:
    return peak(None)


def test_ghost_keeps_a_fifth_more_than_the_plain_step(plain: int) -> None:
    assert peak("ghost") <= 1.2 * plain


@pytest.mark.parametrize("mode", ["bk", "ghost"])
def test_logits_of_many_words_live_as_long_as_in_the_plain_step(mode: str) -> None:
    assert peak(mode, n=1, words=20_000) <= 1.05 * peak(None, n=1, words=20_000)


def test_ghost_does_not_undo_checkpoints() -> None:
    plain = peak(None, checkpointed=True)
    assert peak("ghost", checkpointed=True) <= 1.3 * plain
    assert peak("bk", checkpointed=True) > 1.5 * plain


@what_is_packed
@pytest.mark.parametrize(("records", "kept"), [(4, "inputs and output gradients"), (2000, "norms")])
def test_ghost_passes_twice_where_output_gradients_would_be_more_than_the_graph(records: int, kept: str) -> None:
    """A rectifier holds what the next layer reads; beside large weights a small batch does not matter."""
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())])
    engine = PrivacyEngine(seed=0)
    model, _, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=records, noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode="ghost",
    )  # fmt: skip
    model(torch.randn(records, WIDTH)).square().mean(1).mean().backward()
    assert all(kept in plan.kept for plan in engine.explain().modules)


def test_a_second_backward_would_not_save_what_its_graph_takes() -> None:
    """Why ghost has none where the graph holds its tensors as they are."""
    assert peak("ghost") <= 1.02 * peak("bk", max_memory=0)


def test_one_pass_keeps_half_more(plain: int) -> None:
    assert peak("bk") <= 1.5 * plain


def test_a_budget_of_nothing_is_as_small_as_two_passes(plain: int) -> None:
    assert peak("bk", max_memory=0) <= 1.2 * plain


def test_per_sample_gradients_are_what_hooks_cost(plain: int) -> None:
    """The measure would see it."""
    parameters = sum(p.numel() for p in Transformer().parameters())
    assert peak("hooks") >= 4 * (N + 1) * parameters


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_per_sample_gradients_beyond_the_free_memory_are_foretold(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipper, "_WORTH_A_LOOK", 0)
    monkeypatch.setattr(clipper, "free_memory", lambda device: 1 << 20)
    with pytest.warns(UserWarning, match=rf"'{mode}' keeps the gradient of every record: 8 records x .*Use 'bk'"):
        peak(mode)


def test_where_there_is_room_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipper, "_WORTH_A_LOOK", 0)
    peak("hooks")
