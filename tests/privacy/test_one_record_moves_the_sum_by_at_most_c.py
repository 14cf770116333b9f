"""The first part of the traps: whatever the user does, leaving one record out moves the released sum by at most C."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from leave_one_out import MODES, C, classifier, cross_entropy, released_sum, sensitivity
from torch import Tensor, nn

from ghostgrad import GhostgradError, PrivacyEngine, PrivacyError, UnsupportedModuleError


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_loss_without_a_criterion_is_clipped(mode: str) -> None:
    model, x, y = classifier()
    reached = sensitivity(model, cross_entropy, x, y, mode)
    assert 0.9 * C < reached <= C * (1 + 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("function", [F.mse_loss, F.binary_cross_entropy_with_logits, F.l1_loss])
def test_losses_of_one_column_are_clipped(mode: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()
    x, y = 100 * torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 1, dtype=torch.float64)
    reached = sensitivity(model, lambda m, x, y: function(m(x), y), x, y, mode)
    assert 0.9 * C < reached <= C * (1 + 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_holds_in_low_precision(mode: str, dtype: torch.dtype) -> None:
    """One record against the empty batch, where rounding up would show."""
    model, x, y = classifier()
    model, x = model.to(dtype), x.to(dtype)
    for i in range(len(x)):
        contribution = released_sum(model, cross_entropy, x[i : i + 1], y[i : i + 1], mode).norm().item()
        assert 0.98 * C < contribution <= C * (1 + 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clipping", ["per_layer", "automatic", "adaptive"])
def test_every_clip_function_states_its_sensitivity(mode: str, clipping: str) -> None:
    model, x, y = classifier()
    parameters = len(list(model.parameters()))
    bound = C * parameters**0.5 if clipping == "per_layer" else C
    reached = sensitivity(model, cross_entropy, x, y, mode, clipping=clipping)
    assert 0.3 * bound < reached <= bound * (1 + 1e-6)


def test_per_layer_noise_is_scaled_to_the_root_of_the_sum_of_squares() -> None:
    model, _, _ = classifier()
    bounds = [0.1, 0.2, 0.3, 0.4]
    engine = PrivacyEngine(seed=0)
    _, optimizer, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=1.0, noise_multiplier=0.0, max_grad_norm=bounds, clipping="per_layer",
    )  # fmt: skip
    assert optimizer.clip_function.sensitivity == pytest.approx(sum(b * b for b in bounds) ** 0.5)


# ---------------------------------------------------------------------- uses outside the module's call


class TiedByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.embedding(ids).mean(1), self.embedding.weight)


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_used_outside_its_modules_call_is_clipped_with_that_use(mode: str) -> None:
    torch.manual_seed(0)
    model, ids, y = TiedByHand().double(), torch.randint(7, (4, 3)), torch.randint(7, (4,))
    reached = sensitivity(model, cross_entropy, ids, y, mode)
    assert 0.9 * C < reached <= C * (1 + 1e-6)


class Lent(nn.Module):
    """Hands a weight to the loss, where no module can be asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_used_outside_the_model_is_refused(mode: str) -> None:
    _, x, y = classifier()
    with pytest.raises(PrivacyError, match=r"linear\.weight"):
        released_sum(Lent(), lambda m, x, y: F.cross_entropy(m(x) + F.linear(x, m.linear.weight), y), x, y, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_penalty_in_the_loss_is_refused(mode: str) -> None:
    model, x, y = classifier()

    def penalised(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y) + m[0].weight.square().sum()

    with pytest.raises(PrivacyError, match=r"0\.weight.*weight_decay"):
        released_sum(model, penalised, x, y, mode)


@pytest.mark.parametrize("mode", MODES)
def test_calling_only_parts_of_the_model_is_refused(mode: str) -> None:
    model, x, y = classifier()

    def parts(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m[2](m[1](m[0](x))), y)

    with pytest.raises(PrivacyError):
        released_sum(model, parts, x, y, mode)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.kept = out.square().mean()
        return out


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_on_a_value_that_the_model_kept_is_refused(mode: str) -> None:
    _, x, y = classifier()
    with pytest.raises(PrivacyError, match="auxiliary"):
        released_sum(Auxiliary(), lambda m, x, y: F.cross_entropy(m(x), y) + m.kept, x, y, mode)


# ---------------------------------------------------------------------- rows that are not records


class Folded(nn.Module):
    """Runs its layers on [B * T, F]: the rows of the layers are not the records."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.second(self.first(x.reshape(-1, 4)).tanh())
        return rows.reshape(x.shape[0], -1, 2).sum(1)


@pytest.mark.parametrize("mode", MODES)
def test_folded_rows_are_clipped_by_record(mode: str) -> None:
    torch.manual_seed(0)
    x, y = 3 * torch.randn(5, 50, 4, dtype=torch.float64), torch.randint(2, (5,))
    reached = sensitivity(Folded(), cross_entropy, x, y, mode)
    assert 0.9 * C < reached <= C * (1 + 1e-6)


class TimeMajor(Folded):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.second(self.first(x.transpose(0, 1).reshape(-1, 4)).tanh())
        return rows.reshape(-1, x.shape[0], 2).sum(0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [4, 5, 10])
def test_rows_in_another_order_than_the_records_are_clipped_by_record(mode: str, length: int) -> None:
    torch.manual_seed(0)
    x, y = 3 * torch.randn(5, length, 4, dtype=torch.float64), torch.randint(2, (5,))
    reached = sensitivity(TimeMajor(), cross_entropy, x, y, mode)
    assert 0.9 * C < reached <= C * (1 + 1e-6)


# ---------------------------------------------------------------------- models that mix records


class Mixing(nn.Module):
    """A model with a hand-written way of letting records see each other."""

    def __init__(self, mix: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.register_buffer("seen", torch.zeros(8, dtype=torch.float64))
        self.first, self.second = nn.Linear(5, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.mix(self, self.first(x)))


def centred(m: nn.Module, h: Tensor) -> Tensor:
    return h - h.mean(0)


def centred_detached(m: nn.Module, h: Tensor) -> Tensor:
    return h - h.mean(0).detach()


def centred_detached_in_training(m: nn.Module, h: Tensor) -> Tensor:
    return h - h.mean(0).detach() if m.training else h


def kept_in_a_buffer(m: nn.Module, h: Tensor) -> Tensor:
    if m.training:
        m.seen += h.detach().sum(0)
    return h


def centred_in_training(m: nn.Module, h: Tensor) -> Tensor:
    return h - h.mean(0) if m.training else h


def in_batch_attention(m: nn.Module, h: Tensor) -> Tensor:
    return torch.softmax(h @ h.T, 1) @ h


def capacity(m: nn.Module, h: Tensor) -> Tensor:
    """An expert that takes the first two records that ask for it and drops the rest."""
    wants = h[:, 0] > h[:, 0].min() - 1
    return torch.where(((wants.cumsum(0) <= 2) & wants).unsqueeze(1), h, torch.zeros_like(h))


def mixed_by_numpy(m: nn.Module, h: Tensor) -> Tensor:
    share = np.random.beta(1, 1)
    return share * h + (1 - share) * h[torch.as_tensor(np.random.permutation(len(h)))]


def centred_by_python(m: nn.Module, h: Tensor) -> Tensor:
    return h - random.uniform(0.5, 1) * h.mean(0).detach()


OWN = np.random.default_rng(0)
OWN_TORCH = torch.Generator().manual_seed(0)


def mixed_by_a_generator_of_its_own(m: nn.Module, h: Tensor) -> Tensor:
    share = OWN.beta(1, 1)
    return share * h + (1 - share) * h[torch.as_tensor(OWN.permutation(len(h)))]


def noisy_by_a_torch_generator_of_its_own(m: nn.Module, h: Tensor) -> Tensor:
    """Which batch it is drawn for cannot be told, though records do not mix."""
    return h * (1 + OWN_TORCH.seed() % 7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "mix",
    [
        mixed_by_a_generator_of_its_own,
        noisy_by_a_torch_generator_of_its_own,
        mixed_by_numpy,
        centred_by_python,
        centred,
        centred_detached,
        centred_in_training,
        centred_detached_in_training,
        in_batch_attention,
        capacity,
        kept_in_a_buffer,
    ],
    ids=lambda f: f.__name__,
)
def test_models_that_mix_records_are_refused(mode: str, mix: Callable[[nn.Module, Tensor], Tensor]) -> None:
    _, x, y = classifier()
    with pytest.raises(PrivacyError):
        released_sum(Mixing(mix), cross_entropy, x, y, mode)


class SometimesSquare(nn.Module):
    """Time-first; its PReLU sees [records, features] with features that may be as many as the records."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5).double().requires_grad_(False), nn.PReLU().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sum(0)).unsqueeze(0)


@pytest.mark.parametrize("seed", range(40))
def test_a_draw_that_happens_to_move_nobody_vouches_for_no_other(seed: int) -> None:
    """A sixth of the permutations leave the first of six records where it is."""
    _, x, y = classifier()
    np.random.seed(seed)
    with pytest.raises(PrivacyError):
        released_sum(Mixing(mixed_by_numpy), cross_entropy, x, y, "ghost")


@pytest.mark.parametrize("mode", MODES)
def test_a_layout_is_proved_anew_when_features_could_be_taken_for_records(mode: str) -> None:
    torch.manual_seed(0)
    model = SometimesSquare()
    _, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=None, sample_rate=0.5,
        expected_batch_size=1.0, noise_multiplier=0.0, max_grad_norm=C, grad_sample_mode=mode, batch_first=False,
        loss_reduction="sum",
    )  # fmt: skip
    for n in (4, 5):
        weights = torch.randn(n, 5, dtype=torch.float64)
        weights[0] *= 50
        x = torch.randn(3, n, 4, dtype=torch.float64)
        expected = torch.zeros(1, dtype=torch.float64)
        for i in range(n):
            plain = SometimesSquare()
            plain.load_state_dict(model.state_dict())
            (plain(x[:, i : i + 1]) * weights[i]).sum().backward()
            gradient = plain.second.weight.grad
            expected += gradient * min(1.0, C / max(gradient.norm().item(), 1e-30))
        try:
            (model(x) * weights).sum().backward()
        except GhostgradError:
            assert n == 5, "four records with five features are told apart"
            return
        optimizer.step()
        torch.testing.assert_close(model.second.weight.grad, expected, rtol=1e-9, atol=1e-12)
        optimizer.zero_grad()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training_mode_is_refused_and_in_eval_mode_is_not(frozen: bool, affine: bool) -> None:
    _, x, y = classifier()
    norm = nn.BatchNorm1d(8, affine=affine).double().requires_grad_(not frozen)
    model = nn.Sequential(nn.Linear(5, 8).double(), norm, nn.Linear(8, 3).double())
    with pytest.raises(PrivacyError, match="1: BatchNorm1d"):
        released_sum(model, cross_entropy, x, y, "bk")
    norm.eval()
    assert sensitivity(model, cross_entropy, x, y, "bk") <= C * (1 + 1e-6)


def test_model_train_does_not_silently_undo_a_batch_norm_in_eval_mode() -> None:
    _, x, y = classifier()
    norm = nn.BatchNorm1d(8).double().eval()
    model = nn.Sequential(nn.Linear(5, 8).double(), norm, nn.Linear(8, 3).double())

    def after_train(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        m.train()
        return cross_entropy(m, x, y)

    with pytest.raises(PrivacyError, match="1: BatchNorm1d"):
        released_sum(model, after_train, x, y, "bk")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mix", [centred, centred_detached, in_batch_attention], ids=lambda f: f.__name__)
def test_a_head_of_zeros_does_not_hide_that_records_meet(mode: str, mix: Callable[[nn.Module, Tensor], Tensor]) -> None:
    _, x, y = classifier()
    model = Mixing(mix)
    nn.init.zeros_(model.second.weight)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PrivacyError):
        released_sum(model, cross_entropy, x, y, mode)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "mix",
    [
        lambda m, h: h - h.mean(0).detach(),
        lambda m, h: h / len(h),
        lambda m, h: h + sum(torch.rand(()) for _ in h),
        lambda m, h: h * (torch.arange(len(h)) < 3).view(-1, 1),  # an expert's capacity
        lambda m, h: h + torch.zeros_like(h).masked_fill_(h.detach() > h.detach().median(0).values, 1.0),
    ],
    ids=["centred", "divided by the size", "one draw for each", "capacity", "above the median"],
)
def test_random_numbers_in_the_model_do_not_hide_that_records_meet(mix: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """A variational model, noisy gating: no two forwards are alike, with one record fewer least of all."""
    _, x, y = classifier()
    model = Mixing(lambda m, h: mix(m, h) + 0.1 * torch.randn_like(h) + 0.1 * h * torch.rand(h.shape[1]))
    with pytest.raises(PrivacyError, match="the output for a record changes"):
        released_sum(model, cross_entropy, x, y, "bk")


@pytest.mark.parametrize("largest", range(6))
def test_a_scale_that_one_record_sets_is_refused_whichever_it_is(largest: int) -> None:
    _, x, y = classifier()
    x[largest] *= 30
    with pytest.raises(PrivacyError, match="when another record leaves the batch or changes"):
        released_sum(Mixing(lambda m, h: h / h.detach().abs().max()), cross_entropy, x, y, "bk")


@pytest.mark.parametrize("mixes", [False, True])
def test_dropout_inside_a_recurrent_kernel_neither_hides_mixing_nor_forbids_a_model(mixes: bool) -> None:
    """Its draws are not calls that could be left out."""

    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 3, num_layers=2, dropout=0.5, batch_first=True).double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.lstm(x.unsqueeze(1).expand(-1, 4, -1))[0][:, -1]
            return h - h.mean(0).detach() if mixes else h

    torch.manual_seed(0)
    _, x, y = classifier()
    with pytest.raises(PrivacyError, match="leaves the batch") if mixes else contextlib.nullcontext():
        assert float(released_sum(Layered(), cross_entropy, x, y, "bk").norm()) > 0


def test_coins_that_python_flips_for_each_record_are_allowed() -> None:
    _, x, y = classifier()
    state = random.getstate()
    model = Mixing(lambda m, h: torch.stack([row * random.choice([-1.0, 1.0]) for row in h]))
    assert released_sum(model, cross_entropy, x, y, "bk").norm() > 0
    assert random.getstate() != state


def test_a_model_that_draws_for_each_record_is_trained() -> None:
    _, x, y = classifier()
    model = Mixing(lambda m, h: h + 0.1 * torch.randn_like(h) + torch.empty(h.shape).bernoulli_(0.5).to(h))
    assert 0 < released_sum(model, cross_entropy, x, y, "bk").norm() <= 6 * C


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["hook", "function"])
def test_a_backward_that_normalises_over_the_batch_is_refused(mode: str, where: str) -> None:
    class Normalised(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad / grad.norm()

    def mix(m: nn.Module, h: Tensor) -> Tensor:
        if where == "function":
            return Normalised.apply(h)
        if h.requires_grad:
            h.register_hook(lambda grad: grad / grad.norm())
        return h

    _, x, y = classifier()
    with pytest.raises((PrivacyError, UnsupportedModuleError), match=r"not the sum of those of its records|alone"):
        released_sum(Mixing(mix), cross_entropy, x, y, mode)


def test_negatives_drawn_from_the_batch_are_refused() -> None:
    model, x, y = classifier()
    drawn = torch.tensor([3, 3, 0, 1, 5, 2])

    def triplet(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.triplet_margin_loss(m(x), m(x + 0.1), m(x[drawn]))

    with pytest.raises(PrivacyError, match="same records in other places"):
        released_sum(model, triplet, x, y, "bk")


def test_dropout_does_not_hide_that_records_meet() -> None:
    _, x, y = classifier()
    for dropout in (lambda h: F.dropout(h, 0.3), nn.Dropout(0.3)):
        model = Mixing(lambda m, h, drop=dropout: drop(h - h.mean(0).detach()))
        with pytest.raises(PrivacyError):
            released_sum(model, cross_entropy, x, y, "bk")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("permute", [lambda x: x.flip(0), lambda x: x.roll(1, 0)])
def test_a_second_forward_of_the_same_records_in_another_order_is_refused(
    mode: str, permute: Callable[[Tensor], Tensor]
) -> None:
    model, x, y = classifier()
    with pytest.raises(PrivacyError, match="same records in other places"):
        released_sum(model, lambda m, x, y: (m(x) - m(permute(x))).square().sum(1).mean(), x, y, mode)


# ---------------------------------------------------------------------- records that are not finite


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_a_record_that_is_not_finite_leaves_the_step_as_if_it_were_absent(mode: str, bad: float) -> None:
    model, x, y = classifier()
    rest = torch.arange(len(x)) != 3
    x[3, 2] = bad
    with_it = released_sum(model, cross_entropy, x, y, mode)
    without = released_sum(model, cross_entropy, x[rest], y[rest], mode)
    assert (with_it - without).norm() <= C * (1 + 1e-6)
    if bad != 1e200:
        torch.testing.assert_close(with_it, without, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------------- the step takes nothing else


@pytest.fixture
def private() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.Optimizer, Tensor, Tensor]:
    model, x, y = classifier()
    original = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(seed=0)
    model, optimizer, _ = engine.make_private(
        module=model, optimizer=original, data_loader=None, sample_rate=0.5, expected_batch_size=1.0,
        noise_multiplier=0.0, max_grad_norm=C,
    )  # fmt: skip
    return model, optimizer, original, x, y


def test_the_original_optimizer_is_fused_shut(private: tuple) -> None:
    model, _, original, x, y = private
    cross_entropy(model, x, y).backward()
    with pytest.raises(PrivacyError, match="made private"):
        original.step()


def test_a_gradient_from_an_eval_mode_backward_is_refused(private: tuple) -> None:
    model, optimizer, _, x, y = private
    cross_entropy(model.eval(), x, y).backward()
    with pytest.raises(PrivacyError, match="did not produce"):
        optimizer.step()
    optimizer.zero_grad()
    cross_entropy(model.train(), x, y).backward()
    optimizer.step()


def test_a_gradient_set_by_hand_is_refused(private: tuple) -> None:
    model, optimizer, _, x, y = private
    cross_entropy(model, x, y).backward()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    with pytest.raises(PrivacyError, match="did not produce"):
        optimizer.step()


def test_clip_grad_norm_between_backward_and_step_changes_nothing(private: tuple) -> None:
    model, optimizer, _, x, y = private
    cross_entropy(model, x, y).backward()
    assert all(p.grad is None for p in model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
    optimizer.step()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm > 0.5 * C


def test_two_backwards_through_one_forward_are_refused(private: tuple) -> None:
    model, _, _, x, y = private
    loss = cross_entropy(model, x, y)
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_grad_scaler_does_not_scale_what_is_clipped(mode: str) -> None:
    def scaled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return torch.amp.GradScaler("cpu", init_scale=1024.0).scale(cross_entropy(model, x, y))

    model, x, y = classifier()
    reached = sensitivity(model, scaled, x, y, mode)
    assert 0.9 * C < reached <= C * (1 + 1e-6)


def test_a_step_by_a_scaler_that_nobody_saw_scale_is_refused(private: tuple) -> None:
    model, optimizer, _, x, y = private
    cross_entropy(model, x, y).backward()
    optimizer.grad_scale = torch.tensor(1024.0)  # what a scaler hands to an optimizer that can take it
    with pytest.raises(PrivacyError, match="GradScaler"):
        optimizer.step()


def test_a_layer_unfrozen_later_is_clipped_with_the_rest() -> None:
    model, x, y = classifier()
    model[0].requires_grad_(False)

    def unfreeze(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        m.requires_grad_(True)
        return cross_entropy(m, x, y)

    for mode in MODES:
        assert 0.9 * C < released_sum(model, unfreeze, x[:1], y[:1], mode).norm().item() <= C * (1 + 1e-6)


def test_freezing_a_layer_later_takes_it_out_of_the_step(private: tuple) -> None:
    model, optimizer, _, x, y = private
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    cross_entropy(model, x, y).backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert model[2].weight.grad.norm() > 0


@pytest.mark.parametrize("what", ["max_grad_norm"])
def test_the_bound_cannot_change_inside_a_logical_batch(what: str) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    model, x, y = classifier()
    model, optimizer, loader = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=C,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=6),
    )  # fmt: skip
    for xb, yb in loader:
        cross_entropy(model, xb, yb).backward()
        with pytest.raises(PrivacyError, match="while a logical batch"):
            optimizer.max_grad_norm = 1.0
        optimizer.step()
        optimizer.max_grad_norm = 1.0
        optimizer.zero_grad()


def test_refusals_are_of_one_family() -> None:
    assert issubclass(PrivacyError, GhostgradError)
    assert issubclass(UnsupportedModuleError, GhostgradError)
