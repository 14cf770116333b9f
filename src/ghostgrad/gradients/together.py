"""Many small uses of one kind, worked out together: what an operation costs by itself is then paid once for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ghostgrad.gradients.use import Use

Weight = TypeVar("Weight", bound=Hashable)

_SMALL = 1 << 14
"""The most elements of a use, and of its weight, that is copied beside others: with more of them its own operations take longer
than their start."""

_MOST = 1 << 18
"""The most elements that are copied at once: 1 MiB in float32."""


def all_sq_norms(uses: Mapping[Weight, Use], *, apart: bool = False) -> dict[Weight, Tensor]:
    """`Use.sq_norms` of each; ``apart`` for the same last bits whatever other weights there are."""
    found: dict[Weight, Tensor] = {}
    for weights in _alike(uses, apart):
        use = _beside([uses[weight] for weight in weights])
        found.update(zip(weights, use.sq_norms().view(len(weights), -1).unbind(), strict=True))
    return found


def all_weighted_sums(
    uses: MutableMapping[Weight, Use], factors: Mapping[Weight, Tensor], *, apart: bool = False
) -> Iterator[tuple[Weight, Tensor]]:
    """`Use.weighted_sum` of each with its own factors. Uses are taken out on the way, so that what they hold is let go.

    Each sum has memory of its own: behind a gradient that is published there must not be another's sum without noise.
    """
    for weights in list(_alike(uses, apart)):
        use = _beside([uses.pop(weight) for weight in weights])
        if len(weights) == 1:
            yield weights[0], use.weighted_sum(factors[weights[0]])
        else:
            sums = use.weighted_sums(torch.stack([factors[weight] for weight in weights]))
            parts: Sequence[Tensor] = torch.ops.aten.unbind_copy.int(sums)
            yield from zip(weights, parts, strict=True)


def _beside(uses: list[Use]) -> Use:
    return uses[0] if len(uses) == 1 else uses[0].beside(uses)


def _alike(uses: Mapping[Weight, Use], apart: bool) -> Iterator[list[Weight]]:
    """All weights, together those whose uses are small and of one kind."""
    groups: dict[object, list[Weight]] = {}
    for weight, use in uses.items():
        kind, size = use.kind, max(use.held, use.shape.numel())
        if apart or kind is None or size > _SMALL:
            yield [weight]
            continue
        group = groups.setdefault(kind, [])
        group.append(weight)
        if (len(group) + 1) * size > _MOST:
            yield groups.pop(kind)
    yield from groups.values()
