"""`DPTrainer`: a ``transformers.Trainer`` that trains privately."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ghostgrad.engine import PrivacyEngine
from ghostgrad.errors import ConfigurationError, PrivacyError
from ghostgrad.integrations._arguments import check_arguments
from ghostgrad.integrations._base import base_class
from ghostgrad.integrations.plan import PrivacyPlan, PrivateRun
from ghostgrad.integrations.record_losses import record_losses
from ghostgrad.sampling import DPDataLoader

_Trainer: Any = base_class("transformers", "Trainer", "ghostgrad.integrations.transformers.DPTrainer")

_FILE = "privacy.json"

RecordLosses = Callable[[Any, dict[str, Any]], Tensor]
"""``(outputs, inputs) -> [n]``: the loss of each record from the model's outputs and the whole batch."""


class DPTrainer(_Trainer):  # type: ignore[misc]
    """A ``Trainer`` whose every step is private; arguments, callbacks, evaluation and checkpoints are the Trainer's.

    One logical batch is ``per_device_train_batch_size * gradient_accumulation_steps`` records in expectation, drawn by
    Poisson sampling; ``args.max_grad_norm`` is C, the norm that each record's gradient is clipped to (the noisy sum is not
    clipped again). The loss is the mean over the records of each record's own mean, because the Trainer's mean over all
    tokens of a batch lets one record rescale the others. Guarantee and neighbouring relation: ``trainer.engine.guarantee``.

    Every log entry carries ``privacy/epsilon``, ``privacy/delta``, ``privacy/steps`` and ``privacy/noise_multiplier``. The
    losses logged beside them are computed on the training data without noise: do not publish them. Checkpoints hold
    ``privacy.json``: a resumed training goes on with what was spent, and with the next draw. It repeats neither batches nor
    noise, and with ``PrivacyPlan(seed=...)`` it ends where the uninterrupted one does.

    Args:
        model, args, train_dataset, eval_dataset, data_collator, processing_class, compute_metrics, callbacks, optimizers,
            preprocess_logits_for_metrics: as for ``transformers.Trainer``.
        privacy: the plan.
        losses: loss of each record; default `record_losses` of the outputs' logits and the batch's ``labels``.

    Raises:
        ConfigurationError: a setting of ``args`` that has no private form.
        MissingDependencyError: transformers is not installed.
    """

    model: nn.Module
    args: Any
    optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        privacy: PrivacyPlan,
        train_dataset: Any,
        eval_dataset: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        losses: RecordLosses | None = None,
    ) -> None:
        check_arguments(args, poisson_sampling=privacy.poisson_sampling)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=data_collator,
            processing_class=processing_class, compute_metrics=compute_metrics, callbacks=callbacks,
            optimizers=optimizers, preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip
        self._check_accelerator()
        self.args.ignore_data_skip = True  # the private loader itself goes on where it stopped
        self.loss_is_scaled_for_ga = True  # the parts of a logical batch add up
        self.privacy = privacy
        self.engine: PrivacyEngine = privacy.engine()
        self.private: PrivateRun | None = None
        self._losses = losses

    def _check_accelerator(self) -> None:
        """The environment of ``accelerate launch`` can ask for what ``args`` do not."""
        for plugin in ("deepspeed", "fsdp"):
            if getattr(self, f"is_{plugin}_enabled", False):
                raise ConfigurationError(
                    f"accelerate was set up for {plugin}, which has no private form: train in one process."
                )

    # ------------------------------------------------------------------ sampler and optimizer

    def get_train_dataloader(self) -> DPDataLoader[Any]:
        """The private loader; the model and the optimizer are made private with it, once."""
        if self.private is None:
            if self.optimizer is None:
                self.create_optimizer()
            plain = self._plain_loader()
            self.private = PrivateRun.open(
                self.privacy,
                engine=self.engine,
                module=self.model,
                optimizer=self.optimizer,
                data_loader=plain,
                max_grad_norm=self.args.max_grad_norm,
                accumulation_steps=self.args.gradient_accumulation_steps,
                total_steps=self._planned_steps(len(plain)),
            )
            self.optimizer = self.private.optimizer
        return self.private.loader

    def _plain_loader(self) -> DataLoader[Any]:
        # The Trainer's own is wrapped by accelerate, which reads one batch ahead of the model.
        wrapped = super().get_train_dataloader()
        return DataLoader(
            wrapped.dataset,
            batch_size=self._train_batch_size,
            sampler=self._get_train_sampler(),
            collate_fn=wrapped.collate_fn,
            num_workers=wrapped.num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            drop_last=self.args.dataloader_drop_last,
            in_order=self.args.dataloader_in_order,
            multiprocessing_context=wrapped.multiprocessing_context,
            worker_init_fn=wrapped.worker_init_fn,
            prefetch_factor=wrapped.prefetch_factor,
            persistent_workers=wrapped.persistent_workers,
        )

    def _planned_steps(self, batches: int) -> int:
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        epochs: float = self.args.num_train_epochs
        parts: int = self.args.gradient_accumulation_steps
        return math.ceil(epochs * math.ceil(batches / parts))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any = None) -> Any:
        """The next ``num_batches`` batches, each taken from the loader when it is used; no count of their tokens."""
        return _LazyBatches(epoch_iterator, num_batches), None

    # ------------------------------------------------------------------ the loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch; the loss that is logged is the mean over the parts of a logical batch."""
        loss: Tensor = super().training_step(model, inputs)
        parts: int = self.args.gradient_accumulation_steps
        return loss / parts

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the records' losses; 0 for a batch of no records."""
        known = {"labels", *(self.label_names or ())}  # a loss inside the model would not show the loss of a record
        given = {name: value for name, value in inputs.items() if name not in known}
        prepare = getattr(_inner(model), "prepare_decoder_input_ids_from_labels", None)
        if prepare is not None and "decoder_input_ids" not in given and "labels" in inputs:
            given["decoder_input_ids"] = prepare(labels=inputs["labels"])
        outputs = model(**given)
        losses = self._record_losses(model, outputs, inputs)
        loss = losses.mean() if len(losses) else losses.sum()
        return (loss, outputs) if return_outputs else loss

    def _record_losses(self, model: nn.Module, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        if self._losses is not None:
            return self._losses(outputs, inputs)
        if "labels" not in inputs:
            raise ConfigurationError(
                f"the batch has no 'labels' (it has {sorted(inputs)}), so the loss of a record is not known. Give "
                f"losses=..., a function (outputs, inputs) -> one loss for each record."
            )
        scores = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        return record_losses(scores, inputs["labels"], shift=_predicts_next_token(model))

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Nothing: each record was clipped, and clipping the noisy sum would rescale it but not the noise."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Not logged: before the step there is only the sum without noise."""

    # ------------------------------------------------------------------ logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with what was spent."""
        if self.private is not None and self.is_in_train:  # a resumed pass has only the steps that were left of it
            self.state.epoch = self.state.global_step / self.private.loader.steps_per_epoch
        super().log({**logs, **(self.private.logs() if self.private else {})}, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.private is not None:
            Path(output_dir, _FILE).write_text(json.dumps(self.private.state_dict()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.private is None:
            return
        file = Path(checkpoint, _FILE)
        if not file.exists():
            raise PrivacyError(
                f"the checkpoint has no {_FILE}, so what its training has spent is not known. Resume from a checkpoint that a "
                f"DPTrainer saved with its optimizer (save_only_model=False)."
            )
        self.private.load_state_dict(json.loads(file.read_text()))


class _LazyBatches:
    """Some batches that are not read ahead: the loader's marks must be those of the batch that is used."""

    def __init__(self, batches: Iterator[Any], count: int) -> None:
        self._batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._count):
            batch = next(self._batches, None)
            if batch is None:
                return
            yield batch


def _inner(model: nn.Module) -> Any:
    """The model inside an adapter of peft."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


def _predicts_next_token(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import (  # type: ignore[import-not-found,unused-ignore]
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )

    return type(_inner(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
