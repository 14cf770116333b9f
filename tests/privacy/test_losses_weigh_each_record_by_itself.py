"""A loss must be the mean (or the sum) of the records' own losses; everything else is refused, however it is written."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from leave_one_out import MODES, C, Loss, classifier, made_private, released_sum, sensitivity
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghostgrad import ConfigurationError, PrivacyEngine, PrivacyError, UnsupportedModuleError


def class_weighted(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, weight=torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64))


def ignoring(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), torch.where(y == 2, -100, y))


def selected(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x)[y != 2], y[y != 2])


def selected_after(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, reduction="none")[y != 2].mean()


def masked_select(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, reduction="none").masked_select(y != 2).mean()


def scaled_by_count(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    mask = (y != 2).double()
    return (F.cross_entropy(m(x), y, reduction="none") * mask).sum() * (1 / mask.sum())


def scaled_within(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    mask = (y != 2).double()
    return (F.cross_entropy(m(x), y, reduction="none") * mask / mask.sum()).sum()


def scaled_within_a_view(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    mask = (y != 2).double()
    return (F.cross_entropy(m(x), y, reduction="none") * mask).sum().view(1) / mask.sum()


def root_of_the_mean(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x), x[:, :3]).sqrt()


def in_batch_negatives(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    return F.cross_entropy(out @ out.T, torch.arange(len(x)))


def centred_in_the_loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    return (out - out.mean(0)).square().mean()


def counted_in_python(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    mask = (y != 2).double()
    return (F.cross_entropy(m(x), y, reduction="none") * mask).sum() / mask.sum().item()


def inverse_of_a_count(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    mask = (y != 2).double()
    return (1 / int(mask.sum())) * (F.cross_entropy(m(x), y, reduction="none") * mask).sum()


def sum_over_a_constant(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, reduction="sum") / 32


def broadcast_target(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (m(x)[:, :1] - x[:, 0]).square().mean()


def frozen_negatives(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x) @ x[:, :3].T, torch.arange(len(x)))


def detached_negatives(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = m(x)
    return F.cross_entropy(z @ z.detach().T, torch.arange(len(x)))


def counted_within(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    mask = (y != 2).double()
    return (F.cross_entropy(m(x), y, reduction="none") * mask * (1 / mask.sum().item())).sum()


def hardest_half(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, reduction="none").topk(len(x) // 2)[0].mean()


def hardest_by_sorting(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, reduction="none").sort(descending=True)[0][: len(x) // 2].mean()


def hardest_by_index(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    each = (m(x) - x[:, :3]).square().flatten()
    return each[each.argsort(descending=True)[: len(x)]].mean()


def median_of_the_batch(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, reduction="none").median()


def masked_by_hand(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    mask = (y != 2).double()
    return (F.cross_entropy(m(x), y, reduction="none") * mask).sum() / mask.sum()


def shifted(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Absolute differences have no second derivative."""
    out = m(x)
    return F.l1_loss(out, out.roll(1, 0))


def ranked_in_pairs(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    scores = m(x)[:, 0]
    return F.margin_ranking_loss(scores, scores.flip(0), torch.ones(len(x)).double(), margin=1.0)


def centred_in_the_loss_without_a_second_derivative(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    return (out - out.mean(0)).abs().mean()


def weighted_among_each_other(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`multi_margin_loss` cannot be differentiated twice."""
    each = F.multi_margin_loss(m(x), y, reduction="none")
    return (each.softmax(0) * each).mean()


def averaged_by_class(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    whose = F.one_hot(y, 3).double()
    each = F.cross_entropy(m(x), y, reduction="none").unsqueeze(1)
    return ((each * whose).sum(0) / whose.sum(0).clamp(min=1)).mean()


def scaled_by_addcmul(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    inverse = 1 / (y != 2).double().sum()
    return torch.addcmul(torch.zeros(()).double(), F.cross_entropy(m(x), y), inverse)


def divided_by_addcdiv(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(m(x), y, reduction="none")
    return torch.addcdiv(torch.zeros_like(each), each, (y != 2).double().sum()).mean()


def loop_over_some(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(o, t) for o, t in zip(m(x), y, strict=True) if t != 2]).mean()


def loop_that_adds_up(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return sum((F.cross_entropy(o, t) for o, t in zip(m(x), y, strict=True)), torch.zeros(()))


def through_many_operations(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = class_weighted(m, x, y)
    for _ in range(10_001):
        loss = loss * 1.0
    return loss


def model_in_reentrant_checkpointing(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = checkpoint(m, x.clone().requires_grad_(), use_reentrant=True)
    return F.cross_entropy(out, y, weight=torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64))


def loss_in_reentrant_checkpointing(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    each = checkpoint(lambda out: F.cross_entropy(out, y, reduction="none") / (y != 2).sum(), m(x), use_reentrant=True)
    return each.mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "loss",
    [
        shifted,
        ranked_in_pairs,
        centred_in_the_loss_without_a_second_derivative,
        weighted_among_each_other,
        averaged_by_class,
        scaled_by_addcmul,
        divided_by_addcdiv,
        loop_over_some,
        loop_that_adds_up,
        through_many_operations,
        model_in_reentrant_checkpointing,
        loss_in_reentrant_checkpointing,
        class_weighted,
        ignoring,
        masked_by_hand,
        counted_in_python,
        broadcast_target,
        frozen_negatives,
        detached_negatives,
        counted_within,
        hardest_half,
        hardest_by_sorting,
        hardest_by_index,
        median_of_the_batch,
        inverse_of_a_count,
        sum_over_a_constant,
        selected,
        selected_after,
        masked_select,
        scaled_by_count,
        scaled_within,
        scaled_within_a_view,
        root_of_the_mean,
        in_batch_negatives,
        centred_in_the_loss,
    ],
    ids=lambda f: f.__name__,
)
def test_a_loss_in_which_records_touch_each_other_is_refused(mode: str, loss: Loss) -> None:
    model, x, y = classifier()
    reasons = (
        r"^the loss(, one number by then, is| is| compares| applies| has a tensor| ranks)|re-entrant checkpointing"
    )
    with pytest.raises(PrivacyError, match=reasons):
        released_sum(model, loss, x, y, mode)


TORCH_LOSSES = {
    "cross entropy": lambda out, x, y: F.cross_entropy(out, y),
    "label smoothing": lambda out, x, y: F.cross_entropy(out, y, label_smoothing=0.1),
    "soft targets": lambda out, x, y: F.cross_entropy(out, x[:, :3].softmax(1)),
    "nll": lambda out, x, y: F.nll_loss(out.log_softmax(1), y),
    "mse": lambda out, x, y: F.mse_loss(out, x[:, :3]),
    "l1": lambda out, x, y: F.l1_loss(out, x[:, :3]),
    "smooth l1": lambda out, x, y: F.smooth_l1_loss(out, x[:, :3]),
    "huber": lambda out, x, y: F.huber_loss(out, x[:, :3]),
    "kl": lambda out, x, y: F.kl_div(out.log_softmax(1), x[:, :3].softmax(1), reduction="batchmean"),
    "bce": lambda out, x, y: F.binary_cross_entropy(out.sigmoid(), x[:, :3].sigmoid()),
    "bce logits": lambda out, x, y: F.binary_cross_entropy_with_logits(
        out, x[:, :3].sigmoid(), pos_weight=torch.ones(3)
    ),
    "gaussian": lambda out, x, y: F.gaussian_nll_loss(out, x[:, :3], torch.ones_like(out)),
    "poisson": lambda out, x, y: F.poisson_nll_loss(out, x[:, :3].abs()),
    "margin": lambda out, x, y: F.multi_margin_loss(out, y),
    "triplet": lambda out, x, y: F.triplet_margin_loss(out, x[:, :3], x[:, 1:4]),
    "cosine": lambda out, x, y: F.cosine_embedding_loss(out, x[:, :3], 2 * (y % 2) - 1),
    "divided inside": lambda out, x, y: (F.cross_entropy(out, y, reduction="none") / len(y)).sum(),
    "one column": lambda out, x, y: (out[:, 0] - x[:, 0]).square().mean(),
    "top of a record": lambda out, x, y: out.topk(2, dim=1)[0].square().mean(),
    "record by record": lambda out, x, y: torch.stack(
        [F.mse_loss(o, t[:3]) for o, t in zip(out, x, strict=True)]
    ).mean(),
    "record by record by hand": lambda out, x, y: (
        sum((2 * (o - t[:3])).square().mean().sqrt() for o, t in zip(out, x, strict=True)) / len(x)
    ),
    "records in the second dimension": lambda out, x, y: (out.T - x[:, :3].T).abs().mean(),
    "records as the faster index": lambda out, x, y: F.cross_entropy(
        torch.stack([out, 2 * out]).flatten(0, 1), y.repeat(2)
    ),
    "pairs within a record": lambda out, x, y: F.l1_loss(out[:, 0], out[:, 1]),
    "nothing of another part": lambda out, x, y: F.cross_entropy(out, y) + 0.0 * out.sum(),
    "a long sum": lambda out, x, y: sum((F.mse_loss(out, x[:, :3]) / 1200 for _ in range(1200)), torch.zeros(())),
    "two terms": lambda out, x, y: 0.7 * F.cross_entropy(out, y) + F.mse_loss(out, x[:, :3]) / 3,
    "stacked": lambda out, x, y: torch.stack([F.cross_entropy(out, y), out.square().mean()]).sum(),
    "a list": lambda out, x, y: sum([F.cross_entropy(out, y), out.square().mean()]),
    "picked": lambda out, x, y: -out.log_softmax(1)[torch.arange(len(y)), y].mean(),
    "gathered": lambda out, x, y: -out.log_softmax(1).gather(1, y[:, None]).mean(),
    "mean of masked means": lambda out, x, y: ((out * (x[:, :3] > 0)).sum(1) / (1 + (x[:, :3] > 0).sum(1))).mean(),
}


@pytest.mark.parametrize("name", TORCH_LOSSES)
def test_means_over_records_are_bounded_and_not_refused(name: str) -> None:
    model, x, y = classifier()
    reached = sensitivity(model, lambda m, x, y: TORCH_LOSSES[name](m(x), x, y), x, y, "bk")
    assert 0 < reached <= C * (1 + 1e-6)


def test_a_record_alone_may_be_divided_by_its_own_count() -> None:
    model, x, y = classifier()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        counted = (x > 0).double().sum(1)
        return (F.cross_entropy(m(x), y, reduction="none") / counted.clamp(min=1)).mean()

    for count in (1, 2, 6):
        moved = released_sum(model, loss, x[:count], y[:count], "bk")
        assert 0 < moved.norm() <= count * C * (1 + 1e-6)


def test_a_sum_divided_by_a_constant_is_refused_when_the_size_of_the_batch_changes() -> None:
    model, x, y = classifier()
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=1.0, noise_multiplier=0.0, max_grad_norm=C,
    )  # fmt: skip
    (F.cross_entropy(model(x), y, reduction="sum") / 6).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(PrivacyError, match="not one over the number of its records"):
        (F.cross_entropy(model(x[:4]), y[:4], reduction="sum") / 6).backward()


def masked_losses(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Four of six records count."""
    return F.cross_entropy(m(x), y, reduction="none") * (torch.arange(len(x)) % 3 != 2).double()


def ignoring_targets(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Four of six records count."""
    return F.cross_entropy(m(x), y.where(torch.arange(len(x)) % 3 != 2, -100), reduction="none")


def every_loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, reduction="none")


@pytest.mark.parametrize(
    ("each", "reduction", "factor", "found"),
    [
        (masked_losses, "mean", 6 / 4, "keeps 4 of 6 elements"),
        (ignoring_targets, "mean", 6 / 4, "keeps 4 of 6 elements"),
        (masked_losses, "sum", 1 / 4, "keeps 4 of 6 elements"),
        (ignoring_targets, "sum", 1 / 4, "keeps 4 of 6 elements"),
        (every_loss, "mean", 60 / 37, "If that was counted in the batch"),
        (every_loss, "mean", 37 / 60, "If that was counted in the batch"),
        (every_loss, "sum", 60 / 37, "If that was counted in the batch"),
    ],
)
def test_a_factor_that_was_counted_is_refused_in_the_first_batch(
    each: Callable[..., Tensor], reduction: str, factor: float, found: str
) -> None:
    model, x, y = classifier()
    model, _, _ = made_private(model, loss_reduction=reduction)
    losses = each(model, x, y)
    with pytest.raises(PrivacyError, match=found):
        ((losses.mean() if reduction == "mean" else losses.sum()) * factor).backward()


def test_a_count_over_a_count_is_not_hidden_by_writing_two_numbers() -> None:
    model, x, y = classifier()
    model, _, _ = made_private(model)
    with pytest.raises(PrivacyError, match="If that was counted in the batch"):
        (0.5 * every_loss(model, x, y).mean() * 60 / 37).backward()


@pytest.mark.parametrize(
    "factor",
    [
        1 / math.log(2),
        0.5 / math.log(10),
        1 / (2 * math.pi),
        1 / math.sqrt(2 * math.pi),
        0.5,
        0.1,
        2.0,
        2.5,
        100.0,
        1e-4,
        0.00025,
        1 / 3,
        1 / 60_000,
        1 / 768**0.5,
        768**0.5,
        0.123,
        -0.2,
    ],
)
def test_a_factor_that_somebody_would_write_is_not_refused(factor: float) -> None:
    model, x, y = classifier()
    reached = sensitivity(model, lambda m, x, y: factor * F.cross_entropy(m(x), y), x, y, "bk")
    assert 0 < reached <= C * (1 + 1e-6)


def test_constants_may_multiply_to_more_digits() -> None:
    model, x, y = classifier()
    reached = sensitivity(model, lambda m, x, y: 0.123 * (F.cross_entropy(m(x), y) / 3) * 0.7, x, y, "bk")
    assert 0 < reached <= C * (1 + 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_factor_that_changes_from_batch_to_batch_is_refused(reduction: str) -> None:
    model, x, y = classifier()
    model, optimizer, _ = made_private(model, loss_reduction=reduction)
    for factor in (2.5, 2.0):
        each = F.cross_entropy(model(x), y, reduction="none")
        with pytest.raises(PrivacyError, match="others than in an") if factor == 2 else contextlib.nullcontext():
            ((each.mean() if reduction == "mean" else each.sum()) * factor).backward()
        optimizer.step()
        optimizer.zero_grad()


PARTS_OVER_THE_BATCH = {
    "records": lambda each, part, batch: each.mean() / len(batch),
    "parts": lambda each, part, batch: each.mean() / -(-len(batch) // len(part)),
    "elements": lambda each, part, batch: each.sum() / batch.numel(),
    "counted tokens": lambda each, part, batch: each.sum() / 37,
    "a share": lambda each, part, batch: each.mean() * (5 / 37),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", PARTS_OVER_THE_BATCH)
def test_parts_of_a_batch_that_are_divided_by_the_batch_are_refused(name: str, rows: int) -> None:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(7, 5).double(), torch.randint(3, (7,)))
    model = nn.Linear(5, 3).double()
    model, _, loader = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=C,
        data_loader=torch.utils.data.DataLoader(data, batch_size=7), poisson_sampling=False,
    )  # fmt: skip
    (x, y), *_ = loader
    each = F.cross_entropy(model(x[:rows]), y[:rows], reduction="none")
    with pytest.raises(
        PrivacyError, match=r"number of the batch's|not one over the number of its|counted in the batch"
    ):
        PARTS_OVER_THE_BATCH[name](each, x[:rows], x).backward()


def test_a_number_inside_a_loss_that_changes_from_batch_to_batch_is_refused() -> None:
    model, x, y = classifier()
    model, optimizer, _ = made_private(model)
    for counted in (3, 5):
        each = F.cross_entropy(model(x) * 0.5, y, reduction="none") * (torch.arange(6) < counted) * (10.5 / counted)
        with pytest.raises(PrivacyError, match="others than in an") if counted == 5 else contextlib.nullcontext():
            each.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_single_records_that_are_divided_by_a_changing_size_are_refused() -> None:
    model, x, y = classifier()
    model, optimizer, _ = made_private(model)
    for i in range(6):
        (F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) / 6).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(PrivacyError, match="others than in an earlier batch"):
        (F.cross_entropy(model(x[1:2]), y[1:2]) / 5).backward()


def test_a_weight_that_is_given_to_backward_is_refused() -> None:
    model, x, y = classifier()
    mask = (y != 2).double()
    for spelled in ({"gradient": 1 / mask.sum()}, {}):
        model, _, _ = made_private(classifier()[0])
        loss = (F.cross_entropy(model(x), y, reduction="none") * mask).sum()
        with pytest.raises(PrivacyError, match="multiplies the loss by a tensor"):
            loss.backward(**spelled) if spelled else torch.autograd.backward([loss], [1 / mask.sum()])


def test_several_losses_in_one_backward_are_to_be_added_up() -> None:
    model, x, y = classifier()
    model, optimizer, _ = made_private(model)
    out = model(x)
    with pytest.raises(PrivacyError, match="Add them up"):
        torch.autograd.backward([F.cross_entropy(out, y), out.square().mean()])
    optimizer.zero_grad()
    out = model(x.clone())
    (F.cross_entropy(out, y) + out.square().mean()).backward()
    optimizer.step()


@pytest.mark.parametrize("later", [3, 5])
def test_a_size_that_is_the_number_of_records_by_chance_is_taken_for_what_it_was(later: int) -> None:
    """A mask of three columns in a batch of three records: not a pair of records, as a batch of four has shown."""
    model, x, _ = classifier()
    model, optimizer, _ = made_private(nn.Sequential(model, nn.Linear(3, 1).double()))
    for n in (4, later):
        (model(x[:n]) * torch.ones(n, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_weights_that_follow_a_schedule_are_allowed_in_a_criterion() -> None:
    model, x, y = classifier()
    weight = 1.0

    def criterion(out: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y) + weight * F.mse_loss(out, x[:, :3])

    model, optimizer, watched, _ = made_private(model, criterion=criterion)
    for step in range(3):
        weight = 1.0 / (1 + step)
        watched(model(x.clone()), x, y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_criterion_that_counts_is_refused_in_the_first_batch_in_which_it_shows() -> None:
    """Nothing is masked in the first batch: there the masked mean is the mean."""
    model, x, y = classifier()
    masks = [torch.ones(6), (torch.arange(6) < 4).double()]

    def criterion(out: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return (F.cross_entropy(out, y, reduction="none") * mask).mean() * (mask.numel() / mask.sum().item())

    model, optimizer, watched, _ = made_private(model, criterion=criterion)
    watched(model(x), y, masks[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = watched(model(x.clone()), y, masks[1])
    with pytest.raises(PrivacyError, match=r"others than in an earlier batch|taken apart"):
        loss.backward()


@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_a_record_of_which_nothing_counts_does_not_hide_a_criterion_that_counts(fill: float) -> None:
    """Alone it has no loss: 0 / 0."""
    model, x, y = classifier()
    x[5] = torch.where(torch.arange(5) == 0, fill, x[5])

    def criterion(out: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return (F.cross_entropy(out, y, reduction="none") * mask).sum().div(mask.sum().item() + 0.0)

    model, _, watched, _ = made_private(model, criterion=criterion)
    with pytest.raises(PrivacyError, match=r"not one over the number|taken apart"):
        watched(model(x), y, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.0])).backward()


def test_a_criterion_that_counts_inside_is_refused_too() -> None:
    model, x, y = classifier()

    def criterion(out: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return (F.cross_entropy(out, y, reduction="none") * mask * (mask.numel() / mask.sum().item())).mean()

    model, optimizer, watched, _ = made_private(model, criterion=criterion)
    for mask in (torch.ones(6), (torch.arange(6) < 4) + 0.01):
        loss = watched(model(x.clone()), y, mask)
        with pytest.raises(PrivacyError, match="taken apart") if mask[5] < 1 else contextlib.nullcontext():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_criterion_is_taken_apart_in_every_batch_when_its_graph_says_nothing() -> None:
    """A cap on the mean is no cap on the records' losses; as long as nothing is above it, it cannot be seen."""
    model, x, _ = classifier()

    def criterion(out: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(out, target).clamp(max=10.0)

    model, optimizer, watched, _ = made_private(model, criterion=criterion)
    for far, refused in [(0.0, False), (0.1, False), (torch.tensor([9.0, 0, 0, 0, 0, 0]).view(6, 1), True)]:
        loss = watched(model(x.clone()), model(x).detach() + far)
        with pytest.raises(PrivacyError, match="taken apart") if refused else contextlib.nullcontext():
            loss.backward()
        optimizer.zero_grad()


class OpaqueMean(torch.autograd.Function):
    """A loss of which autograd's graph shows nothing."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(out, target)
        return (out - target).square().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, target = ctx.saved_tensors
        return grad * 2 * (out - target) / out.numel(), None


CRITERIA = {
    "opaque": OpaqueMean.apply,
    "squares": lambda out, target: (out - target).square().mean(),
    "smoothed": lambda out, target: F.cross_entropy(out, target.argmax(1), label_smoothing=0.1),
}


@pytest.mark.parametrize("sizes", [(6, 1, 4), (1, 6, 1)], ids=str)
@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_may_meet_one_record_alone(name: str, sizes: tuple[int, ...]) -> None:
    """The last piece of a memory manager often has one."""
    model, x, _ = classifier()
    model, optimizer, watched, _ = made_private(model, criterion=lambda out, target: CRITERIA[name](out, target))
    for size in sizes:
        watched(model(x[:size].clone()), x[:size, :3]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loop_over_the_records_may_meet_batches_of_all_sizes(reduction: str) -> None:
    model, x, y = classifier()
    model, optimizer, _ = made_private(model, loss_reduction=reduction)
    for size in (6, 4, 1, 5):
        each = [F.cross_entropy(out, target) for out, target in zip(model(x[:size].clone()), y[:size], strict=True)]
        (torch.stack(each).mean() if reduction == "mean" else torch.stack(each).sum()).backward()
        assert optimizer.total.holds
        optimizer.step()
        optimizer.zero_grad()


def test_vectors_of_sums_over_the_batch_are_not_multiplied_by_what_was_counted() -> None:
    model, x, y = classifier()
    model, _, _ = made_private(model, loss_reduction="sum")
    whose = F.one_hot(y, 3).double()
    by_class = (F.cross_entropy(model(x), y, reduction="none").unsqueeze(1) * whose).sum(0)
    with pytest.raises(PrivacyError, match="a product of vectors"):
        by_class.dot(1 / whose.sum(0)).backward()


def test_another_loss_after_the_first_batch_is_looked_at_too() -> None:
    model, x, _ = classifier()
    model, optimizer, _ = made_private(model)
    (model(x) - x[:, :3]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    out = model(x.clone())
    with pytest.raises(PrivacyError, match="compares records"):
        (out - out.mean(0)).square().mean().backward()


def test_a_criterion_that_turns_to_comparing_records_is_refused() -> None:
    """Its numbers stay the same."""
    model, x, _ = classifier()
    compares = False

    def criterion(out: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(out, out.roll(1, 0) if compares else target)

    model, optimizer, watched, _ = made_private(model, criterion=criterion)
    watched(model(x), x[:, :3]).backward()
    optimizer.step()
    optimizer.zero_grad()
    compares = True
    with pytest.raises(PrivacyError, match="compares records"):
        watched(model(x.clone()), x[:, :3]).backward()


def test_a_backward_in_another_thread_does_not_hide_a_loss() -> None:
    model, x, y = classifier()
    model, _, _ = made_private(model)
    running, over = threading.Event(), threading.Event()
    other = torch.ones(1, requires_grad=True) * 2
    other.register_hook(lambda grad: (running.set(), over.wait(60), grad)[2])
    thread = threading.Thread(target=other.sum().backward)
    thread.start()
    try:
        assert running.wait(60)
        with pytest.raises(PrivacyError, match="weighted by class"):
            class_weighted(model, x, y).backward()
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("turned", [False, True])
def test_each_private_model_behind_a_loss_is_looked_at(turned: bool) -> None:
    """Also where one had an empty batch, whichever comes first."""
    first, x, y = classifier()
    second, _, _ = classifier()
    first, _, _ = made_private(first)
    second, _, _ = made_private(second, loss_reduction="sum")
    parts = [first(x[:0]).sum(), F.cross_entropy(second(x), y)]
    with pytest.raises(PrivacyError, match="loss_reduction='sum'"):
        (parts[turned] + parts[not turned]).backward()


def test_what_is_added_to_a_criterion_is_read_too() -> None:
    model, x, y = classifier()
    model, _, criterion, _ = made_private(model, criterion=nn.CrossEntropyLoss())
    out = model(x)
    loss = criterion(out, y) + out.square().sum() / 7
    with pytest.raises(PrivacyError, match="not one over the number of its records"):
        loss.backward()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    "loss",
    [
        lambda out, y: torch.stack([F.cross_entropy(out, y), out.square().mean()]).sum(),
        lambda out, y: torch.stack([F.cross_entropy(out, y), out.square().mean(), out.abs().mean()]).mean(),
        lambda out, y: out.square().mean(0).sum(),
        lambda out, y: out.square().mean(-2, keepdim=True).sum(),
        lambda out, y: (out.square().mean(0) * 2).mean(),
    ],
    ids=["two stacked", "three stacked", "sum over classes", "negative dimension", "mean over classes"],
)
def test_numbers_that_happen_to_be_as_many_as_the_records_are_not_taken_for_them(
    n: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model, x, y = classifier()
    assert sensitivity(model, lambda m, x, y: loss(m(x), y), x[:n], y[:n], "bk") <= C * (1 + 1e-6)


def test_dividing_by_the_accumulation_steps_again_is_hinted_at() -> None:
    model, x, y = classifier()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.repeat(8, 1), y.repeat(8)), batch_size=8)
    model, _, loader = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader, noise_multiplier=1.0,
        max_grad_norm=C, accumulation_steps=2,
    )  # fmt: skip
    batch, labels = next(iter(loader))
    with pytest.warns(UserWarning, match="Leave the division out"):
        (F.cross_entropy(model(batch), labels) / 2).backward()


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize(("declared", "actual"), [("mean", "sum"), ("sum", "mean")])
def test_another_reduction_inside_a_scaled_loss_is_refused(declared: str, actual: str, scale: float) -> None:
    model, x, y = classifier()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        first = F.cross_entropy(m(x), y, reduction=actual)
        return first + scale * F.cross_entropy(m(x), y, reduction=declared)

    with pytest.raises(PrivacyError, match=f"loss_reduction={actual!r}"):
        released_sum(model, loss, x, y, "bk", loss_reduction=declared)


@pytest.mark.parametrize("mode", MODES)
def test_class_weights_with_a_sum_are_bounded(mode: str) -> None:
    model, x, y = classifier()
    weight = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y, weight=weight, reduction="sum")

    assert sensitivity(model, loss, x, y, mode, loss_reduction="sum") <= C * (1 + 1e-6)


@pytest.mark.parametrize(("declared", "actual"), [("mean", "sum"), ("sum", "mean")])
def test_another_reduction_than_the_declared_one_is_refused(declared: str, actual: str) -> None:
    model, x, y = classifier()
    with pytest.raises(PrivacyError, match=f"loss_reduction={actual!r}"):
        released_sum(
            model, lambda m, x, y: F.cross_entropy(m(x), y, reduction=actual), x, y, "bk", loss_reduction=declared
        )


@pytest.mark.parametrize(
    "mean",
    [
        lambda each, n: each.sum() / n,
        lambda each, n: each.mean(),
        lambda each, n: each.sum() / float(n) / 4,
        lambda each, n: (each / torch.full((n,), 2.0)).mean(),
    ],
)
def test_a_mean_by_hand_is_bounded(mean: Callable[[Tensor, int], Tensor]) -> None:
    model, x, y = classifier()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return mean(F.cross_entropy(m(x), y, reduction="none"), len(x))

    assert 0.9 * C < sensitivity(model, loss, x, y, "bk") <= C * (1 + 1e-6)


def test_a_passed_criterion_that_is_normalised_over_the_batch_is_refused() -> None:
    model, x, y = classifier()

    def masked_mean(out: Tensor, y: Tensor) -> Tensor:
        weights = 1.0 + y.double()
        return (F.cross_entropy(out, y, reduction="none") * weights).sum() / weights.sum().item()

    engine = PrivacyEngine(seed=0)
    model, _, criterion, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=1.0, noise_multiplier=0.0, max_grad_norm=C, criterion=masked_mean,
    )  # fmt: skip
    with pytest.raises(PrivacyError, match="taken apart"):
        criterion(model(x), y)


def test_a_criterion_that_can_be_seen_to_be_wrong_is_refused_at_once() -> None:
    model, _, _ = classifier()
    for criterion, complaint in [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "class weights"),
        (nn.MSELoss(reduction="sum"), "reduction='sum'"),
        ("cross_entropy", "not callable"),
    ]:
        with pytest.raises(ConfigurationError, match=complaint):
            PrivacyEngine().make_private(
                module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
                expected_batch_size=1.0, noise_multiplier=1.0, max_grad_norm=C, criterion=criterion,
            )  # fmt: skip


def test_a_loss_computed_inside_the_model_is_refused() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3).double()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.linear(x), y)

    _, x, y = classifier()
    with pytest.raises(UnsupportedModuleError, match="compute the loss outside"):
        released_sum(Inside(), lambda m, x, y: m(x, y), x, y, "ghost")
