"""Steps to compare, how to compare them, and how to tell that they do the same. One thread, one process a memory figure."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _workloads import WORKLOADS, Workload
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

METHODS = {
    "plain": None,
    "bk": "ours, bk",
    "ghost": "ours, ghost",
    "two-passes": "ours, bk with max_memory=0",
    "hooks": "ours, hooks",
    "opacus": "Opacus hooks",
    "opacus-ghost": "Opacus ghost",
}
BOUND, NOISE, RATE = 1.0, 1.0, 0.01
Step = Callable[..., None]


def start_batch(workload: Workload) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return workload.batch(workload.n)


def prepare(name: str, method: str) -> tuple[nn.Module, Step]:
    """A model, and a function that makes one step on a fresh copy of its batch: forward, backward, step, zero_grad."""
    return _prepare(WORKLOADS[name], method, NOISE)


def _prepare(workload: Workload, method: str, noise_multiplier: float) -> tuple[nn.Module, Step]:
    torch.manual_seed(0)
    model = workload.model()
    x, y = start_batch(workload)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.SGD(trained, lr=1e-3)

    def criterion(out: Tensor, target: Tensor) -> Tensor:
        return workload.records_loss(out, target).mean()

    if _is_peer(method):
        model, optimizer, criterion = _opacus(workload, method, model, optimizer, noise_multiplier)
    elif method != "plain":
        model, optimizer = _ours(workload, method, model, optimizer, noise_multiplier)

    def step(*, clear: bool = True) -> None:
        criterion(model(x.clone()), y).backward()
        optimizer.step()
        if clear:
            optimizer.zero_grad()

    return model, step


def _ours(workload: Workload, method: str, model: nn.Module, optimizer: Any, noise_multiplier: float) -> Any:
    from ghostgrad import PrivacyEngine

    mode, budget = ("bk", 0) if method == "two-passes" else (method, None)
    model, optimizer, _ = PrivacyEngine(seed=0).make_private(
        module=model, optimizer=optimizer, data_loader=None, sample_rate=RATE, expected_batch_size=workload.n,
        noise_multiplier=noise_multiplier, max_grad_norm=BOUND, grad_sample_mode=mode, max_memory=budget,
    )  # fmt: skip
    return model, optimizer


def _opacus(workload: Workload, method: str, model: nn.Module, optimizer: Any, noise_multiplier: float) -> Any:
    """Opacus' own wrappers and optimizers without its loader: what its make_private would put together."""
    warnings.filterwarnings("ignore")
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.layers import DPLSTM
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    _replace_lstm(model, DPLSTM)
    options = {"noise_multiplier": noise_multiplier, "max_grad_norm": BOUND, "expected_batch_size": workload.n}
    if method == "opacus":
        private = GradSampleModule(model, batch_first=True, loss_reduction="mean")
        return private, DPOptimizer(optimizer, **options), lambda o, y: workload.records_loss(o, y).mean()
    private = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=BOUND, use_ghost_clipping=True, batch_first=True, loss_reduction="mean"
    )
    optimizer = DPOptimizerFastGradientClipping(optimizer, **options)
    criterion = _RecordsLoss(workload.records_loss)
    return private, optimizer, DPLossFastGradientClipping(private, optimizer, criterion, loss_reduction="mean")


class _RecordsLoss(nn.Module):
    """A criterion with a `reduction`, as Opacus' ghost asks for."""

    def __init__(self, losses: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.losses, self.reduction = losses, "mean"

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        found = self.losses(out, y)
        return found.mean() if self.reduction == "mean" else found


def _replace_lstm(model: nn.Module, replacement: Any) -> None:
    """Opacus has an LSTM of its own."""
    for name, part in model.named_children():
        if isinstance(part, nn.LSTM):
            new = replacement(part.input_size, part.hidden_size, batch_first=part.batch_first)
            new.load_state_dict(part.state_dict(), strict=False)
            setattr(model, name, new)


# ---------------------------------------------------------------------------------- equality


def _fewer(workload: Workload) -> Workload:
    """With as many records as it takes to tell updates apart: a loop over all of them would take minutes."""
    return replace(workload, n=min(workload.n, max(2, workload.n // 8)))


def clipped_mean_by_hand(name: str, bound: float = BOUND) -> dict[str, Tensor]:
    """The textbook, on a part of the batch: each record alone, clipped, added up, divided by their number."""
    workload = _fewer(WORKLOADS[name])
    torch.manual_seed(0)
    model = workload.model()
    x, y = start_batch(workload)
    total = {k: torch.zeros_like(p, dtype=torch.float64) for k, p in model.named_parameters() if p.requires_grad}
    for i in range(workload.n):
        workload.records_loss(model(x[i : i + 1]), y[i : i + 1]).sum().backward()
        grads = {k: p.grad.double() for k, p in model.named_parameters() if p.grad is not None}
        norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
        for k, g in grads.items():
            total[k] += g * min(1.0, bound / norm)
        model.zero_grad()
    return {k: t / workload.n for k, t in total.items()}


def distance(name: str, method: str, truth: Mapping[str, Tensor]) -> float:
    """How far the noise-free update of a method is from the textbook's on the same records, relative to it."""
    model, step = _prepare(_fewer(WORKLOADS[name]), method, 0.0)
    step(clear=False)
    grads = {k.removeprefix("_module."): p.grad for k, p in model.named_parameters()}
    found = {k: grads[k].double() for k in truth}
    gap = sum(float((found[k] - t).square().sum()) for k, t in truth.items()) ** 0.5
    return gap / sum(float(t.square().sum()) for t in truth.values()) ** 0.5


# ---------------------------------------------------------------------------------- time, work, memory

_LEAST_ROUNDS = 5


def interleaved(steps: Mapping[str, Step], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of process time of each step, all of them once a round, in a rotated order; the first are warm-up."""
    for step in steps.values():
        step()
    gc.collect()
    gc.freeze()  # else a collection looks through all models, and falls on the same method in every round
    names, found, started = list(steps), {name: [] for name in steps}, time.perf_counter()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.process_time()
            steps[name]()
            found[name].append(time.process_time() - start)
        if time.perf_counter() - started > seconds and i + 1 >= _LEAST_ROUNDS:
            break
    return found


def ratios(times: Mapping[str, Sequence[float]], to: str = "plain") -> dict[str, float]:
    """Medians of the ratios of times that were taken in one round."""
    return {k: statistics.median(a / b for a, b in zip(t, times[to], strict=True)) for k, t in times.items()}


def work(step: Step) -> int:
    """Floating-point operations of one step that is not the first, of matrix products and convolutions."""
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward}
    ) as counter:
        step()
    return int(counter.get_total_flops())


def _conv_backward(dy: Any, x: Any, weight: Any, *args: Any, out_shape: Any, **options: Any) -> int:
    """torch's own count takes every input channel to meet every output channel, whatever the groups are."""
    return 2 * math.prod(dy) * math.prod(weight[1:]) * sum(shape is not None for shape in out_shape[:2])


def peaks(name: str, methods: Sequence[str]) -> dict[str, float]:
    """MiB that a process of its own holds at most during a step of each, over what it held before it built the model.

    Code is not counted: the libraries have been used once before.
    """
    # Tensors get pages of their own, which go back when they are freed: holes in the C library's heap are not counted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}

    def found(some: Sequence[str]) -> dict[str, float]:
        out = subprocess.run(
            [sys.executable, __file__, name, *some], stdout=subprocess.PIPE, check=True, env=environment
        )
        return dict(json.loads(out.stdout.splitlines()[-1]))

    with ThreadPoolExecutor(2) as pool:  # bytes do not depend on what else runs
        parts = list(pool.map(found, filter(None, (methods[::2], methods[1::2]))))
    return {method: part[method] for method in methods for part in parts if method in part}


def _own_peaks(name: str, methods: Sequence[str]) -> dict[str, float]:
    """In forked processes: what takes long is to import the libraries, and that is done here."""
    torch.set_num_threads(1)
    for library in ("ghostgrad", *(["opacus"] if any(map(_is_peer, methods)) else [])):
        importlib.import_module(library)
    context, found = multiprocessing.get_context("fork"), {}
    for method in methods:
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=lambda to, method=method: to.send(_own_peak(name, method)), args=(sending,))
        process.start()
        sending.close()
        try:
            found[method] = receiving.recv()
        except EOFError:
            found[method] = math.nan
        process.join()
    return found


def _is_peer(method: str) -> bool:
    return method.startswith("opacus")


def _own_peak(name: str, method: str) -> float:
    _loaded(method)
    before = _resident("VmRSS")
    _, step = prepare(name, method)
    step()  # the first batch is rehearsed; what counts is every other one
    _given_back()
    step()
    return _resident("VmHWM") - before


def _loaded(method: str) -> None:
    """A step of a small model: what is imported and kept by libraries is there before, and is no memory of the step."""
    _, step = prepare("mlp", method)
    step()
    del step
    _given_back()


def _given_back() -> None:
    """What was freed goes back to the system, and the high-water mark starts anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _resident(entry: str) -> float:
    """MiB, from the kernel's account of this process (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) / 1024


# ---------------------------------------------------------------------------------- pages


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks on a page."""
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}")


if __name__ == "__main__":
    print(json.dumps(_own_peaks(sys.argv[1], sys.argv[2:])))
