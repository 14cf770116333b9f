"""Large logical batches in small physical pieces."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal, Protocol

from ghostgrad.errors import ConfigurationError
from ghostgrad.sampling import DPDataLoader
from ghostgrad.sampling._sizes import GrowingSize, meter_of
from ghostgrad.sampling.poisson import check_count


class _Discards(Protocol):
    def discard_partial(self) -> None:
        """Forget what was summed for a logical batch that is not complete."""


class BatchMemoryManager:
    """Context manager that yields a loader of pieces of at most ``max_physical_batch_size`` records.

    The loop inside calls ``optimizer.step()`` for every piece; the step itself is taken when a piece completes its
    logical batch, which the loader tells through its ``feed`` together with the piece. The result is the step of the
    whole logical batch. Leaving the block, by its end, ``break`` or an exception, discards a sum that is not
    complete: no record of the abandoned batch enters a later step, whose sensitivity stays that of one logical batch.

    Args:
        data_loader: a private loader, as returned by ``PrivacyEngine.make_private``.
        max_physical_batch_size: most records in memory at once, at least 1; ``"auto"`` begins with small pieces, measures what
            each needs, and lets them grow as far as ``max_memory`` allows. The steps are the same but for rounding; which
            sizes came about depends on the machine, so such a run is not repeated bit for bit.
        optimizer: the private optimizer.
        max_memory: with ``"auto"``, bytes that the forward and backward of one piece may need on top of what is held
            anyway. Default: 80 % of what is free at the first piece, on the device of the parameters.

    Raises:
        ConfigurationError: an argument of another kind or out of range.

    >>> class Optimizer:
    ...     def discard_partial(self):
    ...         print("discarded")
    >>> data_loader = DPDataLoader(list(range(10)), sample_rate=1.0)
    >>> with BatchMemoryManager(data_loader=data_loader, max_physical_batch_size=4, optimizer=Optimizer()) as loader:
    ...     [(len(piece), loader.feed.last) for piece in loader]
    [(4, False), (4, False), (2, True)]
    discarded
    """

    def __init__(
        self,
        *,
        data_loader: DPDataLoader[Any],
        max_physical_batch_size: int | Literal["auto"],
        optimizer: _Discards,
        max_memory: int | None = None,
    ) -> None:
        if not isinstance(data_loader, DPDataLoader):
            raise ConfigurationError(
                f"data_loader is a {type(data_loader).__name__} and its batches carry no marks; give the loader that "
                "PrivacyEngine.make_private returned."
            )
        if not callable(getattr(optimizer, "discard_partial", None)):
            raise ConfigurationError(
                f"optimizer is a {type(optimizer).__name__} without discard_partial(); give the optimizer that "
                "PrivacyEngine.make_private returned."
            )
        self._loader = data_loader.physical(_size(max_physical_batch_size, max_memory, optimizer))
        self._optimizer = optimizer

    def __enter__(self) -> DPDataLoader[Any]:
        return self._loader

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._optimizer.discard_partial()


def _size(size: int | str, max_memory: int | None, optimizer: Any) -> int | GrowingSize:
    if max_memory is not None:
        check_count("max_memory", max_memory)
    if size == "auto":
        return GrowingSize(max_memory, meter_of(optimizer.params[0].device))
    if max_memory is not None:
        raise ConfigurationError(
            f"max_memory={max_memory} with max_physical_batch_size={size!r}: memory is only looked at with 'auto'. Leave one out."
        )
    check_count("max_physical_batch_size", size)  # type: ignore[arg-type]
    return int(size)
