"""Random bytes, guided by coverage, at what reads checkpoints and ledger files: an error of ours or a right answer, nothing else.

Every input is tried as it is, and with the checksum or the chain made right, which random bytes would never get. The seeds are a
real checkpoint and a real ledger file. Needs ``pip install atheris`` (Linux, Python up to 3.13).

    python benchmarks/fuzz_readers.py [--seconds 60]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ghostgrad.ledger", "ghostgrad.checkpoint", "torch._weights_only_unpickler"]):
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from ghostgrad import PrivacyEngine, checkpoint
    from ghostgrad.errors import CheckpointError, GhostgradError, LedgerError
    from ghostgrad.ledger.reading import parse


class Seeds:
    """A real training's files, and a training into which checkpoints are loaded."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "tried"
        data = TensorDataset(torch.randn(20, 2), torch.arange(20) % 2)
        module = nn.Linear(2, 2)
        self.engine = PrivacyEngine(seed=0, ledger=folder / "run.jsonl")
        self.module, self.optimizer, _ = self.engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
            data_loader=DataLoader(data, batch_size=4), noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip
        for _ in range(3):
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.engine.save_checkpoint(self.file, module=self.module, optimizer=self.optimizer)
        self.checkpoint = self.file.read_bytes()[checkpoint._HEADER :]
        self.ledger = (folder / "run.jsonl").read_bytes()


def read_checkpoint(content: bytes, seeds: Seeds) -> None:
    """With the right checksum."""
    seeds.file.write_bytes(checkpoint._TITLE + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    before = [p.detach().clone() for p in seeds.module.parameters()]
    try:
        seeds.engine.load_checkpoint(seeds.file, module=seeds.module, optimizer=seeds.optimizer)
    except GhostgradError:
        assert all(map(torch.equal, before, seeds.module.parameters()))


def read_ledger(content: bytes) -> None:
    """As it is, and chained anew."""
    for text in (content, _chained(content)):
        try:
            found = parse(text)
        except LedgerError:
            continue
        assert found.ledger.steps == sum(releases for _, releases, _ in found.spans)


def _chained(content: bytes) -> bytes:
    head, lines = "0" * 64, list[bytes]()
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            body = json.loads(line)
            lines.append(json.dumps({**body, "prev": head, "n": number}).encode())
        except (ValueError, TypeError, RecursionError):
            lines.append(line)
        head = hashlib.sha256(lines[-1]).hexdigest()
    return b"\n".join(lines) + b"\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())  # libFuzzer ends the process by itself, so nobody would clean a context
    seeds = Seeds(folder)

    def try_one(data: bytes) -> None:
        if data[:1] == b"L":
            read_ledger(data[1:])
        else:
            read_checkpoint(data[1:], seeds)
            seeds.file.write_bytes(data)
            try:
                checkpoint.read(seeds.file)
            except CheckpointError:
                return
            raise AssertionError("read without a checksum")

    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "checkpoint").write_bytes(b"C" + seeds.checkpoint)
    (corpus / "ledger").write_bytes(b"L" + seeds.ledger)
    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            f"-max_total_time={arguments.seconds}",
            "-max_len=20000",
            f"-artifact_prefix={folder}/",
        ],
        try_one,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
