"""Public models on text that is padded to the longest of the batch: with a mask they are trained, without it most are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")

from ghostgrad import PrivacyEngine, PrivacyError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns about

Record = tuple[Tensor, int]
WORDS, CLASSES = 60, 3
GENERATOR = torch.Generator().manual_seed(0)
RECORDS = [(torch.randint(5, WORDS, (n,), generator=GENERATOR), n % CLASSES) for n in (4, 7, 12, 5, 9, 3)]


def on_the_right(batch: Sequence[Record]) -> tuple[Tensor, Tensor]:
    return pad_sequence([words for words, _ in batch], batch_first=True), torch.tensor([label for _, label in batch])


def on_the_left(batch: Sequence[Record]) -> tuple[Tensor, Tensor]:
    words, labels = on_the_right([(words.flip(0), label) for words, label in batch])
    return words.flip(1), labels


COMMON = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": CLASSES}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**COMMON, **SIZES))


def gpt2() -> Any:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**COMMON, **sizes))


def llama() -> Any:
    config = transformers.LlamaConfig(**COMMON, **SIZES, num_key_value_heads=2)
    return transformers.LlamaForSequenceClassification(config)


def fnet() -> Any:
    config = transformers.FNetConfig(vocab_size=WORDS, pad_token_id=0, num_labels=CLASSES, **SIZES)
    return transformers.FNetForSequenceClassification(config)


TRAINED = [
    (bert, on_the_right, True),
    (gpt2, on_the_right, True),
    (gpt2, on_the_right, False),  # causal, and reads the last word that is no padding
    (llama, on_the_right, True),
    (llama, on_the_left, True),  # its positions are relative
]
REFUSED = [
    (bert, on_the_right, False),
    (bert, on_the_left, True),  # positions count from the padding on
    (gpt2, on_the_left, True),
    (llama, on_the_left, False),
    (fnet, on_the_right, True),  # takes no mask, and mixes all positions
]


def train(build: Callable[[], Any], collate: Any, masked: bool) -> None:
    torch.manual_seed(0)
    user = DataLoader(RECORDS, batch_size=len(RECORDS), collate_fn=collate)  # type: ignore[arg-type]
    model, optimizer, loader = PrivacyEngine(seed=0).make_private(
        module=(model := build().train()), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=user,
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    for words, labels in loader:
        mask = {"attention_mask": (words != 0).long()} if masked and build is not fnet else {}
        F.cross_entropy(model(input_ids=words, **mask).logits, labels).backward()
        optimizer.step()


@pytest.mark.parametrize(("build", "collate", "masked"), TRAINED)
def test_what_does_not_depend_on_padding_is_trained(build: Callable[[], Any], collate: Any, masked: bool) -> None:
    train(build, collate, masked)


@pytest.mark.parametrize(("build", "collate", "masked"), REFUSED)
def test_what_depends_on_padding_is_refused(build: Callable[[], Any], collate: Any, masked: bool) -> None:
    with pytest.raises(PrivacyError, match="another when it is padded less"):
        train(build, collate, masked)
