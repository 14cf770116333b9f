"""What may be looked at while a training runs, and what may not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ghostgrad.clipping import Measurement
from ghostgrad.errors import ConfigurationError, PrivacyError
from ghostgrad.optimizer import DPOptimizer
from ghostgrad.schedulers import value_at
from ghostgrad.session import Session
from ghostgrad.setup import check_flags

_BINS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)


class Watched(Protocol):
    """What a monitor needs of an engine."""

    _sessions: list[Session]

    def get_epsilon(self, delta: float, accountant: str | None = None) -> float:
        """Epsilon so far."""


class Monitor:
    """Numbers for the progress bar of a private training.

    Public, and free: `epsilon`, `steps`, `noise_multiplier`, `max_grad_norm` and `noise_to_signal`, which is worked out from
    the plan alone. The fraction of clipped records and quantiles of their gradient norms are functions of private records.
    There are two ways to them, of which each has to be asked for:

    * ``not_private=True``: exact, of the last logical batch, `exact_fraction_clipped` and `exact_norm_quantile`. For the eyes of
      those who may see the records; whatever you choose by them (C, the learning rate) is a release that epsilon does not count.
    * ``private_share=0.01``: noisy, `fraction_clipped` and `norm_quantile`, for that share of each step's budget. Epsilon stays
      as it is; the gradients get noise that is larger by ``1 / sqrt(1 - share)``. These may be published and acted upon.

    Formal guarantee of the second: that of `ghostgrad.clipping.Measurement`. Sum and counts of a step are together one
    Gaussian mechanism of the noise multiplier that the step is accounted with, on the same sample.

    It watches by itself from the moment it is made. Read it after ``optimizer.step()``, or in a hook behind the logical steps:
    ``optimizer.register_step_post_hook(lambda *_: bar.set_postfix(monitor.postfix()))``.

    Args:
        engine: with one private training; or say which by
        optimizer: the `DPOptimizer` to watch.
        delta: of epsilon. Default 1e-5.
        not_private: keep the exact norms of the last logical batch. Default False.
        private_share: share of each step's budget for noisy counts, in (0, 1). Default None: nothing is counted.
        bins: edges of the bins of the norm, in units of the sensitivity.

    Raises:
        ConfigurationError: no private training, or several; an argument out of range.
        PrivacyError: in the middle of a logical batch, part of which was not seen.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from ghostgrad import PrivacyEngine
    >>> model, engine = torch.nn.Linear(4, 2), PrivacyEngine()
    >>> data = TensorDataset(torch.randn(64, 4), torch.randint(2, (64,)))
    >>> model, optimizer, loader = engine.make_private(
    ...     module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=DataLoader(data, batch_size=16),
    ...     noise_multiplier=1.0, max_grad_norm=1.0)
    >>> monitor = Monitor(engine, private_share=0.05)
    >>> for x, y in loader:
    ...     torch.nn.functional.cross_entropy(model(x), y).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> sorted(monitor.postfix())
    ['C', 'clipped', 'epsilon', 'noise/signal', 'sigma', 'step']
    >>> 0 <= monitor.fraction_clipped <= 1
    True
    """

    def __init__(
        self,
        engine: Watched,
        *,
        optimizer: DPOptimizer | None = None,
        delta: float = 1e-5,
        not_private: bool = False,
        private_share: float | None = None,
        bins: Sequence[float] = _BINS,
    ) -> None:
        check_flags(not_private=not_private)
        self._engine, self._optimizer, self.delta = engine, _the_one(engine, optimizer), delta
        engine.get_epsilon(delta)  # a delta that cannot be used is said now
        total = self._optimizer.total
        measurement = None if private_share is None else Measurement(private_share, bins)
        if measurement is not None:
            self._check_room(measurement)
        if total.holds:
            raise PrivacyError(
                "a logical batch is being summed, and a part of it was not seen. Make the Monitor right after optimizer.step() "
                "and zero_grad(), or before the first batch."
            )
        self.not_private = not_private
        self._measurement = measurement
        if measurement is not None:
            self._optimizer.measurement = measurement
        self._watches = not_private or measurement is not None
        total.watchers += self._watches

    def _check_room(self, measurement: Measurement) -> None:
        if self._optimizer.measurement is not None:
            raise ConfigurationError(
                "another Monitor counts for a share of this optimizer's budget already; close() it first, or read that one."
            )
        sigma = value_at(self._optimizer.noise_multiplier, self._optimizer.steps, "noise_multiplier")
        self._optimizer.clip_function.effective_noise_multiplier(measurement.rest(sigma))

    def close(self) -> None:
        """Count and keep nothing from now on; the whole noise multiplier is the gradients' again."""
        self._optimizer.total.watchers -= self._watches
        self._watches = False
        if self._measurement is not None and self._optimizer.measurement is self._measurement:
            self._optimizer.measurement = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------ public

    @property
    def epsilon(self) -> float:
        """Epsilon so far at `delta`, by the engine's accountant."""
        return self._engine.get_epsilon(self.delta)

    @property
    def steps(self) -> int:
        """Logical steps so far."""
        return self._optimizer.steps

    @property
    def noise_multiplier(self) -> float:
        """Sigma of the next step as a whole."""
        return value_at(self._optimizer.noise_multiplier, self._optimizer.steps, "noise_multiplier")

    @property
    def max_grad_norm(self) -> Any:
        """C of the next step. With adaptive clipping it follows a count that was released with noise."""
        return self._optimizer.max_grad_norm

    @property
    def noise_to_signal(self) -> float:
        """Root mean square norm of the noise over the largest norm that the expected clipped sum can have; no data is used.

        ``sigma_g S sqrt(d) / (S B)`` for d trainable parameters, B expected records and sensitivity S: what one sees when
        all records' gradients are clipped and point the same way, so the true ratio is larger.
        """
        optimizer = self._optimizer
        count = sum(p.numel() for p in optimizer.params)
        sigma = optimizer.gradient_noise_multiplier(self.noise_multiplier)
        return sigma * math.sqrt(count) / optimizer.expected_batch_size

    def postfix(self) -> dict[str, str]:
        """For ``tqdm``'s ``set_postfix``: public numbers, and the private ones that were asked for (exact ones carry a ``!``)."""
        bound = self.max_grad_norm
        shown = {
            "step": str(self.steps),
            "epsilon": f"{self.epsilon:.3g}",
            "sigma": f"{self.noise_multiplier:.3g}",
            "C": f"{self._optimizer.clip_function.sensitivity if isinstance(bound, list) else bound:.3g}",
            "noise/signal": f"{self.noise_to_signal:.3g}",
        }
        if self._measurement is not None and self._measurement.counts is not None:
            shown["clipped"] = f"{self.fraction_clipped:.2f}"
        if self.not_private and self._optimizer.total.last_seen is not None:
            shown["clipped!"] = f"{self.exact_fraction_clipped:.2f}"
        return shown

    # ------------------------------------------------------------------ private, with noise, for a share of the budget

    @property
    def counts(self) -> Tensor:
        """The noisy counts of the last step as they were released, float64: clipped records, then one for each bin.

        Raises:
            PrivacyError: nothing was counted.
        """
        if self._measurement is None:
            raise PrivacyError(
                "the fraction of clipped records and their norms are private. Ask for noisy ones with "
                "Monitor(engine, private_share=0.01), or for exact ones, not to be published, with not_private=True."
            )
        if self._measurement.counts is None:
            raise ConfigurationError("no step was made since this Monitor was made; there is nothing to read yet.")
        return self._measurement.counts.clone()

    @property
    def fraction_clipped(self) -> float:
        """Noisy share of the expected batch that was clipped in the last step, moved into [0, 1]."""
        counts = self.counts
        assert self._measurement is not None
        return min(1.0, max(0.0, float(counts[0]) / self._measurement.expected_records))

    def norm_quantile(self, quantile: float) -> float:
        """The norm below which that share of the last step's records is, from noisy counts.

        Negative counts are taken as 0 and norms as spread evenly within a bin; infinity where the quantile is in the last
        bin, above all edges.

        Raises:
            ConfigurationError: outside [0, 1], or no step yet.
            PrivacyError: nothing was counted.
        """
        _check_quantile(quantile)
        counts = self.counts[1:].clamp(min=0.0).tolist()
        assert self._measurement is not None
        edges = [0.0, *(edge * self._measurement.scale for edge in self._measurement.bins), math.inf]
        wanted, before = quantile * math.fsum(counts), 0.0
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            if count > 0.0 and before + count >= wanted:
                return high if math.isinf(high) else low + (high - low) * max(0.0, wanted - before) / count
            before += count
        return math.nan

    # ------------------------------------------------------------------ not private

    @property
    def exact_fraction_clipped(self) -> float:
        """NOT PRIVATE: share of the last logical batch's records (of this rank) that were clipped; NaN if it was empty."""
        clipped = self._exact()[1]
        return float(clipped.double().mean()) if len(clipped) else math.nan

    def exact_norm_quantile(self, quantile: float) -> float:
        """NOT PRIVATE: quantile of the gradient norms of the last logical batch (of this rank), by linear interpolation.

        A record that is not finite counts with an infinite norm; NaN where the batch was empty.
        """
        _check_quantile(quantile)
        norms: list[float] = self._exact()[0].sort().values.tolist()
        if not norms:
            return math.nan
        place = quantile * (len(norms) - 1)
        low, high = norms[math.floor(place)], norms[math.ceil(place)]
        return low if low == high or place == math.floor(place) else low + (high - low) * (place - math.floor(place))

    def _exact(self) -> tuple[Tensor, Tensor]:
        if not self.not_private:
            raise PrivacyError(
                "exact norms and clipped fractions are functions of private records without noise. Ask for them with "
                "Monitor(engine, not_private=True), for your eyes only; or for noisy ones with private_share=0.01."
            )
        seen = self._optimizer.total.last_seen
        if seen is None:
            raise ConfigurationError("no step was made since this Monitor was made; there is nothing to read yet.")
        return seen.norms, seen.clipped


def _check_quantile(quantile: float) -> None:
    if not 0 <= quantile <= 1:
        raise ConfigurationError(f"quantile={quantile!r} must lie in [0, 1].")


def _the_one(engine: Watched, optimizer: DPOptimizer | None) -> DPOptimizer:
    found = [session.optimizer for session in engine._sessions if optimizer is None or session.optimizer is optimizer]
    if len(found) != 1:
        raise ConfigurationError(
            f"this engine has {len(engine._sessions)} private trainings, of which {len(found)} are meant; call make_private "
            f"first, and with several say which by optimizer=."
        )
    return found[0]
