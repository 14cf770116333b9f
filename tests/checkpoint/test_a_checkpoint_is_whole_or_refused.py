"""Damaged, made-up and foreign checkpoints are refused, run nothing and change nothing; a full disk loses nothing."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from interrupted import in_a_process
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ghostgrad import PrivacyEngine, checkpoint
from ghostgrad.errors import CheckpointError, ConfigurationError, GhostgradError, PrivacyError

DATA = TensorDataset(torch.arange(40.0).view(20, 2) / 40, torch.arange(20) % 2)


class Run:
    """One private training, stepped by hand."""

    def __init__(self, seed: int | None = None, **changed: Any) -> None:
        torch.manual_seed(0)
        module = nn.Linear(2, 2)
        self.engine = PrivacyEngine(seed=seed)
        options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0} | changed
        self.module, self.optimizer, self.loader = self.engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
            data_loader=DataLoader(DATA, batch_size=4), **options,
        )  # fmt: skip
        self.divisor = (lambda x: 1) if changed.get("loss_reduction") == "sum" else (lambda x: max(1, len(x)))
        self.batches = iter(self.loader)

    def step(self, count: int = 1) -> Run:
        for _ in range(count):
            x, y = next(self.batches)
            nn.functional.cross_entropy(self.module(x), y, reduction="sum").div(self.divisor(x)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def save(self, path: Path, **options: Any) -> Path:
        self.engine.save_checkpoint(path, module=self.module, optimizer=self.optimizer, **options)
        return path

    def load(self, path: Path, **options: Any) -> Run:
        self.engine.load_checkpoint(path, module=self.module, optimizer=self.optimizer, **options)
        self.batches = iter(self.loader)
        return self

    def everything(self) -> str:
        return repr((self.module.state_dict(), self.optimizer.state_dict(), self.engine.state_dict()))


def test_only_the_owner_reads_it_and_no_other_file_stays(tmp_path: Path) -> None:
    path = Run().step().save(tmp_path / "checkpoint")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("way", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run().step()
    path = run.save(tmp_path / "checkpoint")
    before = path.read_bytes()
    run.step()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if way == "write":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(os, way, full)
    with pytest.raises(CheckpointError, match="No space left"):
        run.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    Run().load(path).step()


def test_a_limit_of_the_system_on_the_size_of_files_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = Run().step().save(tmp_path / "checkpoint")
    before = path.read_bytes()

    def limited() -> None:
        run = Run().step()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(CheckpointError, match="could not be written"):
            run.save(path)

    assert in_a_process(limited)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_change_of_the_file_is_noticed(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    if not path.exists():
        Run(seed=1).step().save(path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError):
        checkpoint.read(damaged)


def test_a_pickle_bomb_with_a_right_checksum_does_not_go_off(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "exploded",)

    payload = tmp_path / "payload"
    torch.save({"engine": Bomb()}, payload)
    for content in (payload.read_bytes(), pickle.dumps(Bomb())):
        path = tmp_path / "bomb"
        path.write_bytes(checkpoint._TITLE + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        with pytest.raises(CheckpointError, match="nothing of it was run"):
            Run().load(path)
    assert not (tmp_path / "exploded").exists()


@example(content=b"t")  # torch's reader then takes an item from an empty stack
@example(content=pickle.dumps({"engine": {}}, protocol=2))
@given(content=st.binary(max_size=80))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_with_a_right_checksum_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "made up"
    path.write_bytes(checkpoint._TITLE + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    with pytest.raises(CheckpointError):
        checkpoint.check(checkpoint.read(path), nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)], lr=0.1), {})


SPOILED = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]), st.just({}),
    st.just([[1, 2, 3]]), st.just(torch.zeros(3)),
)  # fmt: skip


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_spoiled_state_is_refused_and_nothing_changes_or_it_can_be_trained_with(data: st.DataObject) -> None:
    state = copy.deepcopy(Run(seed=1).step(2).engine.state_dict())
    holder: Any = state
    while True:
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        inner = holder[key]
        if isinstance(inner, (dict, list)) and len(inner) and data.draw(st.integers(0, 4)):
            holder = inner
        else:
            break
    holder[key] = data.draw(SPOILED)
    run = Run(seed=2)
    before = run.everything()
    try:
        run.engine.load_state_dict(state)
    except GhostgradError:
        assert run.everything() == before


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"max_grad_norm": 2.0}, "max_grad_norm"),
        ({"noise_multiplier": 1.1}, "noise_multiplier"),
        ({"sample_rate": 0.3}, "sample_rate"),
        ({"grad_sample_mode": "ghost"}, "grad_sample_mode"),
        ({"clipping": "automatic"}, "clipping"),
        ({"loss_reduction": "sum"}, "loss_reduction"),
        ({"poisson_sampling": False}, "sampler"),
        ({"accumulation_steps": 2}, "accumulation_steps"),
    ],
)
def test_another_plan_is_refused_by_name_or_goes_on_under_another_key(
    changed: dict[str, Any], name: str, tmp_path: Path
) -> None:
    saved = Run().step(3)
    path = saved.save(tmp_path / "checkpoint")
    other = Run(**changed)
    before = other.everything()
    with pytest.raises(CheckpointError, match=name) as refused:
        other.load(path)
    assert other.everything() == before
    names = str(refused.value).rpartition("acknowledge=")[2].rstrip(".")
    other.load(path, acknowledge=eval(names))
    assert other.engine._key.mark != saved.engine._key.mark
    assert len(other.engine.accountant) == 3
    assert other.optimizer.max_grad_norm == changed.get("max_grad_norm", 1.0)
    assert other.optimizer.noise_multiplier == changed.get("noise_multiplier", 1.0)
    other.step(2)
    assert other.engine.steps in (4, 5)


def test_another_learning_rate_draws_other_noise(tmp_path: Path) -> None:
    saved = Run().step(2)
    path = saved.save(tmp_path / "checkpoint")
    saved.step()
    same, other = Run().load(path), Run().load(path)
    other.optimizer.param_groups[0]["lr"] = 0.2
    assert other.step().engine._sessions[0].plan.noise._course != same.step().engine._sessions[0].plan.noise._course
    assert saved.engine._sessions[0].plan.noise._course == same.engine._sessions[0].plan.noise._course


def test_other_parameters_than_those_of_the_checkpoint_do_not_get_its_noise() -> None:
    saved = Run().step(2)
    state = saved.engine.state_dict()
    resumed = Run()
    resumed.engine.load_state_dict(state)
    resumed.batches = iter(resumed.loader)
    with pytest.raises(PrivacyError, match="parameters are not those of the checkpoint"):
        resumed.step()
    resumed = Run()
    resumed.engine.load_state_dict(state, fresh_key=True)
    resumed.batches = iter(resumed.loader)
    resumed.step()
    assert len(resumed.engine.accountant) == 3


def test_without_the_key_nothing_secret_is_kept_and_nothing_is_drawn_twice(tmp_path: Path) -> None:
    saved = Run(accumulation_steps=2).step(3)
    assert saved.optimizer.total.holds
    path = saved.save(tmp_path / "checkpoint", keep_key=False)
    assert saved.engine._key.secret.hex().encode() not in path.read_bytes()
    (part,) = checkpoint.read(path)["ranks"]
    (training,) = part["engine"]["trainings"]
    assert training["sum"]["sums"] == {}
    assert training["loader"]["feed"]["records"] == 0
    resumed = Run(accumulation_steps=2).load(path)
    assert resumed.engine._key.mark != saved.engine._key.mark
    resumed.step(2)
    assert resumed.engine.steps == 2
    assert len(resumed.engine.accountant) == 2


def test_going_back_in_one_process_forgets_nothing_and_takes_another_key(tmp_path: Path) -> None:
    for seed in (None, 5):
        run = Run(seed=seed).step(1)
        path = run.save(tmp_path / "checkpoint")
        mark = run.step(2).engine._key.mark
        run.load(path)
        assert len(run.engine.accountant) == run.engine.steps == 3
        assert run.engine._key.mark != mark
        run.step()
        assert len(run.engine.accountant) == run.engine.steps == 4


def test_a_generator_of_the_users_own_goes_on_where_it_was(tmp_path: Path) -> None:
    def run() -> Run:
        return Run(noise_generator=torch.Generator().manual_seed(0), poisson_sampling=False)

    saved = run().step(2)
    path = saved.save(tmp_path / "checkpoint")
    resumed = run().load(path)
    assert torch.equal(saved.step().module.weight, resumed.step().module.weight)
    with pytest.raises(CheckpointError, match="noise_generator"):
        run().load(path, fresh_key=True)


@pytest.mark.parametrize("broken", ["module", "optimizer", "extra"])
def test_what_does_not_fit_is_refused_before_anything_changes(broken: str, tmp_path: Path) -> None:
    path = Run().step().save(tmp_path / "checkpoint")
    content = checkpoint.read(path)
    if broken == "module":
        content["module"]["weight"] = torch.zeros(3, 3)
    elif broken == "optimizer":
        content["optimizer"]["param_groups"] = []
    else:
        content["extra"] = {"schedule": {}}
    checkpoint.write(path, content)
    run = Run()
    before = run.everything()
    with pytest.raises(CheckpointError):
        run.load(path)
    assert run.everything() == before


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"function": print}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Never called."""

    with pytest.raises(ConfigurationError, match=r"\['extra'\]\['odd'\]\['function'\] is a builtin_function"):
        Run().save(tmp_path / "checkpoint", extra={"odd": Odd()})
    assert list(tmp_path.iterdir()) == []
