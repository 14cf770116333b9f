"""What stands in the place of the tensors that autograd saves is seen, or, where torch does not tell, taken to be there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from single_record import assert_same_gradients
from small_models import TinyGPT, drawn, private, step
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from ghostgrad.clipping.clipper import Clipper
from ghostgrad.recording import modules
from ghostgrad.recording.packing import _find, packs


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
    model, optimizer = private(drawn(TinyGPT), "ghost", 1.0)
    twin, other = private(drawn(TinyGPT), "hooks", 1.0)
    assert_same_gradients(step(model, optimizer), step(twin, other), relative=1e-9)
    assert passes[0] is not told
