"""Activation checkpointing, in both of torch's forms, changes nothing in the step of any clipper."""

from __future__ import annotations

import pytest
import torch
from single_record import assert_same_gradients
from small_models import MODES, WIDTH, Block, TinyGPT, drawn, next_word, private, sentences, step, truth
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from ghostgrad.clipping import Clipper


@pytest.mark.parametrize("share", [False, True], ids=["two blocks", "one block twice"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_blocks_give_the_textbook_step(mode, reentrant, share):
    expected, bound = truth(lambda: TinyGPT(share=share))
    model, optimizer = private(drawn(lambda: TinyGPT(reentrant, share=share)), mode, bound)
    assert_same_gradients(step(model, optimizer), expected, relative=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_single_precision(mode, reentrant):
    expected, bound = truth(TinyGPT, torch.float32)
    model, optimizer = private(drawn(lambda: TinyGPT(reentrant), torch.float32), mode, bound)
    assert_same_gradients(step(model, optimizer), expected, relative=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_dropout_inside_has_the_masks_of_the_forward(mode, reentrant):
    """Without checkpointing the masks are those of the one forward there is, so the two must agree."""
    found = []
    for checkpointing in (None, reentrant):
        torch.manual_seed(5)
        model, optimizer = private(drawn(lambda: TinyGPT(checkpointing, dropout=0.3)), mode, 0.5)  # noqa: B023
        step(model, optimizer)
        found.append(step(model, optimizer, sentences(seed=2)))
    assert_same_gradients(*found, relative=1e-9)


class Encoder(nn.Module):
    """torch's own encoder layers with dropout in the attention, which its rule draws again."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.3, batch_first=True) for _ in range(2)]
        )
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h) if self.reentrant is None else checkpoint(layer, h, use_reentrant=self.reentrant)
        return self.head(h)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
def test_a_rule_that_draws_again_draws_what_the_checkpointed_part_drew(mode, reentrant):
    found = []
    for checkpointing in (None, reentrant):
        torch.manual_seed(5)
        model, optimizer = private(drawn(lambda: Encoder(checkpointing)), mode, 0.5)  # noqa: B023
        step(model, optimizer)
        found.append(step(model, optimizer, sentences(seed=2)))
    assert_same_gradients(*found, relative=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_nested_and_sequential_checkpoints(mode):
    class Nested(TinyGPT):
        def forward(self, ids: Tensor) -> Tensor:
            def both(h: Tensor) -> Tensor:
                return checkpoint_sequential(self.blocks, 2, h, use_reentrant=False)

            h = checkpoint(both, self.words(ids) + self.places(torch.arange(ids.shape[1])), use_reentrant=False)
            return self.head(self.norm(h))

    expected, bound = truth(TinyGPT)
    model, optimizer = private(drawn(Nested), mode, bound)
    assert_same_gradients(step(model, optimizer), expected, relative=1e-9)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_ghost_keeps_norms_and_nothing_else_of_a_checkpointed_block(monkeypatch, reentrant):
    kept: dict[str, bool] = {}
    original = Clipper.measure

    def measure(self, parameter, use, *, complete, held):
        kept[names[parameter]] = not complete
        return original(self, parameter, use, complete=complete, held=held)

    model, optimizer = private(drawn(lambda: TinyGPT(reentrant)), "ghost", 1.0)
    names = {p: name for name, p in model.named_parameters()}
    monkeypatch.setattr(Clipper, "measure", measure)
    step(model, optimizer)
    inside = {name for name, _ in model.named_parameters() if name.startswith("blocks")}
    assert {name for name, held in kept.items() if held} & inside == set()


def test_several_backwards_before_a_step():
    expected, bound = truth(TinyGPT)
    model, optimizer = private(drawn(lambda: TinyGPT(True)), "ghost", bound)
    for part in (sentences()[:2], sentences()[2:]):
        next_word(model, part).mean().backward()
    optimizer.step()
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, expected, relative=1e-9)


def test_a_block_can_be_the_model():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool | None) -> None:
            super().__init__()
            self.stem, self.block, self.reentrant = nn.Linear(3, WIDTH), Block(), reentrant

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return self.block(h) if self.reentrant is None else checkpoint(self.block, h, use_reentrant=self.reentrant)

    found = []
    for reentrant in (None, True, False):
        model, optimizer = private(drawn(lambda: Checkpointed(reentrant)), "bk", 0.5)  # noqa: B023 (called at once)
        x = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        model(x).square().mean((1, 2)).mean().backward()
        optimizer.step()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_gradients(found[1], found[0], relative=1e-9)
    assert_same_gradients(found[2], found[0], relative=1e-9)
