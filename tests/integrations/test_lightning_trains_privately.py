"""`DPCallback` makes the training of an unmodified LightningModule private."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)

from ghostgrad.errors import ConfigurationError, PrivacyError  # noqa: E402
from ghostgrad.integrations.lightning import DPCallback  # noqa: E402
from ghostgrad.integrations.plan import PrivacyPlan  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what lightning warns about

RECORDS = 48


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class Classifier(lightning.LightningModule):
    """As people write it; knows nothing of privacy."""

    def __init__(self, style: str = "forward") -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.style = style
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        self.seen.append((x, y))
        scores = self(x) if self.style == "forward" else self.model(x)
        loss = F.cross_entropy(scores, y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]


def loader(batch_size: int = 8) -> DataLoader[Any]:
    x = torch.randn(RECORDS, 6)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=batch_size, shuffle=True)


def fit(folder: Path, module: Any, callback: DPCallback, checkpoint: str | None = None, **options: Any) -> Any:
    chosen = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=[callback], enable_progress_bar=False,
        enable_model_summary=False, **chosen,
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return trainer


def textbook_update(model: nn.Module, x: Tensor, y: Tensor, bound: float, size: float) -> list[Tensor]:
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        norm = float(sum(g.square().sum() for g in grads) ** 0.5)
        total = [t + g * min(1.0, bound / norm) for t, g in zip(total, grads, strict=True)]
    return [t / size for t in total]


@pytest.mark.parametrize("style", ["forward", "child"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_the_textbook_step_of_the_whole_logical_batch(tmp_path: Path, style: str, parts: int) -> None:
    module = Classifier(style)
    before = copy.deepcopy(module.model)
    callback = DPCallback(PrivacyPlan(1e-3, noise_multiplier=0.0, seed=0), max_grad_norm=0.3)
    fit(tmp_path, module, callback, max_steps=1, accumulate_grad_batches=parts)
    assert len(module.seen) == parts
    x, y = (torch.cat(column) for column in zip(*module.seen, strict=True))
    expected = textbook_update(before, x, y, 0.3, 8.0 * parts)
    for old, new, step in zip(before.parameters(), module.model.parameters(), expected, strict=True):
        assert torch.allclose((old - new) / 0.5, step, atol=1e-6)


def test_epsilon_is_logged_and_the_budget_is_planned(tmp_path: Path) -> None:
    callback = DPCallback(PrivacyPlan(1e-3, target_epsilon=2.0), max_grad_norm=1.0)
    trainer = fit(tmp_path, Classifier(), callback, max_epochs=3, accumulate_grad_batches=2)
    assert callback.engine.steps == trainer.global_step == 9
    assert 1.5 < callback.engine.get_epsilon(1e-3) <= 2.0
    assert trainer.callback_metrics["privacy/epsilon"] == pytest.approx(callback.engine.get_epsilon(1e-3))
    assert trainer.callback_metrics["privacy/steps"] == 9


def test_training_learns_and_the_module_is_its_own_again(tmp_path: Path) -> None:
    module = Classifier()
    fit(tmp_path, module, DPCallback(PrivacyPlan(1e-3, noise_multiplier=0.3), max_grad_norm=1.0), max_epochs=20)
    x, y = next(iter(loader(RECORDS)))
    assert (module(x).argmax(1) == y).float().mean() > 0.8
    module.train()
    F.cross_entropy(module(x), y).backward()
    assert module.model[0].weight.grad is not None


def test_empty_batches_are_steps(tmp_path: Path) -> None:
    module = Classifier()
    callback = DPCallback(PrivacyPlan(1e-3, noise_multiplier=1.0, seed=0), max_grad_norm=1.0)
    trainer = lightning.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=[callback], enable_progress_bar=False, logger=False,
        enable_model_summary=False, enable_checkpointing=False, max_steps=25,
    )  # fmt: skip
    trainer.fit(module, loader(batch_size=1))
    assert callback.engine.steps == 25
    assert any(len(x) == 0 for x, _ in module.seen)
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_resuming_goes_on_with_what_was_spent(tmp_path: Path) -> None:
    plan = PrivacyPlan(1e-3, noise_multiplier=1.0, seed=0)
    whole = DPCallback(plan, max_grad_norm=1.0)
    fit(tmp_path, Classifier(), whole, max_epochs=4)
    first = DPCallback(plan, max_grad_norm=1.0)
    trainer = fit(tmp_path, Classifier(), first, max_epochs=2, enable_checkpointing=True)
    path = str(tmp_path / "half.ckpt")
    trainer.save_checkpoint(path)
    resumed = DPCallback(plan, max_grad_norm=1.0)
    fit(tmp_path, Classifier(), resumed, path, max_epochs=4)
    assert resumed.engine.accountant.history == whole.engine.accountant.history


class KeepsOne(lightning.Callback):
    """Saves the training once, after a step in the middle of a pass."""

    def __init__(self, path: str, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [3, 6, 8])
def test_a_seeded_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, step: int) -> None:
    """Passes have 6 steps: interrupted within the first, at its end, and within the second."""
    plan = PrivacyPlan(1e-3, noise_multiplier=1.0, seed=1)
    path = str(tmp_path / "some.ckpt")
    data, modules, callbacks = loader(), [], []
    for checkpoint in (None, path):
        torch.manual_seed(1)
        modules.append(Classifier())
        callbacks.append(DPCallback(plan, max_grad_norm=1.0))
        trainer = lightning.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", callbacks=[callbacks[-1], KeepsOne(path, step)], logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_epochs=3,
        )  # fmt: skip
        trainer.fit(modules[-1], data, ckpt_path=checkpoint)
        path = path if checkpoint is None else ""
    for whole, resumed in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(whole, resumed)
    assert callbacks[1].engine.accountant.history == callbacks[0].engine.accountant.history == [(1.0, 8 / 48, 18)]
    assert callbacks[1].engine.steps == 18


def test_a_second_fit_goes_on_spending(tmp_path: Path) -> None:
    module, callback = Classifier(), DPCallback(PrivacyPlan(1e-3, noise_multiplier=1.0), max_grad_norm=1.0)
    fit(tmp_path, module, callback)
    fit(tmp_path, module, callback)
    assert len(callback.engine.accountant) == callback.engine.steps == 12


def test_manual_optimization_is_private_too(tmp_path: Path) -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    callback = DPCallback(PrivacyPlan(1e-3, noise_multiplier=1.0), max_grad_norm=1.0)
    fit(tmp_path, Manual(), callback)
    assert callback.engine.steps == 6


def test_weights_used_outside_what_is_private_are_refused(tmp_path: Path) -> None:
    class Reaching(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model[2](self.model[1](self.model[0](batch[0]))), batch[1])

    with pytest.raises(PrivacyError):
        fit(tmp_path, Reaching(), DPCallback(PrivacyPlan(1e-3, noise_multiplier=1.0), max_grad_norm=1.0))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"overfit_batches": 2}, "overfit_batches"),
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, "limit_train_batches"),
        ({"max_epochs": -1}, "unlimited"),
    ],
)
def test_trainers_without_a_private_form_are_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    callback = DPCallback(PrivacyPlan(1e-3, noise_multiplier=1.0), max_grad_norm=1.0)
    with pytest.raises(ConfigurationError, match=named):
        fit(tmp_path, Classifier(), callback, **options)
    assert callback.engine.steps == 0
