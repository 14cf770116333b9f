"""Under a GradScaler the step is that of the unscaled loss, is never skipped, and the scale learns nothing of the records."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from single_record import assert_same_gradients, expected_gradient, gradients_of_each_record
from small_models import MODES, RECORDS, TinyGPT, drawn, next_word, private, sentences, truth
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, PrivacyEngine, PrivacyError


def scaled_step(model, optimizer, scaler, loss, *, unscale=False):
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
    scaler.step(optimizer)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    scaler.update()
    optimizer.zero_grad()
    return found


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scale", [1000.0, 65536.0])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", MODES)
def test_the_step_is_that_of_the_loss_before_it_was_scaled(mode, loss_reduction, scale, unscale):
    each = gradients_of_each_record(drawn(TinyGPT), next_word, [sentences()])
    _, bound = truth(TinyGPT)
    expected = expected_gradient(each, bound, expected_batch_size=RECORDS, loss_reduction=loss_reduction)
    model, optimizer = private(drawn(TinyGPT), mode, bound, loss_reduction=loss_reduction)
    loss = getattr(next_word(model, sentences()), loss_reduction)()
    found = scaled_step(model, optimizer, GradScaler("cpu", init_scale=scale), loss, unscale=unscale)
    assert_same_gradients(found, expected, relative=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_the_records_losses_may_be_scaled_before_their_mean_is_taken(mode):
    expected, bound = truth(TinyGPT)
    model, optimizer = private(drawn(TinyGPT), mode, bound)
    scaler = GradScaler("cpu")
    scaler.scale(next_word(model, sentences())).mean().backward()
    scaler.step(optimizer)
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, expected, relative=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_record_alone_is_unscaled_too(mode):
    (alone,) = gradients_of_each_record(drawn(TinyGPT), next_word, [sentences(1)])
    model, optimizer = private(drawn(TinyGPT), mode, 1e3, expected_batch_size=1)
    scaler = GradScaler("cpu", init_scale=1024.0)
    assert_same_gradients(
        scaled_step(model, optimizer, scaler, next_word(model, sentences(1)).mean()), alone, relative=1e-9
    )


@pytest.mark.parametrize("mode", MODES)
def test_per_sample_gradients_that_are_shown_are_unscaled(mode):
    shown = {}
    for scale in (None, 4096.0):
        model, _ = private(drawn(TinyGPT), mode, 1.0)
        loss = next_word(model, sentences()).mean()
        (loss if scale is None else GradScaler("cpu", init_scale=scale).scale(loss)).backward()
        shown[scale] = [p.grad_sample for p in model.parameters() if hasattr(p, "grad_sample")]
    assert bool(shown[None]) == (mode in ("hooks", "functorch"))
    for plain, unscaled in zip(shown[None], shown[4096.0], strict=True):
        torch.testing.assert_close(unscaled, plain)


class Half(nn.Module):
    """Two layers in float16 arithmetic, small weights last: gradients at the first layer vanish in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def tiny_gradients() -> nn.Module:
    torch.manual_seed(0)
    model = Half()
    with torch.no_grad():
        model.last.weight.mul_(1e-2)
    return model


def half_precision_step(mode: str, x: Tensor, scaler: GradScaler | None) -> dict[str, Tensor]:
    model, optimizer = private(tiny_gradients(), mode, 1e9, expected_batch_size=1)
    with torch.autocast("cpu", torch.float16):
        out = model(x)
    loss = 1e-6 * out.float().mean(1).mean()
    if scaler is not None:
        return scaled_step(model, optimizer, scaler, loss)
    loss.backward()
    optimizer.step()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_vanish_in_half_precision_survive(mode):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    truth = tiny_gradients()
    (1e-6 * truth(x).sum()).backward()
    expected = truth.first.weight.grad
    with_scaler = half_precision_step(mode, x, GradScaler("cpu", init_scale=2.0**20))["first.weight"]
    without = half_precision_step(mode, x, None)["first.weight"]
    assert (with_scaler - expected).norm() < 5e-3 * expected.norm()
    assert (without - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("mode", MODES)
def test_a_record_that_overflows_is_left_out_and_nobody_learns_of_it(mode):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    spoiled = x.clone()
    spoiled[2] = 1e6  # no float16
    scaler = GradScaler("cpu", init_scale=2.0**20, growth_interval=1)
    found = half_precision_step(mode, spoiled, scaler)
    assert scaler.get_scale() == 2.0**20
    # six records, one of them dropped: the mean's 1/6 is undone, and the expected batch size is 1
    expected = half_precision_step(mode, x[torch.arange(6) != 2], GradScaler("cpu", init_scale=2.0**20))
    assert_same_gradients(found, expected, relative=5e-3)


def test_the_scale_stays_step_after_step_and_every_step_counts():
    model, optimizer = private(drawn(TinyGPT), "bk", 1.0)
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for step in range(4):
        scaled_step(model, optimizer, scaler, next_word(model, sentences(4, seed=step)).mean())
        assert (scaler.get_scale(), optimizer.steps) == (8.0, step + 1)


def test_accumulation_and_physical_batches_may_have_scales_of_their_own():
    found = []
    for scales in ([1.0, 1.0, 1.0], [64.0, 128.0, 4.0]):
        model = drawn(TinyGPT)
        model, optimizer, loader = PrivacyEngine(seed=0).make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(sentences(6)), batch_size=6), sample_rate=1.0, noise_multiplier=0.0,
            max_grad_norm=0.5,
        )  # fmt: skip
        scaler = GradScaler("cpu")
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as pieces:
            for (ids,), scale in zip(pieces, scales, strict=True):
                scaler.scale(torch.zeros(()))  # a scaler has no scale to set before it was used
                scaler.update(scale)
                scaler.scale(next_word(model, ids).mean()).backward()
                scaler.step(optimizer)
                scaler.update()
                if not optimizer.steps:
                    optimizer.zero_grad()
        assert optimizer.steps == 1
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_gradients(*found, relative=1e-9)


def test_gradients_of_the_inputs_are_those_of_the_scaled_loss():
    model, _ = private(nn.Linear(3, 2).double(), "bk", 1.0)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    GradScaler("cpu", init_scale=16.0).scale(model(x).sum(1).mean()).backward()
    torch.testing.assert_close(x.grad, 16 / 4 * model.weight.detach().sum(0).expand(4, 3))


@pytest.mark.parametrize(
    "scaler", [None, GradScaler("cpu"), GradScaler("cpu", enabled=False)], ids=["none", "on", "off"]
)
def test_a_tensor_of_the_users_own_is_refused_with_and_without_a_scaler(scaler):
    model, _ = private(nn.Linear(3, 2), "bk", 1.0)
    loss = F.cross_entropy(model(torch.randn(4, 3)), torch.tensor([0, 1, 1, 0]), reduction="sum")
    loss = loss * (1 / torch.tensor(7.0))
    with pytest.raises(PrivacyError, match="multiplied by a tensor"):
        (loss if scaler is None else scaler.scale(loss)).backward()


def test_a_scaler_that_is_off_changes_nothing():
    expected, bound = truth(TinyGPT)
    model, optimizer = private(drawn(TinyGPT), "bk", bound)
    found = scaled_step(model, optimizer, GradScaler("cpu", enabled=False), next_word(model, sentences()).mean())
    assert_same_gradients(found, expected, relative=1e-9)


def test_two_scales_in_one_backward_are_refused():
    model, _ = private(nn.Linear(3, 2), "bk", 1.0)
    out = model(torch.randn(4, 3))
    first, second = GradScaler("cpu", init_scale=2.0), GradScaler("cpu", init_scale=4.0)
    with pytest.raises(PrivacyError, match=r"\[2.0, 4.0\]"):
        (first.scale(out.sum(1).mean()) + second.scale(out.square().sum(1).mean())).backward()


class HomeMade(GradScaler):
    """A scaler whose way to scale is not torch's."""

    def scale(self, outputs: Tensor) -> Tensor:
        if self._scale is None:
            self._lazy_init_scale_growth_tracker(outputs.device)
        return outputs * float(self._scale)


def test_a_scaler_that_scales_in_another_way_is_refused_before_the_step():
    model, optimizer = private(nn.Linear(3, 2), "bk", 1.0)
    before = model.weight.detach().clone()
    scaler = HomeMade("cpu")
    scaler.scale(model(torch.randn(4, 3)).sum(1).mean()).backward()
    with pytest.raises(PrivacyError, match="another class"):
        scaler.step(optimizer)
    assert torch.equal(model.weight, before)
    assert optimizer.steps == 0


def test_scalers_are_left_alone_when_nothing_is_private():
    before = GradScaler.scale
    engine = PrivacyEngine(seed=0)
    model = nn.Linear(3, 2)
    engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=1, noise_multiplier=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    engine.detach()
    assert GradScaler.scale is before
