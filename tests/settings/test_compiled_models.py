"""`torch.compile` before and after `make_private`: the same step, and nothing is compiled again for other batch sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from single_record import assert_same_gradients, gradients_of_each_record
from small_models import MODES, TinyGPT, drawn, private, sentences, step, truth
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

POISSON_SIZES = [3, 7, 2, 9, 4, 0, 1, 8, 6]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_and_private(when: str, model: nn.Module, mode: str, bound: float, backend: object) -> tuple:
    if when == "before":
        return private(torch.compile(model, backend=backend), mode, bound)
    if when == "in place":
        model.compile(backend=backend)
    if when == "parts":
        for block in model.blocks:
            block.compile(backend=backend)
    model, optimizer = private(model, mode, bound)
    return (torch.compile(model, backend=backend) if when == "after" else model), optimizer


@pytest.mark.parametrize("when", ["before", "after", "in place", "parts"])
@pytest.mark.parametrize("mode", MODES)
def test_the_step_is_the_textbook_step_and_no_batch_size_is_compiled(mode, when):
    expected, bound = truth(TinyGPT)
    counter = CompileCounter()
    model, optimizer = compiled_and_private(when, drawn(TinyGPT), mode, bound, counter)
    found = {name.removeprefix("_orig_mod."): grad for name, grad in step(model, optimizer).items()}
    assert_same_gradients(found, expected, relative=1e-9)
    before = counter.frame_count
    for size in POISSON_SIZES:
        step(model, optimizer, sentences(size, seed=size))
    assert counter.frame_count == before
    assert not torch._dynamo.config.disable, "compiling goes on elsewhere"


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # the tracer imports it
@pytest.mark.parametrize("when", ["before", "after", "in place", "parts"])
@pytest.mark.parametrize("mode", ["ghost", "bk"])
def test_a_backend_that_traces_the_backward_too_gives_the_same(mode, when):
    """Its backward frees what a second pass would need, and runs in eval mode as compiled."""
    expected, bound = truth(TinyGPT)
    model, optimizer = compiled_and_private(when, drawn(TinyGPT), mode, bound, "aot_eager")
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            model(sentences(4))
        model.train()
        found = {name.removeprefix("_orig_mod."): grad for name, grad in step(model, optimizer).items()}
        assert_same_gradients(found, expected, relative=1e-9)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_in_eval_mode_gives_the_same(when):
    model, optimizer = compiled_and_private(when, drawn(TinyGPT), "bk", 1.0, "eager")
    step(model, optimizer)
    model.eval()
    with torch.no_grad():
        compiled = model(sentences())
    twin = TinyGPT().double().eval()
    twin.load_state_dict({name.removeprefix("_orig_mod."): p for name, p in model.state_dict().items()})
    torch.testing.assert_close(compiled, twin(sentences()))


class ConvNet(nn.Module):
    """Conv2d + ReLU + MaxPool2d: compiled per-sample gradients of this were seen to be exactly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 3 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # Inductor imports it
@pytest.mark.parametrize("when", ["before", "after", "in place"])
@pytest.mark.parametrize("mode", MODES)
def test_convolution_and_pooling_keep_their_gradients(mode, when):
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum(1)

    x = torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each = gradients_of_each_record(drawn(ConvNet), losses, [x])
    expected = {name: sum(grads[name] for grads in each) / 5 for name in each[0]}
    model, optimizer = compiled_and_private(when, drawn(ConvNet), mode, 1e6, "inductor")
    losses(model, x).mean().backward()
    optimizer.step()
    found = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}
    assert found["conv.weight"].norm() > 0
    assert_same_gradients(found, expected, relative=1e-9)
