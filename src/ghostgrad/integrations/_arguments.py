"""Which ``TrainingArguments`` a private training honours, and why it refuses the others: none is passed over silently."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ghostgrad.errors import ConfigurationError

HONOURED = frozenset(
    """
    output_dir overwrite_output_dir per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps
    max_grad_norm learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args
    optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon bf16 bf16_full_eval fp16_full_eval use_cache
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_empty_cache_steps seed full_determinism use_cpu average_tokens_across_devices ignore_data_skip
    resume_from_checkpoint restore_callback_states_from_checkpoint remove_unused_columns label_names length_column_name
    train_sampling_strategy accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    do_train do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    batch_eval_metrics load_best_model_at_end metric_for_best_model greater_is_better logging_dir logging_strategy
    logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica log_on_each_node disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id debug skip_memory_metrics
    save_strategy save_steps save_total_limit save_only_model save_on_each_node save_safetensors enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision local_rank
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    """.split()  # noqa: SIM905 - ninety names read better as text
)
"""Done by the Trainer's own loop around the private step, or by `DPTrainer`; those for several processes rest in one."""

_ONE_PROCESS = "it spreads the model or its gradients over processes; train in one"
REFUSED = {
    "fp16": "its loss scaling inside the Trainer is not shown to be private; use bf16=True, or a loop of your own with a "
    "GradScaler",
    "tf32": "its matrix products keep 10 bits, in which the norm of a record can come out below what it is; leave it out",
    "label_smoothing_factor": "give losses=..., a function (outputs, inputs) -> one loss for each record",
    "neftune_noise_alpha": "its noise is scaled by the longest record of the batch, so one record changes the others'; use "
    "dropout",
    "use_liger_kernel": "its fused layers and losses do not show the gradient of a record; leave it out",
    "liger_kernel_config": "its fused layers and losses do not show the gradient of a record; leave it out",
    "torch_compile": "the Trainer would compile the model around the hooks that see each record; leave it out",
    "torch_compile_backend": "it turns torch_compile on; leave it out",
    "torch_compile_mode": "it turns torch_compile on; leave it out",
    "auto_find_batch_size": "a batch size found on the data is not public; set per_device_train_batch_size",
    "data_seed": "batches are drawn from the key of the plan; for experiments give PrivacyPlan(seed=...)",
    "include_num_input_tokens_seen": "it logs how many records were drawn, which is a secret; leave it out",
    "deepspeed": _ONE_PROCESS,
    "fsdp": _ONE_PROCESS,
    "fsdp_config": _ONE_PROCESS,
    "parallelism_config": _ONE_PROCESS,
}
"""Fields that have no private form, each with the reason and the way out."""


def check_arguments(args: Any, *, poisson_sampling: bool) -> None:
    """Refuse settings without a private form, and settings that are not known here.

    Raises:
        ConfigurationError: naming the field, its value and the way out.
    """
    if not dataclasses.is_dataclass(args):
        raise ConfigurationError(
            f"args={args!r} must be transformers.TrainingArguments: max_grad_norm is taken from it."
        )
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in HONOURED or not value or value == _default(field):
            continue
        why = REFUSED.get(field.name, "it is not known to this version of ghostgrad; leave it at its default")
        raise ConfigurationError(f"args.{field.name}={value!r} has no private form: {why}.")
    for name, holds, why in _CONDITIONS:
        value = getattr(args, name, None)
        if not holds(value):
            raise ConfigurationError(f"args.{name}={value!r} has no private form: {why}.")
    strategy = str(getattr(args, "train_sampling_strategy", "random"))
    if strategy != "random" and not (strategy == "sequential" and not poisson_sampling):
        raise ConfigurationError(
            f"args.train_sampling_strategy={strategy!r} has no private form: which records come together would depend on the "
            f"records. Leave it at 'random'; 'sequential' goes with PrivacyPlan(poisson_sampling=False)."
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _keeps_gradients(optim: Any) -> bool:
    name = str(getattr(optim, "value", optim))
    return not (name.endswith("layerwise") or name.startswith("schedule_free") or name in ("lomo", "adalomo"))


_CONDITIONS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_grad_norm", lambda bound: bound is not None and bound > 0, "each record is clipped to it; give one above 0"),
    ("n_gpu", lambda count: (count or 1) <= 1, "the Trainer would split batches over them; make one visible"),
    ("world_size", lambda count: (count or 1) <= 1, "train in one process"),
    ("optim", _keeps_gradients, "it steps inside the backward, or apart from the step; use 'adamw_torch'"),
    (
        "accelerator_config",
        lambda config: getattr(config, "gradient_accumulation_kwargs", None) is None,
        "its gradient_accumulation_kwargs divide the losses of records; set gradient_accumulation_steps",
    ),
)
