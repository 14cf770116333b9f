"""What may be looked at in a training: public numbers, exact private ones on request, and noisy ones that are paid for."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, Monitor, PrivacyEngine
from ghostgrad.clipping import Measurement, Seen
from ghostgrad.errors import ConfigurationError, PrivacyError

MODES = ["hooks", "ghost", "bk", "functorch"]
CLIPPINGS: list[tuple[str, Any]] = [
    ("flat", 0.8), ("per_layer", [0.4, 0.3, 0.5, 0.2]), ("automatic", 0.8), ("adaptive", 0.8)
]  # fmt: skip
BINS = (0.5, 1.0, 2.0)


def make(n: int = 12, *, seed: int = 0, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,)))
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    engine = PrivacyEngine(seed=seed)
    options = {
        "noise_multiplier": 1.0, "max_grad_norm": 0.8, "sample_rate": 0.5, "data_loader": DataLoader(data, batch_size=6),
        **options,
    }  # fmt: skip
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    return engine, *engine.make_private(module=module, optimizer=optimizer, **options)


def step(module: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def looked_at(module: nn.Module, x: Tensor, y: Tensor, clipping: str, bound: Any) -> tuple[list[float], list[bool]]:
    """Each record's gradient norm and whether clipping changes its gradient, from the definitions, one record at a time."""
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    plain.load_state_dict(module.state_dict())
    norms, clipped = [], []
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1]), list(plain.parameters()))
        total = torch.cat([g.flatten() for g in grads]).norm().item()
        norms.append(total)
        if clipping == "per_layer":
            clipped.append(any(g.norm().item() > c for g, c in zip(grads, bound, strict=True)))
        else:
            clipped.append(total + 0.01 > bound if clipping == "automatic" else total > bound)
    return norms, clipped


def quantile(norms: list[float], q: float) -> float:
    return float(torch.tensor(norms, dtype=torch.float64).quantile(q))


def histogram(norms: list[float], sensitivity: float) -> list[int]:
    edges = [0.0, *(edge * sensitivity for edge in BINS), math.inf]
    return [sum(low < norm <= high for norm in norms) for low, high in pairwise(edges)]


# ------------------------------------------------------------------ exact


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("clipping", "bound"), CLIPPINGS)
@pytest.mark.parametrize("physical", [None, 2])
def test_exact_numbers_are_those_of_the_loop_over_records(
    mode: str, clipping: str, bound: Any, physical: int | None
) -> None:
    engine, module, optimizer, loader = make(grad_sample_mode=mode, clipping=clipping, max_grad_norm=bound)
    monitor = Monitor(engine, not_private=True)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical or 12, optimizer=optimizer) as pieces:
        norms: list[float] = []
        clipped: list[bool] = []
        for x, y in pieces:
            found = looked_at(module, x, y, clipping, optimizer.max_grad_norm)
            norms, clipped = norms + found[0], clipped + found[1]
            before = optimizer.steps
            step(module, optimizer, x, y)
            if optimizer.steps > before:
                assert len(norms) > 1
                assert monitor.exact_fraction_clipped == pytest.approx(sum(clipped) / len(clipped), abs=1e-12)
                for q in (0.0, 0.3, 0.5, 1.0):
                    assert monitor.exact_norm_quantile(q) == pytest.approx(quantile(norms, q), rel=1e-9)
                norms, clipped = [], []
    assert optimizer.steps == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("clipping", "bound"), CLIPPINGS)
def test_counts_without_noise_are_those_of_the_loop_over_records(mode: str, clipping: str, bound: Any) -> None:
    engine, module, optimizer, loader = make(
        noise_multiplier=0.0, grad_sample_mode=mode, clipping=clipping, max_grad_norm=bound, accumulation_steps=2
    )
    monitor = Monitor(engine, private_share=0.1, bins=BINS)
    norms: list[float] = []
    clipped: list[bool] = []
    for x, y in loader:
        sensitivity = optimizer.clip_function.sensitivity
        found = looked_at(module, x, y, clipping, optimizer.max_grad_norm)
        norms, clipped = norms + found[0], clipped + found[1]
        before = optimizer.steps
        step(module, optimizer, x, y)
        if optimizer.steps > before:
            assert monitor.counts.tolist() == [sum(clipped), *histogram(norms, sensitivity)]
            assert sum(monitor.counts[1:]) == len(norms)
            norms, clipped = [], []
    assert optimizer.steps == 2


def test_accumulated_draws_are_counted_together() -> None:
    engine, module, optimizer, loader = make(noise_multiplier=0.0)
    monitor = Monitor(engine, private_share=0.1)
    sizes = 0
    for x, y in loader:
        F.cross_entropy(module(x), y).backward()
        sizes += len(x)
    optimizer.step()
    assert float(monitor.counts[1:].sum()) == sizes
    assert monitor.fraction_clipped == min(1.0, float(monitor.counts[0]) / 12.0), "two draws of 6 expected records"


def test_a_batch_left_in_the_middle_is_forgotten() -> None:
    engine, module, optimizer, loader = make(noise_multiplier=0.0, sample_rate=1.0)
    monitor = Monitor(engine, private_share=0.1, not_private=True)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=5, optimizer=optimizer) as pieces:
        x, y = next(iter(pieces))
        step(module, optimizer, x, y)
    step(module, optimizer, *next(iter(loader)))
    assert float(monitor.counts[1:].sum()) == 12.0


def test_records_that_are_not_finite_are_in_the_last_bin_and_clipped() -> None:
    engine, module, optimizer, _ = make(data_loader=None, expected_batch_size=4.0, noise_multiplier=0.0)
    monitor = Monitor(engine, private_share=0.5, not_private=True, bins=(100.0,))
    x = torch.zeros(4, 4, dtype=torch.float64)
    x[1, 0], x[2, 0] = math.nan, math.inf
    step(module, optimizer, x, torch.tensor([0, 1, 2, 0]))
    _, below, above = monitor.counts.tolist()
    assert (below, above) == (2.0, 2.0)
    assert monitor.exact_norm_quantile(1.0) == math.inf
    assert math.isfinite(monitor.exact_norm_quantile(0.0))
    assert monitor.norm_quantile(0.9) == math.inf
    assert monitor.exact_fraction_clipped >= 0.5


def test_an_empty_batch() -> None:
    engine, module, optimizer, _ = make(data_loader=None, expected_batch_size=4.0, noise_multiplier=0.0)
    monitor = Monitor(engine, private_share=0.5, not_private=True)
    step(module, optimizer, torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    assert monitor.counts.tolist() == [0.0] * (len(monitor.counts))
    assert math.isnan(monitor.exact_fraction_clipped)
    assert math.isnan(monitor.exact_norm_quantile(0.5))
    assert math.isnan(monitor.norm_quantile(0.5))
    assert monitor.fraction_clipped == 0.0


# ------------------------------------------------------------------ privacy


@pytest.mark.parametrize("share", [0.01, 0.3])
@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_a_step_with_counts_is_one_gaussian_of_the_noise_multiplier_that_is_accounted(
    share: float, clipping: str
) -> None:
    """Precisions of the mechanisms on one sample add up to that of the step."""
    engine, _, optimizer, _ = make(clipping=clipping, noise_multiplier=1.3)
    Monitor(engine, private_share=share)
    measurement = optimizer.measurement
    precision = optimizer.gradient_noise_multiplier(1.3) ** -2 + (measurement.std(1.3) / math.sqrt(2)) ** -2
    if clipping == "adaptive":
        precision += (2 * optimizer.clip_function.unclipped_num_std) ** -2
    assert precision == pytest.approx(1.3**-2, rel=1e-12)
    assert (measurement.std(1.3) / math.sqrt(2)) ** -2 == pytest.approx(share * 1.3**-2, rel=1e-12)


def test_one_record_moves_the_counts_by_at_most_the_root_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    sq_norms = torch.rand(30, 4, generator=generator, dtype=torch.float64) * 3
    factors = torch.where(sq_norms > 1.5, 0.5, 1.0)
    measurement = Measurement(0.1, BINS)
    whole = measurement.count(Seen.of(sq_norms, factors), 1.0)
    moves = []
    for i in range(30):
        rest = [j for j in range(30) if j != i]
        without = measurement.count(Seen.of(sq_norms[rest], factors[rest]), 1.0)
        moves.append(float((whole - without).norm()))
    assert max(moves) == math.sqrt(2)
    assert min(moves) == 1.0


def test_the_ledger_is_that_of_the_training_without_a_monitor() -> None:
    ledgers = []
    for share in (None, 0.2):
        engine, module, optimizer, loader = make()
        Monitor(engine, private_share=share)
        for x, y in loader:
            step(module, optimizer, x, y)
        ledgers.append(engine.accountant.ledger)
    assert ledgers[0] == ledgers[1]
    assert ledgers[0].steps == 2


def test_the_ledger_has_the_step_before_anything_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, module, optimizer, loader = make()
    Monitor(engine, private_share=0.2)
    noted = []
    original = Measurement.count

    def count(self: Measurement, seen: Seen, sensitivity: float) -> Tensor:
        noted.append(len(engine.accountant))
        return original(self, seen, sensitivity)

    monkeypatch.setattr(Measurement, "count", count)
    step(module, optimizer, *next(iter(loader)))
    assert noted == [1]


def draws(share: float, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The noise on the counts and on the gradients of empty batches, in units of what the text promises."""
    engine, module, optimizer, _ = make(data_loader=None, expected_batch_size=6.0, loss_reduction="sum")
    monitor = Monitor(engine, private_share=share)
    for _ in range(steps):
        optimizer.step()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
        optimizer.zero_grad()
        yield monitor.counts / math.sqrt(2 / share), gradient * math.sqrt(1 - share) / 0.8


def test_the_noise_is_what_was_promised_and_a_near_miss_is_seen() -> None:
    counts, gradients = (torch.cat(parts) for parts in zip(*draws(0.2, 150), strict=True))
    assert scipy.stats.kstest(counts.numpy(), "norm").pvalue > 1e-3
    assert scipy.stats.kstest(gradients.numpy(), "norm").pvalue > 1e-3
    assert scipy.stats.kstest((counts * math.sqrt(2)).numpy(), "norm").pvalue < 1e-6, "as if the sensitivity were 1"
    assert scipy.stats.kstest((gradients / math.sqrt(1 - 0.2)).numpy(), "norm").pvalue < 1e-6, (
        "as if nothing was left out"
    )


def test_the_counts_have_noise_of_their_own() -> None:
    pairs = list(draws(0.2, 150))
    counts, gradients = torch.stack([c for c, _ in pairs]), torch.stack([g for _, g in pairs])
    together = torch.corrcoef(torch.cat([counts, gradients], dim=1).T)[: counts.shape[1], counts.shape[1] :]
    assert float(together.abs().max()) < 0.4


# ------------------------------------------------------------------ public


def test_public_numbers() -> None:
    engine, module, optimizer, loader = make(noise_multiplier=lambda step: 1.0 + step, max_grad_norm=0.5)
    monitor = Monitor(engine, delta=1e-3)
    assert (monitor.steps, monitor.epsilon, monitor.noise_multiplier, monitor.max_grad_norm) == (0, 0.0, 1.0, 0.5)
    assert monitor.noise_to_signal == pytest.approx(1.0 * math.sqrt(43) / 6.0)
    step(module, optimizer, *next(iter(loader)))
    assert (monitor.steps, monitor.noise_multiplier) == (1, 2.0)
    assert monitor.epsilon == engine.get_epsilon(1e-3) > 0
    assert sorted(monitor.postfix()) == ["C", "epsilon", "noise/signal", "sigma", "step"]
    assert monitor.postfix()["step"] == "1"


def test_the_prediction_is_the_noise_s_own_norm() -> None:
    """Root mean square norm of the noise in the gradient of empty batches, over S / 1: all records clipped and aligned."""
    engine, module, optimizer, _ = make(data_loader=None, expected_batch_size=6.0, noise_multiplier=2.0)
    monitor = Monitor(engine, private_share=0.3)
    squares = []
    for _ in range(200):
        optimizer.step()
        squares.append(sum(float(p.grad.square().sum()) for p in module.parameters()))
        optimizer.zero_grad()
    assert math.sqrt(sum(squares) / 200) / 0.8 == pytest.approx(monitor.noise_to_signal, rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_watching_changes_no_bit_of_the_training(mode: str) -> None:
    ends = []
    for watch in (False, True):
        engine, module, optimizer, loader = make(grad_sample_mode=mode, seed=5)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        if watch:
            Monitor(engine, not_private=True)
        for x, y in loader:
            step(module, optimizer, x, y)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*ends)


def test_it_is_read_in_a_hook_behind_the_logical_steps() -> None:
    engine, module, optimizer, loader = make(sample_rate=1.0)
    monitor = Monitor(engine, private_share=0.1, not_private=True)
    shown: list[dict[str, str]] = []
    optimizer.register_step_post_hook(lambda *_: shown.append(monitor.postfix()))
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=5, optimizer=optimizer) as pieces:
        for x, y in pieces:
            step(module, optimizer, x, y)
    assert [line["step"] for line in shown] == ["1"], "once for the three pieces"
    assert {"clipped", "clipped!"} < set(shown[0])


def test_it_fits_a_progress_bar() -> None:
    tqdm = pytest.importorskip("tqdm")
    engine, module, optimizer, loader = make()
    monitor = Monitor(engine)
    with tqdm.tqdm(loader, file=io.StringIO()) as bar:
        for x, y in bar:
            step(module, optimizer, x, y)
            bar.set_postfix(monitor.postfix())
        assert "epsilon=" in str(bar)
        assert "noise/signal=" in str(bar)


def test_one_monitor_s_end_does_not_blind_another() -> None:
    engine, module, optimizer, loader = make(noise_multiplier=0.0, sample_rate=1.0)
    exact, noisy = Monitor(engine, not_private=True), Monitor(engine, private_share=0.1)
    exact.close()
    exact.close()
    step(module, optimizer, *next(iter(loader)))
    assert float(noisy.counts[1:].sum()) == 12.0
    noisy.close()
    assert optimizer.total.watchers == 0


def test_a_noisy_quantile_interpolates_in_its_bin() -> None:
    engine, module, optimizer, loader = make(noise_multiplier=0.0, sample_rate=1.0)
    monitor = Monitor(engine, private_share=0.1, bins=(0.5, 1.0, 2.0, 4.0))
    step(module, optimizer, *next(iter(loader)))
    optimizer.measurement.release(torch.tensor([3.0, -2.0, 4.0, 4.0, 0.0, 0.0]), expected_records=10.0)
    assert monitor.fraction_clipped == 0.3
    assert monitor.norm_quantile(0.0) == pytest.approx(0.5 * 0.8)
    assert monitor.norm_quantile(0.25) == pytest.approx(0.75 * 0.8)
    assert monitor.norm_quantile(0.75) == pytest.approx(1.5 * 0.8)
    assert monitor.norm_quantile(1.0) == pytest.approx(2.0 * 0.8)


# ------------------------------------------------------------------ refusals


def test_private_numbers_have_to_be_asked_for() -> None:
    engine, module, optimizer, loader = make()
    monitor = Monitor(engine)
    step(module, optimizer, *next(iter(loader)))
    assert optimizer.total.last_seen is None
    for read in (
        lambda: monitor.exact_fraction_clipped, lambda: monitor.exact_norm_quantile(0.5), lambda: monitor.fraction_clipped,
        lambda: monitor.norm_quantile(0.5), lambda: monitor.counts,
    ):  # fmt: skip
        with pytest.raises(PrivacyError, match="private"):
            read()


def test_asking_for_noisy_ones_does_not_give_exact_ones() -> None:
    engine, module, optimizer, loader = make()
    monitor = Monitor(engine, private_share=0.1)
    step(module, optimizer, *next(iter(loader)))
    with pytest.raises(PrivacyError, match="not_private=True"):
        _ = monitor.exact_fraction_clipped
    assert "clipped!" not in monitor.postfix()


def test_before_the_first_step_there_is_nothing_to_read() -> None:
    monitor = Monitor(make()[0], private_share=0.1, not_private=True)
    for read in (lambda: monitor.fraction_clipped, lambda: monitor.exact_fraction_clipped):
        with pytest.raises(ConfigurationError, match="no step"):
            read()
    assert "clipped" not in monitor.postfix()


def test_a_part_of_a_batch_is_not_watched() -> None:
    engine, module, optimizer, loader = make()
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(PrivacyError, match="was not seen"):
        Monitor(engine, private_share=0.1)
    assert optimizer.measurement is None


def test_a_share_is_spent_once() -> None:
    engine, module, optimizer, loader = make()
    with Monitor(engine, private_share=0.1):
        with pytest.raises(ConfigurationError, match="another Monitor"):
            Monitor(engine, private_share=0.1)
        assert optimizer.gradient_noise_multiplier(1.0) == pytest.approx(1 / math.sqrt(0.9))
        step(module, optimizer, *next(iter(loader)))
    assert optimizer.gradient_noise_multiplier(1.0) == 1.0
    assert optimizer.total.watchers == 0
    Monitor(engine, private_share=0.2)
    (training,) = engine.report(deltas=[1e-5]).data["trainings"]
    assert "for 0.1 of a step's budget" in training["also_released"][0], "what was released stays in the report"


def test_adaptive_clipping_without_room_for_both_counts_is_refused() -> None:
    from ghostgrad import AdaptiveClipping

    engine, _, optimizer, _ = make(clipping=AdaptiveClipping(0.8, unclipped_num_std=0.6), noise_multiplier=1.0)
    with pytest.raises(ConfigurationError, match="unclipped_num_std"):
        Monitor(engine, private_share=0.9)
    assert optimizer.measurement is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"private_share": 0.0}, "private_share=0.0"),
        ({"private_share": 1.0}, "private_share=1.0"),
        ({"private_share": True}, "private_share=True"),
        ({"private_share": 0.1, "bins": ()}, "bins"),
        ({"private_share": 0.1, "bins": (2.0, 1.0)}, "bins"),
        ({"private_share": 0.1, "bins": (0.0, 1.0)}, "bins"),
        ({"private_share": 0.1, "bins": (1.0, math.inf)}, "bins"),
        ({"not_private": 1}, "not_private=1"),
        ({"delta": 0.0}, "delta=0"),
    ],
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], said: str) -> None:
    engine, _, optimizer, _ = make()
    with pytest.raises(ConfigurationError, match=said):
        Monitor(engine, **options)
    assert optimizer.measurement is None
    assert optimizer.total.watchers == 0


def test_which_training_is_meant() -> None:
    with pytest.raises(ConfigurationError, match="0 private trainings"):
        Monitor(PrivacyEngine())
    engine, _, optimizer, _ = make()
    module = nn.Linear(2, 2)
    engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=None, sample_rate=0.1,
        expected_batch_size=3.0, noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="optimizer="):
        Monitor(engine)
    assert Monitor(engine, optimizer=optimizer).max_grad_norm == 0.8


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_a_quantile_is_a_share(q: float) -> None:
    monitor = Monitor(make()[0], private_share=0.1, not_private=True)
    for read in (monitor.norm_quantile, monitor.exact_norm_quantile):
        with pytest.raises(ConfigurationError, match="quantile"):
            read(q)
