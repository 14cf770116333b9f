"""`engine.check` passes what is right, and finds each thing that is wrong, by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import MODES, RECORDS, TinyGPT, drawn, next_word, sentences
from torch import Tensor, nn

from ghostgrad import ModuleValidator, PrivacyEngine
from ghostgrad.checking import CheckReport
from ghostgrad.gradients import Explicit
from ghostgrad.layers import registered_rule
from ghostgrad.layers.linear import linear


def mlp(*between: nn.Module) -> nn.Module:
    return drawn(lambda: nn.Sequential(nn.Linear(4, 8), *between, nn.ReLU(), nn.Linear(8, 3)))


def table(n: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(n) % 3


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def check(module, batch, loss_fn, **options) -> CheckReport:
    return PrivacyEngine().check(batch, loss_fn, module=module, verbose=False, **options)


def failing(report: CheckReport) -> list[str]:
    return [finding.what for finding in report.findings if not finding.holds]


MODEL, LOSS, SUM = (
    "the model treats records one by one", "the loss treats records one by one",
    "the batch's gradient is the sum of its records'",
)  # fmt: skip
EXACT = [f"{mode} is exact" for mode in ("hooks", "functorch", "bk", "ghost")]


# ---------------------------------------------------------------------- what is right


class Classifier(nn.Module):
    """Takes a dictionary by keyword, returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 4), nn.Linear(4, 3)

    def forward(self, *, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        summed = (self.words(input_ids) * mask.unsqueeze(-1)).sum(1)
        return {"logits": self.head(summed / mask.sum(1, keepdim=True))}


def dict_batch() -> dict[str, Tensor]:
    mask = torch.ones(RECORDS, 6, dtype=torch.float64)
    mask[1, 3:] = mask[4, 1:] = 0
    return {"input_ids": sentences(), "mask": mask, "labels": torch.arange(RECORDS) % 3}


def dict_loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(module(input_ids=batch["input_ids"], mask=batch["mask"])["logits"], batch["labels"])


CLEAN = {
    "mlp": (mlp, table, cross_entropy),
    "mlp with dropout": (lambda: mlp(nn.Dropout(0.5)), table, cross_entropy),
    "gpt, tied": (lambda: drawn(lambda: TinyGPT(dropout=0.2)), sentences, lambda m, b: next_word(m, b).mean()),
    "gpt, checkpointed": (lambda: drawn(lambda: TinyGPT(True)), sentences, lambda m, b: next_word(m, b).mean()),
    "dictionaries": (lambda: drawn(Classifier), dict_batch, dict_loss),
    "attention with dropout": (
        lambda: drawn(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.4, batch_first=True)),
        lambda: torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        lambda m, b: m(b).square().mean((1, 2)).mean(),
    ),
    "a frozen layer in eval mode": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8).eval(), nn.Linear(8, 3)).double(), table, cross_entropy,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_model_passes_with_everything_exact(name):
    build, batch, loss_fn = CLEAN[name]
    report = check(build(), batch(), loss_fn)
    assert failing(report) == []
    assert report.holds
    assert bool(report)
    assert set(report.modes) == set(MODES)
    assert all(off is not None and off < 1e-9 for off in report.modes.values())


def test_single_precision_and_bfloat16():
    x, y = table()
    assert check(mlp().float(), (x.float(), y), cross_entropy).holds
    assert check(mlp().bfloat16(), (x.bfloat16(), y), cross_entropy).holds


def test_a_sum_and_a_time_first_model():
    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]).mean(0), batch[1], reduction="sum")

    x = torch.randn(7, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    report = check(mlp(), (x, torch.arange(5) % 3), loss_fn, loss_reduction="sum", batch_first=False)
    assert failing(report) == []
    assert LOSS in failing(check(mlp(), (x, torch.arange(5) % 3), loss_fn, batch_first=False)), "a sum is not a mean"


# ---------------------------------------------------------------------- what is wrong


def test_batch_statistics_of_a_batch_norm_and_the_way_out():
    model = drawn(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 3)))
    batch = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.arange(5) % 3
    report = check(model, batch, cross_entropy)
    assert MODEL in failing(report)
    assert set(EXACT) <= set(failing(report))
    assert "ModuleValidator.fix" in str(report)
    assert check(ModuleValidator.fix(model), batch, cross_entropy).holds


def test_a_batch_norm_over_features_which_cannot_take_one_record():
    report = check(mlp(nn.BatchNorm1d(8)), table(), cross_entropy)
    assert failing(report)[0] == "the model and the loss take one record alone"
    assert "ModuleValidator.fix" in str(report)


class Centred(nn.Module):
    """Subtracts the batch's mean, detached, so that no gradient shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True).detach()


def test_centring_over_the_batch_that_is_in_no_gradient():
    report = check(mlp(Centred()), table(), cross_entropy)
    assert MODEL in failing(report)


def test_a_mean_over_the_tokens_of_the_batch():
    ids = sentences()
    labels = ids.clone()
    labels[0, 2:] = labels[3, 4:] = -100

    def token_mean(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0])[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten(), ignore_index=-100)

    report = check(drawn(TinyGPT), (ids, labels), token_mean)
    assert MODEL not in failing(report)
    assert {LOSS, SUM, *EXACT} <= set(failing(report))
    assert "non-ignored tokens" in str(report)


def test_a_token_mean_whose_divisor_is_a_number_that_the_graph_does_not_show():
    mask = (torch.arange(6) < torch.tensor([6, 2, 4, 3, 6]).unsqueeze(1)).double()

    def counted(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, mask = batch
        each = F.cross_entropy(module(ids).transpose(1, 2), ids, reduction="none")
        return (each * mask).sum() / mask.sum().item()

    report = check(drawn(TinyGPT), (sentences(), mask), counted)
    assert {LOSS, SUM} <= set(failing(report))


def test_a_mean_weighted_by_class():
    weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    report = check(mlp(), table(), lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=weights))
    assert {LOSS, SUM, *EXACT} <= set(failing(report))
    assert "class weights" in str(report)


class TiedByHand(nn.Module):
    """The embedding's table is also the head, through a function and not through a module."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(11, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.body(self.words(ids)), self.words.weight)


def test_a_functional_use_inside_the_model_is_shown_and_exact():
    report = check(drawn(TiedByHand), sentences(), lambda m, b: next_word(m, b).mean())
    assert report.holds
    (row,) = [finding for finding in report.findings if finding.what == "every use of a weight is measured"]
    assert "words.weight outside its module" in row.found


def test_a_functional_use_in_the_loss_is_refused_by_name():
    def with_penalty(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(module, batch) + 0.1 * module[0].weight.square().sum()

    report = check(mlp(), table(), with_penalty)
    assert set(EXACT) <= set(failing(report))
    assert "0.weight received a gradient that did not pass through a call" in " ".join(str(report).split())


def test_a_record_that_is_not_a_number_is_named_and_does_not_spoil_the_rest():
    x, y = table()
    x[2, 1] = float("nan")
    report = check(mlp(), (x, y), cross_entropy)
    assert failing(report) == ["every record's gradient is finite"]
    assert "records [2]" in str(report)


@pytest.mark.parametrize("fault", ["twice the bias", "sign", "summed over positions only"])
def test_a_registered_rule_that_is_wrong_is_named(fault):
    def wrong(call):
        uses = linear(call)
        factor = {"twice the bias": 2.0, "sign": -1.0, "summed over positions only": 0.0}[fault]
        return {**uses, "bias": Explicit(factor * uses["bias"].grad_samples())}

    class Mine(nn.Linear):
        pass

    with registered_rule(Mine, wrong):
        model = drawn(lambda: nn.Sequential(Mine(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        report = check(model, table(), cross_entropy)
    assert failing(report) == ["hooks is exact", "bk is exact", "ghost is exact"]
    assert report.modes["functorch"] < 1e-9
    text = " ".join(str(report).split())
    assert "0.bias" in text
    assert "registered rule of Mine" in text


def test_in_batch_negatives():
    def contrastive(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        codes = module(batch[0])
        return F.cross_entropy(codes @ codes.T, torch.arange(len(codes)))

    report = check(mlp(), table(), contrastive)
    assert {LOSS, SUM, *EXACT} <= set(failing(report))


def test_a_criterion_that_checks_itself_is_a_finding_and_not_an_error():
    def by_tokens(logits: Tensor, labels: Tensor) -> Tensor:
        counted = (labels != 2).double()
        return (F.cross_entropy(logits, labels, reduction="none") * counted).sum() / counted.sum().clamp(min=1).item()

    engine, model = PrivacyEngine(seed=0), mlp()
    engine_model, _, criterion, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=None, sample_rate=0.5,
        expected_batch_size=3, noise_multiplier=1.0, max_grad_norm=1.0, criterion=by_tokens,
    )  # fmt: skip
    assert engine_model is model
    report = engine.check(table(), lambda m, b: criterion(m(b[0]), b[1]), verbose=False)
    assert LOSS in failing(report)
    assert "taken apart" in " ".join(str(report).split())
