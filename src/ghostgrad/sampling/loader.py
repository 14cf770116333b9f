"""The private data loader: torch's DataLoader with private batches, empty batches, and a mark on every piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ghostgrad.errors import ConfigurationError
from ghostgrad.keys import RunKey
from ghostgrad.sampling._batches import EmptyBatch, check_rows
from ghostgrad.sampling._deliveries import START, CurrentStream, IndexStream, Place, deliveries
from ghostgrad.sampling._indices import check_indices
from ghostgrad.sampling._inspect import check_dataset, inspect_loader
from ghostgrad.sampling._passes import MIXED, Pass, Passes
from ghostgrad.sampling._plan import Fetching, Plan, key_from, own_plan, plan_like, poisson_plan, steps_at
from ghostgrad.sampling._sizes import GrowingSize
from ghostgrad.sampling.feed import Feed
from ghostgrad.sampling.padding import PaddingSearch
from ghostgrad.sampling.poisson import check_count, check_rate

T_co = TypeVar("T_co", covariant=True)


class DPDataLoader(DataLoader[T_co]):
    """A ``DataLoader`` whose logical batches are Poisson samples, or the user's own batches, marked for the optimizer.

    Formal guarantee (``poisson_sampling=True``; records added or removed): every logical batch is an independent
    Poisson sample at rate ``sample_rate`` of the records that the user's sampler can draw. With
    ``poisson_sampling=False`` each record comes at most once a pass, in the user's own order; there is no
    amplification, and neighbouring datasets differ by one record being replaced with nothing in its place in the
    batch (zero-out).

    An empty sample is handed out as a batch of zero rows with the structure of the others.

    Args:
        dataset: map-style, with ``__len__``.
        sample_rate: probability of each record for one logical batch, in (0, 1].
        collate_fn: as for ``DataLoader``; never called with an empty list.
        drop_last: an epoch then has the whole number of logical batches below ``1 / sample_rate``, otherwise above.
        generator: draws the run key, unless ``key`` is given, and seeds workers as for ``DataLoader``.
        key: source of all draws. Default a fresh one from the operating system.
        indices: records that may be drawn, without repeats. Default all.
        accumulation_steps: batches k that one logical batch is dealt to. Default 1.
        num_workers: this and all further arguments as for ``DataLoader``.

    Attributes:
        feed: what the consumer holds now; shared with :meth:`physical` loaders.
        sample_rate: per logical batch, exact.
        expected_batch_size: records per logical batch in expectation, a float.
        accumulation_steps: loader batches per logical batch.
        steps_per_epoch: logical batches per pass.
        poisson_sampling: whether batches are Poisson samples.
        num_records: records that can be drawn.

    Raises:
        ConfigurationError: an argument out of range, or data that cannot be sampled.

    >>> loader = DPDataLoader(list(range(100)), sample_rate=0.1, key=RunKey.from_seed(0))
    >>> len(loader), loader.expected_batch_size
    (10, 10.0)
    >>> sizes = [len(batch) for batch in loader]
    >>> loader.feed.logical_batch, loader.feed.records == sizes[-1]
    (9, True)
    """

    feed: Feed
    sample_rate: float
    expected_batch_size: float
    accumulation_steps: int
    steps_per_epoch: int
    poisson_sampling: bool
    num_records: int
    _physical: dict[int | GrowingSize, DPDataLoader[T_co]]

    def __init__(
        self,
        dataset: Dataset[T_co],
        *,
        sample_rate: float,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        key: RunKey | None = None,
        indices: Sequence[int] | None = None,
        accumulation_steps: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
    ) -> None:
        check_dataset(dataset)
        check_rate(sample_rate)
        check_count("accumulation_steps", accumulation_steps)
        records: int | Sequence[int] = len(dataset) if indices is None else indices  # type: ignore[arg-type]
        check_indices(records, len(dataset))  # type: ignore[arg-type]
        steps = steps_at(sample_rate, drop_last=drop_last)
        plan = poisson_plan(records, sample_rate, steps, key or key_from(generator), accumulation_steps)
        fetching = Fetching(
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            generator=generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
        )
        self._open(dataset, plan, fetching, Passes.over(plan, generator), None)

    @classmethod
    def from_data_loader(
        cls,
        loader: DataLoader[T_co],
        *,
        generator: torch.Generator | None = None,
        distributed: bool = False,
        key: RunKey | None = None,
        poisson_sampling: bool = True,
        sample_rate: float | None = None,
        accumulation_steps: int = 1,
    ) -> DPDataLoader[T_co]:
        """The private form of a user's loader: same records, same workers, same collation.

        The rate of a logical batch is ``accumulation_steps * batch_size / n`` exactly, n being the number of records
        that the loader's sampler can draw, and a pass has as many batches as the user's loader (rounded up to a
        multiple of ``accumulation_steps``).

        Args:
            loader: map-style dataset; sequential, random or subset-random sampler, batched plainly.
            generator: draws the run key, unless ``key`` is given. Without either, the key comes from the operating
                system; ``loader.generator`` is kept for the workers (and the user's own batches) only, as it is
                often seeded with a constant.
            distributed: hand out this rank's share of each draw, by the default process group of ``torch.distributed``.
                ``key`` must be the same on all ranks. The batch size counts for all ranks together, or, with a
                ``DistributedSampler``, for each.
            key: source of all draws.
            poisson_sampling: ``False`` keeps the user's own batches and order.
            sample_rate: probability of each record for one logical batch; default from the batch size. Then a pass has
                ``1 / sample_rate`` logical batches.
            accumulation_steps: loader batches per logical batch.

        Raises:
            ConfigurationError: naming what cannot be sampled privately, and the way out.

        >>> user = DataLoader(list(range(100)), batch_size=32, shuffle=True)
        >>> loader = DPDataLoader.from_data_loader(user)
        >>> len(loader), loader.sample_rate
        (4, 0.32)
        """
        if isinstance(loader, DPDataLoader):
            raise ConfigurationError("data_loader is already private (a DPDataLoader); give the original DataLoader.")
        check_count("accumulation_steps", accumulation_steps)
        rank, ranks = _place(poisson_sampling=poisson_sampling, has_key=key is not None) if distributed else (0, 1)
        servable = inspect_loader(loader, ranks)
        if poisson_sampling:
            plan = plan_like(loader, servable, key or key_from(generator), sample_rate, accumulation_steps)
        else:
            plan = own_plan(loader, servable, sample_rate, accumulation_steps)
        if ranks > 1:
            plan = plan.shared(rank, ranks)
        private: DPDataLoader[T_co] = cls.__new__(cls)
        private._open(loader.dataset, plan, Fetching.of(loader), Passes.over(plan, loader.generator), None)
        return private

    def physical(self, max_physical_batch_size: int | GrowingSize) -> DPDataLoader[T_co]:
        """The same passes in pieces of at most ``max_physical_batch_size`` records, with the same ``feed``.

        Draws are those of this loader under the same key and pass; every batch gives at least one piece, also an
        empty one. ``len()`` is the expected number of pieces, rounded; with a size that grows, of batches.

        >>> loader = DPDataLoader(list(range(50)), sample_rate=1.0)
        >>> [len(piece) for piece in loader.physical(20)]
        [20, 20, 10]
        """
        if not isinstance(max_physical_batch_size, GrowingSize):
            check_count("max_physical_batch_size", max_physical_batch_size)
        elif self._plan.share.size > 1:
            raise ConfigurationError(
                f"pieces whose size follows the memory, on {self._plan.share.size} ranks: they would run the model a different "
                f"number of times. Give max_physical_batch_size as a number."
            )
        if max_physical_batch_size not in self._physical:
            # Kept, so that persistent workers live on from one memory manager to the next.
            pieces: DPDataLoader[T_co] = type(self).__new__(type(self))
            pieces._open(self.dataset, self._plan, Fetching.of(self), self._passes, max_physical_batch_size)
            self._physical.clear()
            self._physical[max_physical_batch_size] = pieces
        return self._physical[max_physical_batch_size]

    def _open(
        self, dataset: Dataset[T_co], plan: Plan, fetching: Fetching, passes: Passes, size: int | GrowingSize | None
    ) -> None:
        self._passes, self.feed = passes, passes.feed
        self.sample_rate = plan.sample_rate
        self.expected_batch_size = plan.expected_batch_size
        self.accumulation_steps = plan.accumulation_steps
        self.steps_per_epoch = -(-plan.parts // plan.accumulation_steps)
        self.poisson_sampling = plan.poisson_sampling
        self.num_records = plan.num_records
        self._plan = plan
        self._size = size
        self._length = plan.pieces(size) if isinstance(size, int) else plan.parts
        self._current = CurrentStream(self._length)
        self._physical = {}
        super().__init__(
            dataset,
            batch_sampler=plan.batch_sampler,
            num_workers=fetching.num_workers,
            collate_fn=fetching.collate_fn,
            pin_memory=fetching.pin_memory,
            timeout=fetching.timeout,
            worker_init_fn=fetching.worker_init_fn,
            multiprocessing_context=fetching.multiprocessing_context,
            generator=fetching.generator,
            prefetch_factor=fetching.prefetch_factor,
            persistent_workers=fetching.persistent_workers,
            pin_memory_device=fetching.pin_memory_device,
        )
        self._padding = PaddingSearch(dataset, self.collate_fn)
        self._empty_batch = EmptyBatch(dataset, self.collate_fn, plan.source.first_record())

    @property
    def _is_accelerate_prepared(self) -> bool:
        """Accelerate asks before it wraps a loader. Its own would read one batch ahead of the marks, or share batches out.

        Raises:
            ConfigurationError: several processes, each of which would be given every n-th batch of a draw of its own.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            size = torch.distributed.get_world_size()
            if size > 1:
                raise ConfigurationError(
                    f"this private loader was handed to {size} processes: each would draw batches of its own and keep every "
                    f"{size}th, which is not the sampling that is accounted. Train in one process."
                )
        return True

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, prepared: bool) -> None:
        """Accelerate writes down that it went past."""

    @property
    def _index_sampler(self) -> CurrentStream:
        # Where torch's iterators take their indices; `batch_sampler` stays what the user knows.
        return self._current

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        limit = MIXED if isinstance(self._size, GrowingSize) else self._size
        with self._passes.beginning(limit) as current:
            # Workers draw random numbers of their own for each record they fetch, so what they fetched is fetched again.
            refetched = current.place if self.num_workers and current.limit == limit != MIXED else START
            start = START if refetched != START else current.place
            batches = self._passes.begin(start)
            stream = IndexStream(deliveries(batches, self.accumulation_steps, self._size, self._plan.share, start))
            self._current.stream = stream
            fetched = super().__iter__()
            if current.resumed:
                stream.look_ahead()  # the sampler draws its order when it is first asked
        return self._hand_out(current, stream, fetched, refetched)

    def _hand_out(self, current: Pass, stream: IndexStream, fetched: Iterator[Any], refetched: Place) -> Iterator[Any]:
        """Yield the pieces of one pass in order; the empty ones, which torch never sees, are made here."""
        waiting: list[Any] = []
        logical_batch = self.feed.logical_batch  # of one that was left in the middle, in a pass that is resumed
        exhausted = False
        try:
            while True:
                while stream.pending and (waiting or not stream.pending[0].indices):
                    piece = stream.pending.popleft()
                    batch = waiting.pop() if piece.indices else self._empty_batch()
                    if piece.place <= refetched:
                        continue
                    if piece.indices:
                        check_rows(batch, len(piece.indices))
                    logical_batch = self.feed.deliver(
                        None if piece.opens else logical_batch,
                        records=len(piece.indices), last=piece.last, epoch=current.epoch, place=piece.place,
                        padding=self._padding.among(batch, piece.indices),
                    )  # fmt: skip
                    with self._measured(len(piece.indices)):
                        yield batch
                if exhausted:
                    return
                if not stream.pending and stream.look_ahead():
                    continue
                self._check_current(stream)
                try:
                    waiting.append(self._passes.fetch(fetched, current, here=not self.num_workers))
                except StopIteration:
                    exhausted = True
        finally:
            self._passes.ended(current)

    def _measured(self, records: int) -> AbstractContextManager[None]:
        return self._size.of_piece(records) if isinstance(self._size, GrowingSize) and records else nullcontext()

    @property
    def completed_passes(self) -> int:
        """Passes that are over; one that is under way, or to be gone on with, is not."""
        return self._passes.completed

    def finish_pass(self) -> None:
        """Where a pass that was resumed has no batches left, let the next iteration be a new one."""
        self._passes.finish(self.steps_per_epoch)

    def where(self, *, consumed: bool = True, secrets: bool = True) -> dict[str, Any]:
        """Where the consumer is, as plain values: which pass, how far in it, and the state of the generators.

        Not named ``state_dict``: trainers would save it, secrets and all, and restore it a second time.

        Args:
            consumed: False hands out the piece that is held once more.
            secrets: False leaves out what depends on how many records were drawn.
        """
        return self._passes.state_dict(consumed=consumed, secrets=secrets)

    def check_where(self, state: Mapping[str, Any]) -> None:
        """Raise what `go_on_from` would raise, and change nothing."""
        self._passes.check(state)

    def go_on_from(self, state: Mapping[str, Any], *, draws_anew: bool = False) -> None:
        """Go on from what `where` returned: the next iteration is the rest of the pass that was under way.

        Args:
            draws_anew: begin a logical batch that was coming in again, because it is drawn with another key.
        """
        self._passes.load_state_dict(state, draws_anew=draws_anew)

    def rekey(self, key: RunKey) -> None:
        """Draw from another key."""
        self._plan.source.rekey(key)

    @property
    def records(self) -> str:
        """A digest of which records may be drawn."""
        return self._plan.records

    def _check_current(self, stream: IndexStream) -> None:
        if self.persistent_workers and self._current.stream is not stream:
            raise ConfigurationError(
                "a second pass over this loader began before this one ended, and with persistent_workers=True both "
                "would share their workers; finish or leave the first pass, or set persistent_workers=False."
            )


def _place(*, poisson_sampling: bool, has_key: bool) -> tuple[int, int]:
    """This process's rank and how many there are; raises where their shares would not be of one draw."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ConfigurationError(
            "distributed=True without an initialised process group, so there is no rank to take a share for. Call "
            "torch.distributed.init_process_group first, or leave distributed at False."
        )
    if not poisson_sampling:
        raise ConfigurationError(
            "poisson_sampling=False on several ranks: whether their batches hold the same records is not known, so nothing can "
            "be accounted. Use Poisson sampling, which draws once for all ranks."
        )
    if not has_key:
        raise ConfigurationError(
            "distributed=True without a key: ranks with keys of their own draw records of their own. Give all the same key."
        )
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
