"""Every field of ``TrainingArguments`` is honoured, or refused with the reason; none is passed over silently."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_trainers import arguments, bert, sentences, trainer  # noqa: E402

from ghostgrad.errors import ConfigurationError  # noqa: E402
from ghostgrad.integrations._arguments import HONOURED, REFUSED  # noqa: E402
from ghostgrad.integrations.plan import PrivacyPlan  # noqa: E402
from ghostgrad.integrations.transformers import DPTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns about


def test_every_field_of_this_version_is_known() -> None:
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert fields <= HONOURED | REFUSED.keys()
    assert not HONOURED & REFUSED.keys()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"max_grad_norm": None}, "max_grad_norm=None"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"data_seed": 3}, r"data_seed=3.*PrivacyPlan\(seed"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"train_sampling_strategy": "sequential"}, r"PrivacyPlan\(poisson_sampling=False\)"),
        ({"optim": "schedule_free_adamw"}, "optim"),
        ({"optim": "lomo"}, "optim"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["query"]}, "optim"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "gradient_accumulation_kwargs"),
    ],
)
def test_settings_without_a_private_form_are_refused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        trainer(tmp_path, bert(), sentences(), **changed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp16", True), ("tf32", True), ("torch_compile", True), ("torch_compile_backend", "inductor"),
        ("deepspeed", {"zero": 1}), ("fsdp", ["full_shard"]), ("fsdp_config", {"version": 2}), ("parallelism_config", object()),
    ],
)  # fmt: skip
def test_settings_that_this_machine_cannot_even_ask_for_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    args = arguments(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ConfigurationError, match=rf"args\.{name}="):
        DPTrainer(bert(), args, privacy=PrivacyPlan(1e-3, noise_multiplier=1.0), train_dataset=sentences())


def test_a_setting_of_a_subclass_that_is_not_known_is_refused(tmp_path: Path) -> None:
    args = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], predict_with_generate=True
    )
    with pytest.raises(ConfigurationError, match=r"predict_with_generate=True.*not known"):
        DPTrainer(bert(), args, privacy=PrivacyPlan(1e-3, noise_multiplier=1.0), train_dataset=sentences())


def test_no_arguments_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="TrainingArguments"):
        DPTrainer(bert(), None, privacy=PrivacyPlan(1e-3, noise_multiplier=1.0), train_dataset=sentences())


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_pass_has_as_many_steps_as_that_of_the_plain_trainer(tmp_path: Path, drop_last: bool) -> None:
    changed = {
        "per_device_train_batch_size": 12,
        "max_steps": -1,
        "num_train_epochs": 1,
        "dataloader_drop_last": drop_last,
    }
    run = trainer(tmp_path, bert(), sentences(), **changed)
    run.train()
    assert run.state.global_step == run.engine.steps == (3 if drop_last else 4)
    assert run.private.loader.sample_rate == 12 / 40


def test_the_users_own_order_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    plan = PrivacyPlan(1e-3, noise_multiplier=1.0, poisson_sampling=False)
    run = trainer(tmp_path, bert(), sentences(), plan, train_sampling_strategy="sequential")
    run.train()
    assert type(run.private.loader.batch_sampler.sampler) is torch.utils.data.SequentialSampler
    assert run.engine.accountant.history == [(1.0, 1.0, 1)]


def test_workers_and_their_settings_reach_the_private_loader(tmp_path: Path) -> None:
    changed = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3}
    run = trainer(tmp_path, bert(), sentences(), **changed)
    loader = run.get_train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor) == (1, True, 3)
    run.train()
    assert run.engine.steps == 3


def test_memory_is_emptied_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    run = trainer(tmp_path, bert(), sentences(), torch_empty_cache_steps=2)
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda: emptied.append(run.state.global_step))
    run.train()
    assert emptied == [0, 2]


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    records = sentences()
    plan = PrivacyPlan(1e-3, noise_multiplier=1.0)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = DPTrainer(
        bert(), arguments(tmp_path, load_best_model_at_end=True, learning_rate=1.0, **settings), privacy=plan,
        train_dataset=records, eval_dataset=records,
    )  # fmt: skip
    run.train()
    best = min(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert run.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
