"""Where records are padded to the longest of their batch, its length must not reach the outputs and losses of the others."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from leave_one_out import MODES, C
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset

from ghostgrad import BatchMemoryManager, ConfigurationError, PrivacyEngine, PrivacyError

Record = tuple[Tensor, int]
Collate = Callable[[Sequence[Record]], tuple[Tensor, Tensor, Tensor]]
LENGTHS = (3, 5, 2, 9, 4, 5)
WORDS, WIDTH, CLASSES = 11, 6, 3


def records(lengths: Sequence[int] = LENGTHS) -> list[Record]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randint(1, WORDS, (length,), generator=generator), i % CLASSES) for i, length in enumerate(lengths)]


def to_longest(batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor]:
    words = pad_sequence([words for words, _ in batch], batch_first=True)
    return words, torch.tensor([len(words) for words, _ in batch]), torch.tensor([label for _, label in batch])


def to_longest_on_the_left(batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor]:
    words = pad_sequence([words.flip(0) for words, _ in batch], batch_first=True).flip(1)
    return words, torch.tensor([len(words) for words, _ in batch]), torch.tensor([label for _, label in batch])


def to_twelve(batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor]:
    words, lengths, labels = to_longest(batch)
    return F.pad(words, (0, 12 - words.shape[1])), lengths, labels


def to_a_multiple_of_four(batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor]:
    words, lengths, labels = to_longest(batch)
    return F.pad(words, (0, -words.shape[1] % 4)), lengths, labels


def sorted_by_length(batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor]:
    return to_longest(sorted(batch, key=lambda record: -len(record[0])))


def with_positions(batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    words, lengths, labels = to_longest(batch)
    return words, lengths, labels, torch.arange(words.shape[1]).expand_as(words)


def with_words_masked(batch: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor]:
    words, lengths, labels = to_longest(batch)
    return torch.where(torch.rand(words.shape) < 0.2, 0, words), lengths, labels


class Text(nn.Module):
    """Embeds words, and puts one vector a record into the head."""

    def __init__(self, *, width: int = WIDTH) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=0)
        self.head = nn.Linear(width, CLASSES)
        self.width = width

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.pooled(self.words(words), words, lengths))  # type: ignore[no-any-return]

    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        raise NotImplementedError


class Mean(Text):
    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        return h.mean(1)


class Sum(Text):
    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        return h.sum(1)


class Largest(Text):
    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        return h.amax(1)


class Last(Text):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        return self.rnn(h)[0][:, -1]  # type: ignore[no-any-return]


class Convolved(Text):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        return self.conv(h.mT).amax(2)  # type: ignore[no-any-return]


class Attending(Text):
    masked = False

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.1, batch_first=True)

    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        return self.layer(h, src_key_padding_mask=words == 0 if self.masked else None)[:, 0]  # type: ignore[no-any-return]


class AttendingMasked(Attending):
    masked = True


class MaskedMean(Text):
    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        mask = (words != 0).unsqueeze(2)
        return (h * mask).sum(1) / mask.sum(1).clamp(min=1)


class Packed(Text):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
        out, lengths = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return out.sum(1) / lengths.unsqueeze(1)  # type: ignore[no-any-return]


class FirstWord(Text):
    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        return h[:, 0]


class EachWord(Text):
    """One output a position."""

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.words(words))  # type: ignore[no-any-return]


def of_labels(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(words, lengths), labels)


def made_private(model: nn.Module, data: Sequence[Record], collate: Any, mode: str = "auto", **options: Any) -> Any:
    """Model, optimizer and a loader of batches of six, without noise; as many records as that are one batch of all."""
    at_engine = {
        name: options.pop(name) for name in ("poisson_sampling", "criterion", "batch_first") if name in options
    }
    user = DataLoader(data, batch_size=min(6, len(data)), collate_fn=collate, **options)  # type: ignore[arg-type]
    return PrivacyEngine(seed=0).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=user, noise_multiplier=0.0,
        max_grad_norm=C, grad_sample_mode=mode, **at_engine,
    )  # fmt: skip


def epoch(model: nn.Module, optimizer: Any, batches: Any, loss: Any) -> int:
    """How many batches were trained on."""
    count = 0
    for batch in batches:
        optimizer.zero_grad()
        loss(model, *batch).backward()
        optimizer.step()
        count += 1
    return count


def trained(
    model: Text, data: Sequence[Record], collate: Any, mode: str, loss: Any = of_labels, **options: Any
) -> Tensor:
    """The noise-free sum of one step over all of the data."""
    torch.manual_seed(0)
    model, optimizer, loader = made_private(copy.deepcopy(model).double(), data, collate, mode, **options)
    assert epoch(model, optimizer, loader, loss) == 1
    return len(data) * torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def sensitivity(model: Text, collate: Any, mode: str, loss: Any = of_labels) -> float:
    data = records()
    whole = trained(model, data, collate, mode, loss)
    rests = [trained(model, data[:i] + data[i + 1 :], collate, mode, loss) for i in range(len(data))]
    return max(float((whole - rest).norm()) for rest in rests)


def built(model: type[Text], **options: Any) -> Text:
    torch.manual_seed(0)
    return model(**options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [Mean, Sum, Largest, Last, Convolved, Attending])
def test_a_model_that_does_not_mask_is_refused(model: type[Text], mode: str) -> None:
    with pytest.raises(PrivacyError, match="the output for a record is another when it is padded less"):
        trained(built(model), records(), to_longest, mode)


@pytest.mark.parametrize(
    ("model", "collate"),
    [
        (MaskedMean, to_longest_on_the_left),
        (MaskedMean, sorted_by_length),
        (MaskedMean, with_words_masked),
        (MaskedMean, to_a_multiple_of_four),
        (AttendingMasked, with_words_masked),
        (AttendingMasked, to_a_multiple_of_four),
        (Packed, to_a_multiple_of_four),
        (Packed, sorted_by_length),
    ],
)
def test_a_model_that_masks_is_trained(model: type[Text], collate: Collate) -> None:
    trained(built(model), records(), collate, "bk")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [MaskedMean, AttendingMasked, Packed, FirstWord])
def test_a_model_that_masks_moves_by_c_at_most(model: type[Text], mode: str) -> None:
    model = built(model)  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    assert sensitivity(model, to_longest, mode) <= C * (1 + 1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [Mean, Sum, Largest, Last, Convolved, Attending])
def test_padding_to_a_constant_needs_no_mask(model: type[Text]) -> None:
    trained(built(model), records(), to_twelve, "bk")


@pytest.mark.parametrize("collate", [sorted_by_length, to_a_multiple_of_four, with_words_masked])
@pytest.mark.parametrize("model", [Mean, Last])
def test_padding_is_found_wherever_a_record_is_put(model: type[Text], collate: Collate) -> None:
    with pytest.raises(PrivacyError, match="padded less"):
        trained(built(model), records(), collate, "bk")


def test_padding_is_found_beside_what_goes_on_in_it() -> None:
    def loss(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        return F.cross_entropy(model(words + 0 * positions, lengths), labels)

    with pytest.raises(PrivacyError, match="padded less"):
        trained(built(Mean), records(), with_positions, "bk", loss)
    trained(built(MaskedMean), records(), with_positions, "bk", loss)


class Times(nn.Module):
    """Speech or sensors: float [n, t, f], or time first, with one output a record."""

    def __init__(self, *, masked: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(2, WIDTH, batch_first=batch_first), nn.Linear(WIDTH, CLASSES)
        self.masked, self.batch_first = masked, batch_first

    def forward(self, x: Tensor, lengths: Any) -> Tensor:
        if self.masked:
            packed = pack_padded_sequence(x, lengths, batch_first=self.batch_first, enforce_sorted=False)
            return self.head(self.rnn(packed)[1][-1])  # type: ignore[no-any-return]
        return self.head(self.rnn(x)[0][:, -1] if self.batch_first else self.rnn(x)[0][-1])  # type: ignore[no-any-return]


def of_times(batch: Sequence[Record]) -> dict[str, Any]:
    """What loops take apart, with arrays and lists of numbers in it."""
    times = [torch.stack([words.sin(), words.cos()], 1).double() for words, _ in batch]
    return {
        "label": torch.tensor([label for _, label in batch]),
        "x": pad_sequence(times, batch_first=True),
        "lengths": [len(x) for x in times],
        "marks": pad_sequence([x[:, 0] for x in times], batch_first=True).numpy(),
    }


def of_times_first(batch: Sequence[Record]) -> dict[str, Any]:
    found = of_times(batch)
    return {**found, "x": found["x"].transpose(0, 1)}


def over_times(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    labels = batch.pop("label")
    return F.cross_entropy(model(batch.pop("x"), batch["lengths"]), labels)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_series_of_numbers_may_be_padded_as_well(mode: str, batch_first: bool) -> None:
    collate = of_times if batch_first else of_times_first
    sizes = []
    for masked in (True, False):
        torch.manual_seed(0)
        model, optimizer, loader = made_private(
            Times(masked=masked, batch_first=batch_first).double(), records(), collate, mode, batch_first=batch_first
        )
        for batch in loader:
            if masked:
                over_times(model, batch).backward()
                optimizer.step()
                sizes.append(len(batch["lengths"]))
            else:
                with pytest.raises(PrivacyError, match="padded less"):
                    over_times(model, batch)
    assert sizes == [6]


def test_padding_that_goes_before_is_cut_there() -> None:
    with pytest.raises(PrivacyError, match="when it is padded less"):
        trained(built(FirstWord), records(), to_longest_on_the_left, "bk")
    trained(built(FirstWord), records(), to_longest, "bk")


def test_another_dimension_may_have_the_size_of_the_longest() -> None:
    width = max(LENGTHS)

    class Embedded(MaskedMean):
        def forward(self, embedded: Tensor, words: Tensor) -> Tensor:
            return self.head(self.pooled(embedded, words, words))  # type: ignore[no-any-return]

    def loss(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        vectors = F.one_hot(words % width, width).double()
        return F.cross_entropy(model(vectors, words), labels)

    model = built(Embedded, width=width)
    del model.words
    trained(model, records(), to_longest, "bk", loss)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_collate_and_the_padding_is_seen(workers: int) -> None:
    with pytest.raises(PrivacyError, match="padded less"):
        trained(built(Mean), records(), to_longest, "bk", num_workers=workers)


def test_pieces_are_padded_to_the_longest_of_each() -> None:
    model, optimizer, loader = made_private(built(Mean), records(), to_longest)
    pieces = BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer)
    with pieces as batches, pytest.raises(PrivacyError, match="padded less"):
        epoch(model, optimizer, batches, of_labels)


def test_batches_without_padding_say_nothing_of_later_ones() -> None:
    """The first ones hold records of one length, so nothing is seen until a longer one comes."""
    model, optimizer, loader = made_private(built(Mean), records([4] * 40 + [9]), to_longest, poisson_sampling=False)
    batches = list(loader)
    assert epoch(model, optimizer, itertools.islice(loader, 6), of_labels) == len(batches) - 1
    with pytest.raises(PrivacyError, match="padded less"):
        epoch(model, optimizer, loader, of_labels)


def test_a_record_that_is_all_padding_shows_nothing() -> None:
    """As in a batch of zeros that warms up."""
    data = [(torch.zeros(length, dtype=torch.long), 0) for length in LENGTHS] + records()
    model, optimizer, loader = made_private(built(Mean), data, to_longest, poisson_sampling=False)
    assert epoch(model, optimizer, itertools.islice(loader, 1), of_labels) == 1
    with pytest.raises(PrivacyError, match="padded less"):
        epoch(model, optimizer, loader, of_labels)


# ------------------------------------------------------------------------------------------------ in the loss


def mean_of_all(out: Tensor, words: Tensor) -> Tensor:
    return (out[..., 0] - words).pow(2).mean()


def mean_of_each(out: Tensor, words: Tensor) -> Tensor:
    return (out[..., 0] - words).pow(2).mean(1).mean()


def mean_by_numel(out: Tensor, words: Tensor) -> Tensor:
    losses = (out[..., 0] - words).pow(2)
    return losses.sum() / losses.numel()


def mean_of_torch(out: Tensor, words: Tensor) -> Tensor:
    return F.mse_loss(out[..., 0], words.double())


def mean_of_flat(out: Tensor, words: Tensor) -> Tensor:
    return F.cross_entropy(out.reshape(-1, CLASSES), words.reshape(-1) % CLASSES)


def mean_of_masked(out: Tensor, words: Tensor) -> Tensor:
    return ((out[..., 0] - words).pow(2) * (words != 0)).mean()


def own_mean(out: Tensor, words: Tensor) -> Tensor:
    mask = words != 0
    return (((out[..., 0] - words).pow(2) * mask).sum(1) / mask.sum(1)).mean()


def own_cross_entropy(out: Tensor, words: Tensor) -> Tensor:
    mask = words != 0
    losses = F.cross_entropy(out.mT, words % CLASSES, reduction="none") * mask
    return (losses.sum(1) / mask.sum(1)).mean()


def sum_by_constant(out: Tensor, words: Tensor) -> Tensor:
    return ((out[..., 0] - words).pow(2) * (words != 0)).sum(1).mean() / 8


def over_words(loss: Any) -> Any:
    return lambda model, words, lengths, labels: loss(model(words, lengths), words)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "loss", [mean_of_all, mean_of_each, mean_by_numel, mean_of_torch, mean_of_flat, mean_of_masked]
)
def test_a_mean_over_padded_positions_is_refused(loss: Any, mode: str) -> None:
    with pytest.raises(PrivacyError, match="positions that were padded"):
        trained(built(EachWord), records(), to_longest, mode, over_words(loss))
    trained(built(EachWord), records(), to_twelve, mode, over_words(loss))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", [own_mean, own_cross_entropy, sum_by_constant])
def test_a_mean_over_positions_of_its_own_moves_by_c_at_most(loss: Any, mode: str) -> None:
    assert sensitivity(built(EachWord), to_longest, mode, over_words(loss)) <= C * (1 + 1e-6)


def last_of_batch(out: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    return F.cross_entropy(out[:, -1], labels)


def sum_of_batch(out: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    return F.cross_entropy(out.sum(1) / lengths.unsqueeze(1), labels)


def largest_of_batch(out: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    return F.cross_entropy(out.amax(1), labels)


def last_of_each(out: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    return F.cross_entropy(out[torch.arange(len(out)), lengths - 1], labels)


def sum_of_each(out: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.arange(out.shape[1]) < lengths.unsqueeze(1)
    return F.cross_entropy((out * mask.unsqueeze(2)).sum(1) / lengths.unsqueeze(1), labels)


def pooled_outside(loss: Any) -> Any:
    return lambda model, words, lengths, labels: loss(model(words, lengths), labels, lengths)


class Recurrent(Text):
    """One output a position, of what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.rnn(self.words(words))[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [EachWord, Recurrent])
@pytest.mark.parametrize("loss", [last_of_batch, sum_of_batch, largest_of_batch])
def test_a_loss_that_uses_outputs_for_padding_is_refused(loss: Any, model: type[Text], mode: str) -> None:
    with pytest.raises(PrivacyError, match="at positions that were padded"):
        trained(built(model), records(), to_longest, mode, pooled_outside(loss))
    trained(built(model), records(), to_twelve, mode, pooled_outside(loss))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", [last_of_each, sum_of_each])
def test_a_loss_that_uses_outputs_for_each_records_own_moves_by_c_at_most(loss: Any, mode: str) -> None:
    assert sensitivity(built(Recurrent), to_longest, mode, pooled_outside(loss)) <= C * (1 + 1e-6)


def next_words(loss: Any) -> Any:
    """Of the word that follows each, so the model is given one less than there are."""
    return lambda model, words, lengths, labels: loss(model(words[:, :-1], lengths), words[:, 1:])


class OfAllWords(Recurrent):
    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(words, lengths) + self.words(words).mean((1, 2), keepdim=True)


def test_the_last_word_may_be_left_out() -> None:
    with pytest.raises(PrivacyError, match="positions that were padded"):
        trained(built(Recurrent), records(), to_longest, "bk", next_words(mean_of_all))
    with pytest.raises(PrivacyError, match="padded less"):
        trained(built(OfAllWords), records(), to_longest, "bk", next_words(own_mean))
    assert sensitivity(built(Recurrent), to_longest, "bk", next_words(own_mean)) <= C * (1 + 1e-6)


def test_a_mean_over_features_is_none_over_positions() -> None:
    """Though their number is a multiple of the longest record's positions."""

    def loss(out: Tensor, words: Tensor) -> Tensor:
        mask = words != 0
        return ((out.pow(2).mean(2) * mask).sum(1) / mask.sum(1)).mean()

    lengths = (1, 2, 3, 3, 1, 2)
    model = built(EachWord)
    model.head = nn.Linear(WIDTH, 2 * max(lengths))
    trained(model, records(lengths), to_longest, "bk", over_words(loss))


def test_a_mean_over_classes_is_none_over_positions() -> None:
    def loss(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(model(words, lengths), F.one_hot(labels, CLASSES).double())

    lengths = (1, CLASSES, 2, 1)
    trained(built(MaskedMean), records(lengths), to_longest, "bk", loss)


def test_a_criterion_is_read_as_well() -> None:
    model, _, criterion, loader = made_private(built(EachWord), records(), to_longest, criterion=nn.MSELoss())
    words, lengths, _ = next(iter(loader))
    loss = criterion(model(words, lengths)[..., 0], words.float())
    with pytest.raises(PrivacyError, match="positions that were padded"):
        loss.backward()


def test_a_forward_without_a_backward_does_not_vouch_for_the_loss() -> None:
    model, optimizer, loader = made_private(built(EachWord), records() * 6, to_longest)
    words, lengths, _ = next(iter(loader))
    model(words, lengths)
    with pytest.raises(PrivacyError, match="positions that were padded"):
        epoch(model, optimizer, loader, over_words(mean_of_all))


# ------------------------------------------------------------------------------------------------ the search


class FromWorkers:
    """Records that can be read in a worker process only."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> Record:
        if torch.utils.data.get_worker_info() is None:
            raise OSError("the file is not open here")
        return records()[index]


def test_records_that_cannot_be_collated_alone_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="OSError: the file is not open here"):
        trained(built(MaskedMean), FromWorkers(), to_longest, "bk", num_workers=1)  # type: ignore[arg-type]


class Crops(list):  # type: ignore[type-arg]
    """Records that are others each time that they are fetched."""

    def __getitem__(self, index: Any) -> Any:
        words, label = super().__getitem__(index)
        return words[int(torch.randint(len(words), ())) :], label


@pytest.mark.parametrize("seed", range(5))
def test_records_that_are_drawn_anew_may_be_padded_too(seed: int) -> None:
    model, optimizer, loader = made_private(built(MaskedMean), Crops(records() * 5), to_longest)
    torch.manual_seed(seed)
    assert epoch(model, optimizer, loader, of_labels) == len(loader)
    model, optimizer, loader = made_private(built(Mean), Crops(records() * 5), to_longest)
    with pytest.raises(PrivacyError, match="padded less"):
        epoch(model, optimizer, loader, of_labels)


def test_the_search_leaves_random_states_as_they_were() -> None:
    _, _, loader = made_private(built(Mean), records(), with_words_masked, num_workers=1)
    batches = iter(loader)  # torch draws a seed for the workers
    before = torch.get_rng_state()
    next(batches)
    assert loader.feed.padding()
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ what else batches hold


def beside_lists(batch: Sequence[Record]) -> dict[str, Any]:
    """As for detection: what belongs to a record stands in a list, before what was padded."""
    words, lengths, labels = to_longest(batch)
    return {"boxes": [{"box": w[:, None]} for w, _ in batch], "lengths": list(lengths), "words": words, "label": labels}


def beside_other_layouts(batch: Sequence[Record]) -> dict[str, Any]:
    """Nothing in them can be cut."""
    ragged = [words.double() for words, _ in batch]
    jagged = torch.nested.nested_tensor(ragged, layout=torch.jagged)
    return {"sparse": torch.eye(len(batch)).to_sparse(), "jagged": jagged, **beside_lists(batch)}


def of_named(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(model(batch["words"], torch.stack(batch["lengths"])), batch["label"])


@pytest.mark.parametrize("collate", [beside_lists, beside_other_layouts])
def test_lists_of_records_and_other_layouts_stand_beside_what_was_padded(collate: Any) -> None:
    for kind in (MaskedMean, Mean):
        model, optimizer, loader = made_private(built(kind), records(), collate)
        batches = ((batch,) for batch in loader)
        if kind is MaskedMean:
            assert epoch(model, optimizer, batches, of_named) == 1
        else:
            with pytest.raises(PrivacyError, match="padded less"):
                epoch(model, optimizer, batches, of_named)


# ------------------------------------------------------------------------------------------------ where they come from


class FetchedAtOnce(Dataset[Any]):
    """As datasets that tokenize what they fetch: single records, or (``whole``) a batch that is left as it is."""

    def __init__(self, *, whole: bool) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitems__(self, indices: list[int]) -> Any:
        batch = to_longest([records()[i] for i in indices])
        return batch if self.whole else list(zip(*batch, strict=True))


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_dataset_may_pad_what_it_fetches_at_once(whole: bool, subset: bool) -> None:
    data: Any = FetchedAtOnce(whole=whole)
    data = Subset(data, range(len(data))) if subset else data
    collate = (lambda batch: batch) if whole else None
    with pytest.raises(PrivacyError, match="padded less"):
        trained(built(Mean), data, collate, "bk")
    trained(built(MaskedMean), data, collate, "bk")


def test_records_that_are_kept_by_a_dataset_stay_whole() -> None:
    """Where workers take them apart, these are copies of theirs."""

    def taken_apart(batch: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        return to_longest([(record.pop("words"), record.pop("label")) for record in batch])

    data: Any = [{"words": words, "label": label} for words, label in records()]
    trained(built(MaskedMean), data, taken_apart, "bk", num_workers=1)
    assert all(len(record) == 2 for record in data)


# ------------------------------------------------------------------------------------------------ how models take records


class Squeezing(MaskedMean):
    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(words, lengths)[:, :1].squeeze()


class Sorted(Packed):
    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(h, lengths, batch_first=True)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(1)


class OfThreeWords(Text):
    """Does not run on less."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)

    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        h, lengths = self.conv(h.mT), (lengths - 2).clamp(min=1).unsqueeze(1)
        return (h * (torch.arange(h.shape[2]) < lengths).unsqueeze(1)).sum(2) / lengths


class FrozenWords(Text):
    """Nothing moves the zeros that stand where there are no words."""

    def __init__(self) -> None:
        super().__init__()
        self.words.requires_grad_(False)

    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        return h.sum(1) / lengths.unsqueeze(1)


class MaskedByHead(Text):
    """A mask [heads n, t, t]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def pooled(self, h: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        return self.attention(h, h, h, attn_mask=lengths)[0][:, 0]  # type: ignore[no-any-return]


def squeezed(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(words, lengths), (labels > 0).double())


def sorted_in_loop(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    order = lengths.argsort(descending=True)
    return F.cross_entropy(model(words[order], lengths[order]), labels[order])


def masked_by_head(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    mask = (words == 0).unsqueeze(1).expand(-1, words.shape[1], -1).repeat_interleave(2, 0)
    return F.cross_entropy(model(words, mask), labels)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (Squeezing, squeezed),
        (Sorted, sorted_in_loop),
        (OfThreeWords, of_labels),
        (FrozenWords, of_labels),
        (MaskedByHead, masked_by_head),
    ],
)
def test_a_bounded_model_is_trained_however_it_takes_its_records(model: type[Text], loss: Any) -> None:
    assert sensitivity(built(model), to_longest, "bk", loss) <= C * (1 + 1e-6)


def test_frozen_words_that_train_later_are_looked_at_again() -> None:
    model, optimizer, loader = made_private(built(FrozenWords), records() * 3, to_longest)
    assert epoch(model, optimizer, loader, of_labels) == len(loader)
    model.words.requires_grad_()
    with pytest.raises(PrivacyError, match="padded less"):
        epoch(model, optimizer, loader, of_labels)


def test_a_mask_may_lead_with_records_beside_data_that_leads_with_time() -> None:
    class TimeFirst(MaskedByHead):
        def forward(self, words: Tensor, mask: Tensor) -> Tensor:
            h = self.words(words)
            return self.head(self.attention(h, h, h, key_padding_mask=mask)[0][0])  # type: ignore[no-any-return]

    def loss(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(words.mT.contiguous(), words == 0), labels)

    model = built(TimeFirst)
    model.attention.batch_first = False  # type: ignore[union-attr, assignment]
    trained(model, records(), to_longest, "bk", loss, batch_first=False)


def test_time_may_come_last_and_be_as_long_as_there_are_features() -> None:
    class Filters(OfThreeWords):
        def forward(self, vectors: Tensor, lengths: Tensor) -> Tensor:
            return self.head(self.conv(vectors).sum(2) / lengths.unsqueeze(1))  # type: ignore[no-any-return]

    def loss(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        vectors = F.one_hot(words, WORDS)[:, :, 1:].double()[:, :, : max(LENGTHS)].mT
        return F.cross_entropy(model(vectors, lengths), labels)

    model = built(Filters)
    del model.words
    model.conv = nn.Conv1d(max(LENGTHS), WIDTH, 1, bias=False)
    trained(model, records(), to_longest, "bk", loss)


@pytest.mark.parametrize("masked", [True, False])
def test_two_that_are_padded_to_one_length_are_told_apart(masked: bool) -> None:
    class Translating(EachWord):
        def forward(self, words: Tensor, others: Tensor) -> Tensor:
            mask = (words != 0).unsqueeze(2) if masked else torch.ones(*words.shape, 1)
            context = (self.words(words) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            return self.head(self.words(others) + context)  # type: ignore[no-any-return]

    def both(batch: Sequence[Any]) -> tuple[Tensor, Tensor]:
        return to_longest([one for one, _ in batch])[0], to_longest([other for _, other in batch])[0]

    def loss(model: nn.Module, words: Tensor, others: Tensor) -> Tensor:
        return own_mean(model(words, others), others)

    data: Any = list(zip(records((9, 5, 2, 9, 4, 5)), records((4, 9, 3, 2, 7, 9)), strict=True))
    if masked:
        trained(built(Translating), data, both, "bk", loss)
    else:
        with pytest.raises(PrivacyError, match="padded less"):
            trained(built(Translating), data, both, "bk", loss)


def test_packed_outputs_are_as_long_as_their_input() -> None:
    """As long as the longest record, they would change when it leaves, though the batch is padded to a constant."""

    class Tagger(Recurrent):
        total = False

        def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(self.words(words), lengths, batch_first=True, enforce_sorted=False)
            total = words.shape[1] if self.total else None
            return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=total)[0])  # type: ignore[no-any-return]

    def loss(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        out = model(words, lengths)
        return own_mean(out, words[:, : out.shape[1]])

    for collate in (to_longest, to_twelve):
        with pytest.raises(PrivacyError, match="total_length"):
            trained(built(Tagger), records(), collate, "bk", loss)
    Tagger.total = True
    assert sensitivity(built(Tagger), to_longest, "bk", loss) <= C * (1 + 1e-6)


def test_the_longest_length_may_be_passed_as_a_number() -> None:
    class AsLongAs(Recurrent):
        def forward(self, words: Tensor, lengths: Tensor, total: int = 0) -> Tensor:
            packed = pack_padded_sequence(self.words(words), lengths, batch_first=True, enforce_sorted=False)
            return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=total)[0])  # type: ignore[no-any-return]

    def whole(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        return mean_of_all(model(words, lengths, words.shape[1]), words)

    def of_each(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        return own_mean(model(words, lengths, total=words.shape[1]), words)

    with pytest.raises(PrivacyError, match="positions that were padded"):
        trained(built(AsLongAs), records(), to_longest, "bk", whole)
    assert sensitivity(built(AsLongAs), to_longest, "bk", of_each) <= C * (1 + 1e-6)


def test_what_only_a_loss_reads_is_not_collated_again_in_every_batch() -> None:
    fetched = []

    class Counted(Dataset[Any]):
        def __len__(self) -> int:
            return 360

        def __getitem__(self, i: int) -> Record:
            fetched.append(i)
            return records()[i % 6]

    def loss(model: nn.Module, words: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        targets = (words * 0.1).sum(1) / lengths
        return (model(words[:, :1].expand(-1, 2), lengths)[:, 0] - targets).pow(2).mean()

    model, optimizer, loader = made_private(built(MaskedMean).double(), Counted(), to_longest, poisson_sampling=False)
    epoch(model, optimizer, loader, loss)
    first = len(fetched)
    epoch(model, optimizer, loader, loss)
    assert len(fetched) - first <= 360 + 6 * 2
