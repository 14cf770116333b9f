"""The loss of each record, from a model's scores and the labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label that does not count, as everywhere in torch and transformers."""


def record_losses(scores: Tensor, labels: Tensor, *, shift: bool = False) -> Tensor:
    """Mean loss of each record over its own counted positions, [n]: no record's loss depends on another record.

    * whole-number labels [n, ...] and scores [n, ..., classes]: cross-entropy; label -100 is not counted, and a record of
      which no label counts has loss 0.
    * fractional labels of the scores' shape [n, classes], more than one class: binary cross-entropy (multi-label).
    * other fractional labels: squared error.

    Args:
        shift: scores at a position predict the label of the next one (causal language models).

    >>> import torch
    >>> scores, labels = torch.zeros(2, 3, 5), torch.tensor([[1, 2, 3], [1, -100, -100]])
    >>> [round(loss, 4) for loss in record_losses(scores, labels).tolist()]
    [1.6094, 1.6094]
    """
    if labels.is_floating_point():
        several = labels.shape == scores.shape and scores.dim() > 1 and scores.shape[-1] > 1
        if several:
            return F.binary_cross_entropy_with_logits(scores, labels, reduction="none").flatten(1).mean(1)
        errors = (scores.reshape(labels.shape) - labels).square()
        return errors if errors.dim() == 1 else errors.flatten(1).mean(1)
    if shift:
        extra = scores.shape[1] - labels.shape[1]  # prompts that were learned and put in front have no labels
        labels = F.pad(labels, (extra, 0), value=IGNORED)
        scores, labels = scores[:, :-1], labels[:, 1:]
    if labels.numel() == 0:  # an empty batch: no losses, and still connected to the model
        return scores.flatten(1).sum(1)
    every = F.cross_entropy(
        scores.reshape(-1, scores.shape[-1]), labels.reshape(-1), reduction="none", ignore_index=IGNORED
    )
    if labels.numel() == len(labels):
        return every
    counted = (labels != IGNORED).reshape(len(labels), -1)
    shares = counted / counted.sum(1, keepdim=True).clamp(min=1)
    return (every.view(len(labels), -1) * shares).sum(1)
