"""Proof that no record can come twice in one draw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import ConcatDataset, Subset

from ghostgrad.errors import ConfigurationError


def check_indices(records: int | Sequence[int], size: int | None) -> None:
    """Raise ``ConfigurationError`` unless every index addresses a record, and each record once; ``size`` if known."""
    if isinstance(records, int):
        if size is not None and records > size:
            raise ConfigurationError(
                f"the sampler draws from {records} indices and the dataset has {size} records; build the sampler on "
                "the dataset."
            )
        return
    indices = np.asarray(records)
    if indices.size and not np.issubdtype(indices.dtype, np.integer):
        raise ConfigurationError(f"indices of type {indices.dtype} do not address records; give whole numbers.")
    if np.unique(indices).size != indices.size:
        raise ConfigurationError(
            "the indices name some records more than once, which multiplies their influence on a step; give each once."
        )
    if size is not None and indices.size and (indices.min() < 0 or indices.max() >= size):
        raise ConfigurationError(
            f"the sampler's indices reach outside the dataset's {size} records; give indices from 0 to {size - 1}."
        )


def digest_of(records: int | Sequence[int]) -> str:
    """Equal for equal records that may be drawn: a count (indices ``0 .. n-1``) or the indices."""
    if isinstance(records, int):
        return str(records)
    return hashlib.sha256(np.asarray(records).astype("<i8").tobytes()).hexdigest()[:16]


def check_origins(dataset: Any) -> None:
    """Raise ``ConfigurationError`` if torch's ``Subset`` and ``ConcatDataset`` hold one record at several positions."""
    if not isinstance(dataset, (Subset, ConcatDataset)):
        return
    by_leaf: dict[int, list[npt.NDArray[np.int64]]] = {}
    for leaf, indices in _origins(dataset, None):
        by_leaf.setdefault(id(leaf), []).append(indices)
    for pieces in by_leaf.values():
        indices = np.concatenate(pieces)
        if np.unique(indices).size != indices.size:
            raise ConfigurationError(
                f"the dataset ({type(dataset).__name__}) holds some records of the data under it more than once, which "
                "multiplies their influence on a step; hold each record once."
            )


def _origins(dataset: Any, positions: npt.NDArray[np.int64] | None) -> Iterator[tuple[Any, npt.NDArray[np.int64]]]:
    """The datasets under ``dataset``, each with the indices that ``positions`` (``None``: all) lead to."""
    if isinstance(dataset, Subset):
        indices = np.asarray(dataset.indices)
        yield from _origins(dataset.dataset, indices if positions is None else indices[positions])
    elif isinstance(dataset, ConcatDataset):
        ends = np.asarray(dataset.cumulative_sizes)
        positions = np.arange(len(dataset)) if positions is None else positions % len(dataset)
        owner = np.searchsorted(ends, positions, side="right")
        for number, part in enumerate(dataset.datasets):
            first = 0 if number == 0 else int(ends[number - 1])
            yield from _origins(part, positions[owner == number] - first)
    elif hasattr(dataset, "__len__"):
        size = len(dataset)
        yield dataset, np.arange(size) if positions is None else positions % size
    elif positions is not None:
        yield dataset, positions
