"""A ledger file is one chain: what was changed, cut, reordered or continued twice is reported with its line."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupted import in_a_process
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import PrivacyEngine
from ghostgrad.accounting import Gaussian, Opaque, PoissonSampled
from ghostgrad.errors import CheckpointError, LedgerError, PrivacyError
from ghostgrad.ledger import LedgerFile, read_ledger
from ghostgrad.ledger.__main__ import main
from ghostgrad.ledger.reading import parse

DATA = TensorDataset(torch.arange(40.0).view(20, 2) / 40, torch.arange(20) % 2)


def private(path: Path, **changed: Any) -> tuple[PrivacyEngine, Any, Any, Any]:
    torch.manual_seed(0)
    module = nn.Linear(2, 2)
    engine = PrivacyEngine(ledger=path, seed=changed.get("seed"))
    module, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=DataLoader(changed.get("data", DATA), batch_size=changed.get("batch_size", 4)),
    )  # fmt: skip
    return engine, module, optimizer, loader


def train(module: nn.Module, optimizer: Any, loader: Any, steps: int) -> None:
    for _, (x, y) in zip(range(steps), loader, strict=False):
        nn.functional.cross_entropy(module(x), y, reduction="sum").div(max(1, len(x))).backward()
        optimizer.step()
        optimizer.zero_grad()


def written(path: Path, lines: int = 6) -> list[bytes]:
    file = LedgerFile(path, "add-or-remove-one")
    for step in range(lines - 1):
        file.release([(PoissonSampled(0.1, Gaussian(1.0)), 1)], run="a", training=0, step=step, digest="")
    file.close()
    return path.read_bytes().splitlines(keepends=True)


def test_the_file_says_what_the_engine_says(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    engine, *objects = private(path)
    train(*objects, steps=3)
    engine.accountant.record(Opaque(0.1))
    train(*objects, steps=1)
    text = read_ledger(path)
    assert text.ledger == engine.accountant.ledger
    assert sum(entry.steps for entry in text.entries) == 4
    assert engine.ledger_head == text.head


def test_another_process_continues_the_chain_and_owns_what_was_spent(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    engine, *objects = private(path)
    train(*objects, steps=3)
    engine._ledger.close()
    engine, *objects = private(path)
    assert len(engine.accountant) == engine.steps == 3
    train(*objects, steps=2)
    assert read_ledger(path).ledger.steps == len(engine.accountant) == 5


def test_a_budget_counts_what_a_crashed_run_has_spent(tmp_path: Path) -> None:
    def start() -> tuple[PrivacyEngine, Any]:
        module = nn.Linear(2, 2)
        engine = PrivacyEngine(ledger=tmp_path / "run.jsonl")
        _, optimizer, _ = engine.make_private_with_epsilon(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), target_epsilon=3.0, target_delta=1e-3,
            data_loader=DataLoader(DATA, batch_size=4), total_steps=10, max_grad_norm=1.0,
        )  # fmt: skip
        return engine, optimizer

    engine, optimizer = start()
    for _ in range(6):
        optimizer.step()
        optimizer.zero_grad()
    sigma = optimizer.noise_multiplier
    engine._ledger.close()
    engine, optimizer = start()
    assert optimizer.noise_multiplier == sigma
    for _ in range(4):
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(Exception, match="would bring epsilon"):
        optimizer.step()


def test_a_step_that_cannot_be_written_down_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    engine, module, optimizer, loader = private(path)
    train(module, optimizer, loader, steps=2)
    before, content = module.weight.clone(), path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]) if len(data) > 99 else _full())
    with pytest.raises(LedgerError, match="step was not made"):
        train(module, optimizer, loader, steps=1)
    monkeypatch.undo()
    assert torch.equal(module.weight, before)
    assert path.read_bytes() == content
    assert all(p.grad is None for p in module.parameters())
    train(module, optimizer, loader, steps=1)
    # The accountant had noted the step that was not made; it stays counted, so that the two agree and neither says less.
    assert read_ledger(path).ledger.steps == len(engine.accountant) == 4


def test_a_disk_that_takes_no_more_stops_the_steps_and_loses_none(tmp_path: Path) -> None:
    """The system itself refuses the write in the middle of a line, at whatever line that is."""
    path = tmp_path / "run.jsonl"
    private(path)[0]._ledger.close()
    first = path.read_bytes()

    def limited() -> None:
        for room in range(1, 900, 37):
            path.write_bytes(first)
            engine, module, optimizer, loader = private(path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(first) + 250 + room, resource.RLIM_INFINITY))
            with pytest.raises(LedgerError, match="could not be written"):
                train(module, optimizer, itertools.chain.from_iterable(itertools.repeat(loader)), steps=99)
            made = optimizer.steps
            assert made < 9
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert read_ledger(path).ledger.steps == made
            train(module, optimizer, loader, steps=1)  # there is room again: the chain goes on
            assert read_ledger(path).ledger.steps == len(engine.accountant) == made + 2
            assert (
                engine.report(deltas=[1e-5]).holds == "yes"
            )  # the release that was not made was prepared like the others
            engine._ledger.close()

    assert in_a_process(limited)


def _full() -> int:
    raise OSError(28, "No space left on device")


def test_the_line_is_there_before_the_parameters_change(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    _, module, optimizer, loader = private(path)
    seen = []
    inner = optimizer._inner_step
    optimizer._inner_step = lambda: (seen.append(read_ledger(path).ledger.steps), inner())
    train(module, optimizer, loader, steps=3)
    assert seen == [1, 2, 3]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    engine, *_ = private(tmp_path / "run.jsonl")
    with pytest.raises(LedgerError, match="in use by another"):
        private(tmp_path / "run.jsonl")
    assert engine.steps == 0


@pytest.mark.parametrize("what", ["appended", "replaced", "removed"])
def test_what_others_do_to_the_file_meanwhile_stops_the_training(what: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    _, module, optimizer, loader = private(path)
    train(module, optimizer, loader, steps=1)
    content = path.read_bytes()
    if what == "appended":
        with open(path, "ab") as file:
            file.write(b"{}\n")
    else:
        path.unlink()
    if what == "replaced":
        path.write_bytes(content)
    before = module.weight.clone()
    with pytest.raises(LedgerError):
        train(module, optimizer, loader, steps=1)
    assert torch.equal(module.weight, before)


def test_a_forked_process_cannot_append_and_does_not_keep_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    engine, module, optimizer, loader = private(path, seed=0)  # without a seed the key refuses, before the ledger does
    train(module, optimizer, loader, steps=1)
    content = path.read_bytes()

    def forked() -> None:
        before = module.weight.clone()
        with pytest.raises(LedgerError, match="forked from"):
            train(module, optimizer, loader, steps=1)
        assert torch.equal(module.weight, before)
        engine._ledger.close()  # once more does nothing
        with pytest.raises(LedgerError, match="in use by another"):
            private(path)

    assert in_a_process(forked)
    assert path.read_bytes() == content
    train(module, optimizer, loader, steps=1)
    assert read_ledger(path).ledger.steps == 2


def test_a_cut_last_line_is_told_from_tampering_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = written(path)
    path.write_bytes(b"".join(lines)[:-9])
    text = read_ledger(path)
    assert text.cut == len(lines[-1]) - 9
    assert text.ledger.steps == 4
    LedgerFile(path, "").close()
    assert path.read_bytes() == b"".join(lines[:-1])


@pytest.mark.parametrize(
    ("spoil", "words", "line"),
    [
        (lambda ls: [*ls[:2], ls[2].replace(b"1.0", b"9.0"), *ls[3:]], "tampered", 4),
        (lambda ls: [*ls[:2], ls[3], ls[2], *ls[4:]], "reordered", 3),
        (lambda ls: [*ls[:2], *ls[3:]], "removed", 3),
        (lambda ls: ls[1:], "removed", 1),
        (lambda ls: [*ls[:4], ls[3], *ls[4:]], "forked", 5),
        (lambda ls: [*ls[:3], b"nonsense\n", *ls[3:]], "no JSON object", 4),
    ],
)
def test_each_kind_of_fault_is_named_with_its_line(
    spoil: Any, words: str, line: int, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(spoil(written(path))))
    with pytest.raises(LedgerError, match=words) as found:
        read_ledger(path)
    assert found.value.line == line
    assert main([str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["line"] == line
    with pytest.raises(LedgerError):
        PrivacyEngine(ledger=path)


def test_whole_lines_cut_off_the_end_show_by_a_head_only(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = written(path)
    head = read_ledger(path).head
    path.write_bytes(b"".join(lines[:-2]))
    assert main([str(path)]) == 0
    assert main([str(path), "--head", head]) == 1
    with pytest.raises(LedgerError, match="cut off"):
        read_ledger(path, head=head)


def test_two_continuations_of_a_copy_are_a_fork(tmp_path: Path, capsys: Any) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    written(one)
    other.write_bytes(one.read_bytes())
    assert main([str(one), str(other)]) == 0
    for path, sigma in ((one, 1.0), (other, 2.0)):
        file = LedgerFile(path, "")
        file.release([(Gaussian(sigma), 1)], run="a", training=0, step=9, digest="")
        file.close()
    assert main([str(one), str(other)]) == 1
    assert "line 7" in capsys.readouterr().out


def test_a_checkpoint_refuses_a_ledger_file_that_lacks_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    engine, module, optimizer, loader = private(path)
    train(module, optimizer, loader, steps=3)
    engine.save_checkpoint(tmp_path / "checkpoint", module=module, optimizer=optimizer)
    engine._ledger.close()
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    engine, module, optimizer, _ = private(path)
    with pytest.raises(CheckpointError, match="lines were cut off"):
        engine.load_checkpoint(tmp_path / "checkpoint", module=module, optimizer=optimizer)
    engine.load_checkpoint(tmp_path / "checkpoint", module=module, optimizer=optimizer, acknowledge=["ledger"])
    assert len(engine.accountant) == 3


def test_a_resumed_run_whose_data_changed_is_stopped_before_it_repeats_its_noise(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    engine, module, optimizer, loader = private(path, batch_size=20)  # all records: an empty draw has the same sum
    engine.save_checkpoint(tmp_path / "checkpoint", module=module, optimizer=optimizer)
    train(module, optimizer, loader, steps=1)
    engine._ledger.close()
    changed = TensorDataset(DATA.tensors[0] + 1, DATA.tensors[1])
    engine, module, optimizer, loader = private(path, data=changed, batch_size=20)
    engine.load_checkpoint(tmp_path / "checkpoint", module=module, optimizer=optimizer)
    before = module.weight.clone()
    with pytest.raises(PrivacyError, match="another sum"):
        train(module, optimizer, loader, steps=1)
    assert torch.equal(module.weight, before)
    engine.load_checkpoint(tmp_path / "checkpoint", module=module, optimizer=optimizer, fresh_key=True)
    train(module, optimizer, loader, steps=1)
    assert read_ledger(path).ledger.steps == len(engine.accountant) == 2


def test_the_command_needs_no_torch_and_little_time(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    written(path)
    code = f"import sys; from ghostgrad.ledger.__main__ import main; sys.exit(main([{str(path)!r}]) or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_change_but_at_the_end_is_noticed(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    if not path.exists():
        written(path)
    content = bytearray(path.read_bytes())
    last = content.rindex(b"\n", 0, -1) + 1
    at = data.draw(st.integers(0, last - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(LedgerError):
        parse(bytes(content))


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        text = parse(content)
    except LedgerError:
        return
    assert text.ledger.steps == 0


@given(body=st.dictionaries(
    st.sampled_from(["format", "version", "id", "relation", "kind", "run", "training", "step", "steps", "digest", "events"]),
    st.one_of(
        st.none(), st.integers(), st.floats(allow_nan=False), st.sampled_from(["release", "recorded", "training", "a"]),
        st.just([[{"type": "Gaussian", "sigma": -1.0}, 1]]), st.just([[{"type": "Repeated"}, 2]]), st.just([[1]]),
        st.just({"type": "Gaussian", "sigma": 1.0}), st.just([[{"type": "Gaussian", "sigma": 1.0}, 1 << 80]]),
    ),
))  # fmt: skip
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_lines_that_are_chained_and_make_no_sense_are_refused(body: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    if not path.exists():
        written(path, 1)
    text = read_ledger(path)
    line = json.dumps({**body, "prev": text.head, "n": 2}).encode() + b"\n"
    with contextlib.suppress(LedgerError):
        assert len(parse(path.read_bytes() + line).hashes) == 2
