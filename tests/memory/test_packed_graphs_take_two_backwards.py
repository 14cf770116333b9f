"""What stands in the place of the tensors that autograd saves is seen, or, where torch does not tell, taken to be there."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from single_record import assert_same_gradients
from small_models import drawn, private
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from torch_tells import what_is_packed

from ghostgrad.clipping.clipper import Clipper
from ghostgrad.recording import modules
from ghostgrad.recording.packing import _find, packs


@what_is_packed
def test_checkpoints_and_off_loading_are_seen() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(packs())
        return x.exp()

    x = torch.ones(1, requires_grad=True)
    look(x)
    checkpoint(look, x, use_reentrant=False)
    with save_on_cpu():
        look(x)
    assert seen == [False, True, True]


def test_earlier_releases_of_torch_are_asked_in_their_way() -> None:
    hooks: list[Any] = [None]
    assert _find(None)()
    asked = _find(lambda: hooks[0])
    assert not asked()
    hooks[0] = (id, id)
    assert asked()


def assert_ghost_is_exact(build: Callable[[], nn.Module]) -> None:
    x, found = torch.randn(3, 12, dtype=torch.float64), []
    for mode in ("ghost", "hooks"):
        model, optimizer = private(drawn(build), mode, 1.0)
        model(x).square().mean(1).mean().backward()
        optimizer.step()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_gradients(found[0], found[1], relative=1e-9)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 64), nn.GELU(), nn.Linear(64, 12))


@what_is_packed
@pytest.mark.parametrize("told", [True, False])
def test_the_step_is_the_same_where_torch_does_not_tell(monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    if not told:
        monkeypatch.setattr(modules, "packs", _find(None))
    passes: list[bool] = []
    begin = Clipper.begin

    def noted(clipper: Clipper, n: int, *, packed: bool) -> bool:
        passes.append(begin(clipper, n, packed=packed))
        return passes[-1]

    monkeypatch.setattr(Clipper, "begin", noted)
    assert_ghost_is_exact(wide)
    assert passes[0] is not told


class Energy(nn.Module):
    """Takes a derivative inside: torch lets no hooks on what is saved near it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 6), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda x: x.sin().sum())(x)
        return self.last(x * slope) + self.first(x).sum(1, keepdim=True)  # type: ignore[no-any-return]


def test_a_model_that_cannot_be_weighed_is_trained() -> None:
    assert_ghost_is_exact(Energy)


def test_nothing_of_the_batch_that_was_weighed_stays() -> None:
    """An operation that saves its output would hold itself."""
    seen: list[weakref.ref[Tensor]] = []
    model, _ = private(nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 2)).double(), "ghost", 1.0)
    model[1].register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    model(torch.randn(5, 12, dtype=torch.float64)).square().mean(1).mean().backward()
    gc.collect()
    assert seen
    assert all(ref() is None for ref in seen)
