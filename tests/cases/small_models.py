"""A GPT-like toy, its records, and one private step on them, for the tests of settings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from single_record import Gradients, bound_that_clips_some, expected_gradient, gradients_of_each_record
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghostgrad import PrivacyEngine

MODES = ["hooks", "functorch", "ghost", "bk"]
RECORDS, WORDS, TIME, WIDTH = 5, 11, 6, 8


class Block(nn.Module):
    """Attention and MLP with layer norms and dropout, as in GPT-2."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return h + self.drop(self.down(F.gelu(self.up(self.norm2(h)))))


class TinyGPT(nn.Module):
    """Token and position embeddings, two blocks (checkpointed or not), a tied head.

    Args:
        reentrant: None for no checkpointing, else torch's ``use_reentrant``.
        share: whether both blocks are the same module.
    """

    def __init__(self, reentrant: bool | None = None, dropout: float = 0.0, share: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(TIME, WIDTH)
        first = Block(dropout)
        self.blocks = nn.ModuleList([first, first if share else Block(dropout)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            h = block(h) if self.reentrant is None else checkpoint(block, h, use_reentrant=self.reentrant)
        return self.head(self.norm(h))


def drawn(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with weights that depend on nothing but the order of its parameters."""
    model = build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def sentences(n: int = RECORDS, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (n, TIME), generator=torch.Generator().manual_seed(seed))


def next_word(model: nn.Module, ids: Tensor) -> Tensor:
    """Each record's mean loss over its positions, [n]."""
    logits = model(ids)[:, :-1].float() if next(model.parameters()).dtype.itemsize < 4 else model(ids)[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def truth(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[Gradients, float]:
    """The textbook's step on the records, and its clip bound."""
    each = gradients_of_each_record(drawn(build, dtype), next_word, [sentences()])
    bound = bound_that_clips_some(each)
    return expected_gradient(each, bound, expected_batch_size=RECORDS), bound


def private(
    model: nn.Module, mode: str, bound: float, *, noise_multiplier: float = 0.0, **options: Any
) -> tuple[nn.Module, Any]:
    """The model and its private optimizer; batches are given by hand."""
    options = {"lr": 0.1, "sample_rate": 0.5, "expected_batch_size": RECORDS, **options}
    sgd = torch.optim.SGD(model.parameters(), lr=options.pop("lr"))
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=sgd, data_loader=None, noise_multiplier=noise_multiplier, max_grad_norm=bound,
        grad_sample_mode=mode, **options,
    )  # fmt: skip
    return model, optimizer


def step(
    model: nn.Module, optimizer: Any, ids: Tensor | None = None, context: AbstractContextManager[Any] | None = None
) -> Gradients:
    """One step, and the gradient it released."""
    with context or nullcontext():
        loss = next_word(model, sentences() if ids is None else ids).mean()
    loss.backward()
    optimizer.step()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    return found
