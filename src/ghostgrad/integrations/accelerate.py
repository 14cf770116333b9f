"""`prepare`: what ``Accelerator.prepare`` does, for objects that `PrivacyEngine.make_private` returned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ghostgrad.errors import ConfigurationError
from ghostgrad.integrations._base import require
from ghostgrad.sampling import DPDataLoader
from ghostgrad.tree import map_tensors


def prepare(accelerator: Any, *objects: Any) -> tuple[Any, ...]:
    """Prepare private objects for an ``Accelerator``, in the order given.

    Models, optimizers, schedulers and other loaders go through ``accelerator.prepare``. A private loader keeps its own
    iteration, with batches moved to the accelerator's device: accelerate's own loader reads one batch ahead of the model,
    so the marks that the private loader puts on the batches would be those of the next one, and it cannot hold an empty
    batch. The loop stays as it is, with ``accelerator.backward(loss)``.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        objects: what `make_private` returned, and schedulers on its optimizer.

    Raises:
        ConfigurationError: several processes, fp16 with its loss scaling, or ``gradient_accumulation_steps`` above 1, which
            divides the loss before records are clipped.
        MissingDependencyError: accelerate is not installed.
    """
    require("accelerate", "ghostgrad.integrations.accelerate.prepare")
    _check(accelerator)
    return tuple(
        OnDevice(item, accelerator.device) if isinstance(item, DPDataLoader) else accelerator.prepare(item)
        for item in objects
    )


class OnDevice:
    """The batches of a private loader, each moved to ``device`` when it is asked for.

    >>> from ghostgrad.keys import RunKey
    >>> loader = OnDevice(DPDataLoader(list(range(100)), sample_rate=0.5, key=RunKey.from_seed(0)), torch.device("cpu"))
    >>> len(loader), len(list(loader))
    (2, 2)
    """

    def __init__(self, loader: DPDataLoader[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield map_tensors(lambda t: t.to(self.device), batch)


def _check(accelerator: Any) -> None:
    if accelerator.num_processes > 1:
        raise ConfigurationError(
            f"the Accelerator has num_processes={accelerator.num_processes} and would share batches out that the private loader "
            f"shares out itself. Call make_private on every rank without prepare, or train in one process."
        )
    if accelerator.mixed_precision == "fp16":
        raise ConfigurationError(
            "mixed_precision='fp16' scales the loss where that is not shown to be private. Use 'bf16'."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigurationError(
            f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps} divides each record's loss before it is "
            f"clipped. Leave it at 1 and call optimizer.step() after every batch: with make_private(accumulation_steps=...) or "
            f"a BatchMemoryManager the step is taken when the logical batch is complete."
        )
