"""Faults of a private training, planted in the library one at a time: each loses privacy, and none raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ghostgrad import DPOptimizer, setup
from ghostgrad.gradients import Matmul
from ghostgrad.keys import RunKey
from ghostgrad.noise import KeyedGaussian
from ghostgrad.session import SessionPlan
from ghostgrad.spending import PoissonSpending

_add, _streams, _write = KeyedGaussian._add, KeyedGaussian._streams, DPOptimizer._write_gradients
_private_loader = setup.private_loader


def noise_scaled(factor: float) -> AbstractContextManager[Any]:
    """``factor * sigma * C`` is added where sigma C is accounted."""

    def add(self: KeyedGaussian, parts: Sequence[Any], *, std: float, step: int, index: int) -> None:
        _add(self, parts, std=factor * std, step=step, index=index)

    return patch.object(KeyedGaussian, "_add", add)


def noise_missing_on_the_last_parameter() -> AbstractContextManager[Any]:
    """All parameters but the last get their noise."""

    def add_all(self: KeyedGaussian, parts: Sequence[tuple[int, Tensor]], *, std: float, step: int) -> None:
        _add(self, parts[:-1], std=std, step=step, index=0)

    return patch.object(KeyedGaussian, "add_all_", add_all)


def divisor_of_the_drawn_batch() -> AbstractContextManager[Any]:
    """The noisy sum is divided by the number of records that were drawn, not by the expected one."""

    def write(self: DPOptimizer, noise_multiplier: float, size: float) -> None:
        _write(self, noise_multiplier, float(max(1, self.total._rows.total())))

    return patch.object(DPOptimizer, "_write_gradients", write)


@contextmanager
def rows_clipped() -> Iterator[None]:
    """Each position's gradient is clipped to C instead of each record's: the norm is that of the largest row."""

    def sq_norms(self: Matmul) -> Tensor:
        rows = self.x.square().sum(-1) * self.dy.square().sum(-1)
        return torch.amax(rows.sum(1), dim=1)

    with patch.object(Matmul, "sq_norms", sq_norms), patch.object(Matmul, "compact", lambda self, room: self):
        yield


@contextmanager
def batches_not_drawn() -> Iterator[None]:
    """The user's own batches are handed out, and accounted as if they were Poisson samples."""

    def loader(data_loader: Any, key: RunKey, poisson: bool, rate: float | None, *more: Any, **options: Any) -> Any:
        own = _private_loader(data_loader, key, False, None, *more, **options)
        assert own is not None
        own.sample_rate = rate or own.sample_rate
        return own

    spending = property(lambda self: PoissonSpending(self.sample_rate))
    with patch.object(setup, "private_loader", loader), patch.object(SessionPlan, "spending", spending):
        yield


def noise_comes_again() -> AbstractContextManager[Any]:
    """The noise of a step is a function of the step alone: a resumed training draws the same."""

    def streams(self: KeyedGaussian, step: int, index: int, dtype: torch.dtype) -> Any:
        same = KeyedGaussian(RunKey.from_seed(0))
        return _streams(same, step, index, dtype)

    return patch.object(KeyedGaussian, "_streams", streams)


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "sigma halved": partial(noise_scaled, 0.5),
    "no noise on one parameter": noise_missing_on_the_last_parameter,
    "divided by the drawn batch size": divisor_of_the_drawn_batch,
    "rows clipped, not records": rows_clipped,
    "batches not drawn by Poisson": batches_not_drawn,
    "noise again after a resume": noise_comes_again,
}
