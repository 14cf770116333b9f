"""The user's batch and loss, record by record, through plain autograd: nothing of the recording is used here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ghostgrad.distributed import is_split
from ghostgrad.errors import ConfigurationError
from ghostgrad.recording.draws import NoDraws
from ghostgrad.tree import map_numbers, map_tensors, tensors

LossFunction = Callable[[Any, Any], Tensor]
"""``loss_fn(module, batch)``: the scalar loss, as in the training loop."""

Gradients = dict[str, Tensor]


class Batch:
    """A batch that can be taken apart.

    Args:
        tree: tensors in tuples, lists, mappings, dataclasses. Those whose batch dimension has the size of the first one's
            hold the records, and so do lists of as many numbers; others stay as they are.
        batch_first: whether that is dimension 0; else dimension 1, or 0 for tensors of one dimension.

    Raises:
        ConfigurationError: there are no two records in it.
    """

    def __init__(self, tree: Any, *, batch_first: bool) -> None:
        self.tree, self._batch_first = tree, batch_first
        sizes = [t.shape[self._dim(t)] for t in tensors(tree) if t.dim()]
        self.n = sizes[0] if sizes else 0
        if self.n < 2:
            raise ConfigurationError(
                f"the batch has {self.n} records; that they do not touch each other can be seen with two or more. Give a batch "
                f"of tensors, as your loop has it, with a few records."
            )

    def _dim(self, tensor: Tensor) -> int:
        return 0 if self._batch_first or tensor.dim() == 1 else 1

    def only(self, records: Sequence[int]) -> Any:
        """The same batch with these records alone, copied."""
        chosen = torch.tensor(list(records))

        def cut(tensor: Tensor) -> Tensor:
            if not tensor.dim() or tensor.shape[self._dim(tensor)] != self.n:
                return tensor.detach().clone()
            return tensor.detach().index_select(self._dim(tensor), chosen.to(tensor.device))

        return map_tensors(cut, map_numbers(lambda numbers: [numbers[i] for i in records], self.tree, self.n))


class Subject:
    """A copy of the user's module with his loss; what happens to the copy does not show anywhere else.

    Dropout is left out, so that a record has one gradient, whichever records are beside it.
    """

    def __init__(self, module: nn.Module, loss_fn: LossFunction) -> None:
        self._loss_fn = loss_fn
        if any(is_split(p) for p in module.parameters()):
            raise ConfigurationError(
                "the module is split over ranks (fully_shard, parallelize_module), and a check works on copies in one process. "
                "Check the model before it is split."
            )
        try:
            self.module = copy.deepcopy(module)
        except Exception as error:
            raise ConfigurationError(
                f"the module cannot be copied ({type(error).__name__}: {error}), and a check works on copies so that nothing is "
                f"changed. Give module= one that copy.deepcopy can copy."
            ) from error
        if not self.module.training:
            self.module.train()
        for part in self.module.modules():
            _without_dropout(part)
        self.outputs: list[Tensor] = []
        """The floating-point outputs of the module's last call."""
        self._called = False
        self.module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs, self._called = [t for t in tensors(output) if t.is_floating_point()], True

    def loss(self, batch: Any) -> Tensor:
        """The scalar loss of a batch.

        Raises:
            ConfigurationError: it is no scalar tensor, or the module that was given was not called.
        """
        self._called = False
        torch.manual_seed(0)
        with NoDraws():
            loss = self._loss_fn(self.module, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ConfigurationError(
                f"loss_fn returned {found}; it must return the scalar loss: loss_fn(module, batch)."
            )
        if not self._called:
            raise ConfigurationError(
                "loss_fn did not call the module that it was given. Use its first argument, which is a copy, and not your "
                "model: loss_fn = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])."
            )
        return loss

    def gradient(self, batch: Any) -> Gradients:
        """The gradient of the loss of a batch, by plain autograd; zeros where nothing arrived. In float32 or wider."""
        self.module.zero_grad()
        self.loss(batch).backward()  # type: ignore[no-untyped-call]
        return {name: _dense(p) for name, p in self.module.named_parameters() if p.requires_grad}

    def output_gradients(self, batch: Any) -> list[Tensor]:
        """The gradients of the loss with respect to the module's outputs."""
        loss = self.loss(batch)
        outputs = [out for out in self.outputs if out.requires_grad]
        for out in outputs:
            out.retain_grad()
        # And not torch.autograd.grad, which re-entrant checkpointing does not bear.
        loss.backward()  # type: ignore[no-untyped-call]
        return [torch.zeros_like(out) if out.grad is None else out.grad for out in outputs]


def _dense(parameter: nn.Parameter) -> Tensor:
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
    grad = grad.to_dense() if grad.is_sparse else grad
    return grad.clone() if grad.dtype == torch.float64 else grad.float()


def _without_dropout(part: Any) -> None:
    if isinstance(part, nn.modules.dropout._DropoutNd):
        part.p = 0.0
    elif isinstance(part, (nn.MultiheadAttention, nn.RNNBase)):
        part.dropout = 0.0


def norm(gradients: Gradients) -> float:
    """The L2 norm over all parameters."""
    return float(torch.stack([grad.double().square().sum().cpu() for grad in gradients.values()]).sum().sqrt())


def add(total: Gradients, gradients: Gradients, factor: float) -> None:
    """``total += factor * gradients``."""
    for name, grad in gradients.items():
        total[name] = grad * factor if name not in total else total[name].add_(grad, alpha=factor)


@contextmanager
def randomness_kept(module: nn.Module) -> Iterator[None]:
    """The random states of the CPU and of the module's devices are afterwards what they were."""
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        yield
