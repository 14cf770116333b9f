"""What ranks exchange in a logical step: calls and bytes of every collective, private and plain, wrapped and split.

Each private form is first held to one process: the same parameters after the steps, with noise. Then the collectives of the last
step are counted where torch dispatches them, so nothing that the wrappers call by themselves is missed. "Sent" is what a rank
sends when a ring does it: for k ranks ``2 (k - 1) / k`` of the bytes of an all-reduce, ``(k - 1) / k`` of what an all-gather
ends with or a reduce-scatter begins with. ``--write`` puts the table into ``docs/distributed.md``.

    python benchmarks/communication.py [--ranks 2] [--width 128] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import BatchMemoryManager, PrivacyEngine

PAGE = Path(__file__).resolve().parent.parent / "docs" / "distributed.md"
BEGIN, END = "<!-- measured by benchmarks/communication.py -->", "<!-- end -->"
STEPS, RECORDS, CLASSES, LAYERS = 3, 64, 10, 4
TOLERANCE = 1e-5
"""How far parameters may be from those of one process, in single precision."""


@dataclass(frozen=True)
class Form:
    """One way to train.

    Attributes:
        layout: ``"wrapped"`` (DistributedDataParallel) or ``"split"`` (fully_shard on every layer and the model).
        mode: of the private engine; None for plain training.
        pieces: physical batches in a logical one.
        kept: weights that are split stay gathered between forward and backward.
    """

    layout: str
    mode: str | None
    pieces: int = 1
    kept: bool = False

    @property
    def name(self) -> str:
        layout = {"wrapped": "DDP", "split": "FSDP2"}[self.layout]
        kept = ", weights kept" if self.kept else ""
        return f"{layout}{kept}, {'plain' if self.mode is None else f'private, {self.mode}'}"


FORMS = [
    Form(layout, mode, pieces, kept)
    for pieces in (1, 4)
    for layout, mode, kept in (
        ("wrapped", None, False), ("wrapped", "bk", False),
        ("split", None, False), ("split", "ghost", False), ("split", "bk", False),
        ("split", None, True), ("split", "ghost", True),
    )
]  # fmt: skip


class Collectives(TorchDispatchMode):
    """Counts the collectives that are dispatched inside, by kind, and the bytes a ring would send for them."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._share = (ranks - 1) / ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0].strip("_")
            largest = max((sum(t.nbytes for t in _tensors(arg)) for arg in args), default=0)
            kind = next((kind for key, kind in KINDS.items() if name.startswith(key)), name)
            self.calls[kind] += 1
            self.sent[kind] += int(largest * self._share * (2 if kind == "all-reduce" else 1))
        return func(*args, **(kwargs or {}))


KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "broadcast": "broadcast",
}


def _tensors(arg: Any) -> Iterator[Tensor]:
    if isinstance(arg, Tensor):
        yield arg
    elif isinstance(arg, (list, tuple)):
        for each in arg:
            yield from _tensors(each)


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def laid_out(form: Form, width: int) -> nn.Module:
    module: nn.Module = network(width)
    if not dist.is_initialized():
        return module
    if form.layout == "wrapped":
        return DistributedDataParallel(module)
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, reshard_after_forward=not form.kept)
    return fully_shard(module)


def data(width: int) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(RECORDS, width), torch.randint(CLASSES, (RECORDS,)))


def private_run(form: Form, width: int, counting: Collectives | None) -> dict[str, Tensor]:
    """Three steps on all records; the last one is counted."""
    module = laid_out(form, width)
    module, optimizer, loader = PrivacyEngine(seed=0).make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), sample_rate=1.0, noise_multiplier=0.1,
        data_loader=DataLoader(data(width), batch_size=RECORDS), max_grad_norm=1.0, grad_sample_mode=form.mode or "bk",
    )  # fmt: skip
    share = -(-RECORDS // ((dist.get_world_size() if dist.is_initialized() else 1) * form.pieces))
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=share, optimizer=optimizer) as pieces:
        for step in range(STEPS):
            with counting if counting and step == STEPS - 1 else contextlib.nullcontext():
                for x, y in pieces:
                    F.cross_entropy(module(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
    return parameters(module)


def plain_run(form: Form, width: int, counting: Collectives) -> None:
    """The same without privacy; gradients are exchanged as each wrapper's documentation says for accumulation."""
    module = laid_out(form, width)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    share = slice(dist.get_rank(), None, dist.get_world_size())
    batches = [tensor[share].chunk(form.pieces) for tensor in data(width).tensors]
    for step in range(STEPS):
        with counting if step == STEPS - 1 else contextlib.nullcontext():
            for piece, (x, y) in enumerate(zip(*batches, strict=True)):
                waits = isinstance(module, DistributedDataParallel) and piece < form.pieces - 1
                with module.no_sync() if waits else contextlib.nullcontext():
                    F.cross_entropy(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()


def parameters(module: nn.Module) -> dict[str, Tensor]:
    found = module.state_dict()
    return {
        name.removeprefix("module."): value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in found.items()
    }


def run(form: Form, width: int, ranks: int) -> tuple[Counter[str], Counter[str], dict[str, Tensor]]:
    counting = Collectives(ranks)
    found = {} if form.mode is None else private_run(form, width, counting)
    if form.mode is None:
        plain_run(form, width, counting)
    return counting.calls, counting.sent, found


def _rank(folder: str, rank: int, ranks: int, width: int, forms: list[Form]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    found = [run(form, width, ranks) for form in forms]
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.destroy_process_group()


def measured(ranks: int, width: int, forms: list[Form]) -> list[tuple[Counter[str], Counter[str]]]:
    """Calls and bytes of each form, after it was held to one process.

    Raises:
        SystemExit: a private form trains other parameters.
    """
    alone = private_run(Form("wrapped", "bk"), width, None)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        processes = [
            multiprocessing.get_context("fork").Process(target=_rank, args=(folder, rank, ranks, width, forms))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        results = torch.load(f"{folder}/found", weights_only=False)
    for form, (_, _, found) in zip(forms, results, strict=True):
        gap = max((float((found[name] - alone[name]).abs().max()) for name in found), default=0.0)
        if gap > TOLERANCE:
            raise SystemExit(f"{form.name}: parameters differ from those of one process by {gap:.1e}")
    return [(calls, sent) for calls, sent, _ in results]


def table(forms: list[Form], results: list[tuple[Counter[str], Counter[str]]], size: int) -> str:
    """Markdown; bytes in units of the parameters' own."""
    kinds = ["all-gather", "reduce-scatter", "all-reduce"]
    header = ["pieces", "form", *[f"{kind}s" for kind in kinds], "sent, MiB", "sent / parameters"]
    rows = [header, ["---"] * len(header)]
    for form, (calls, sent) in zip(forms, results, strict=True):
        total = sum(sent.values())
        counts = [str(calls[kind]) for kind in kinds]
        rows.append([str(form.pieces), form.name, *counts, f"{total / 2**20:.2f}", f"{total / size:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    options = parser.parse_args()
    size = sum(p.nbytes for p in network(options.width).parameters())
    found = table(FORMS, measured(options.ranks, options.width, FORMS), size)
    print(found)
    if options.write:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
