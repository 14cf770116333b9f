"""A private text classifier: which of six departments does a clothing review come from? (18,103 reviews)

    python examples/text_classification.py             epsilon 3, under a minute
    python examples/text_classification.py --quick     seconds

The privacy unit is one review. Words are hashed to buckets, so that no vocabulary is collected from the reviews.
"""

from __future__ import annotations

import argparse

import data
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ghostgrad import PrivacyEngine

DELTA = 1e-5
BUCKETS = 2048


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder that holds the data files")
    parser.add_argument("--epsilon", type=float, default=3.0, help="budget at delta 1e-5 (default: 3)")
    parser.add_argument("--mode", default="auto", help="clipper: auto, hooks, ghost, bk or functorch")
    parser.add_argument("--seed", type=int, help="repeatable, for experiments only: a known seed voids the guarantee")
    parser.add_argument("--quick", action="store_true", help="fewer reviews, seconds")
    return parser.parse_args(argv)


class BagOfWords(nn.Module):
    """Sum of the embeddings of the words, scaled by the review's own length, and a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS, width)
        self.head = nn.Linear(width, len(data.DEPARTMENTS))
        nn.init.normal_(self.embedding.weight, std=0.3)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        # The padding row is a parameter like the others and gets noise, so it has to be masked out, not only be zero.
        is_word = (ids != data.PAD).unsqueeze(2)
        words = is_word.sum(dim=1).clamp(min=1)
        return self.head((self.embedding(ids) * is_word).sum(dim=1) / words.sqrt())


@torch.no_grad()
def accuracy(model: nn.Module, reviews: TensorDataset) -> float:
    ids, target = reviews.tensors
    return float((model(ids).argmax(1) == target).float().mean())


def train_privately(reviews: TensorDataset, args: argparse.Namespace) -> tuple[nn.Module, PrivacyEngine]:
    batch_size, epochs = (500, 4) if args.quick else (1024, 6)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model: nn.Module = BagOfWords()
    optimizer = torch.optim.SGD(model.parameters(), lr=4.0, momentum=0.9)
    loader = DataLoader(reviews, batch_size=batch_size)

    engine = PrivacyEngine(seed=args.seed)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=args.epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=1.0,
        grad_sample_mode=args.mode,
    )
    for _ in tqdm(range(epochs), unit="epoch"):
        for ids, department in loader:
            loss = F.cross_entropy(model(ids), department)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, engine


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, print and return test accuracy and epsilon."""
    args = arguments(argv)
    split = data.clothing_reviews(args.data, buckets=BUCKETS)
    if args.quick:
        split = split.head(8000, 1000)
    model, engine = train_privately(split.train, args)
    reached, epsilon = accuracy(model, split.test), engine.get_epsilon(delta=DELTA)
    commonest = float((split.test.tensors[1] == 0).float().mean())
    print(
        f"reviews: test accuracy {reached:.2%} (always {data.DEPARTMENTS[0]}: {commonest:.2%}) after {engine.steps} "
        f"steps on {split.n_train} reviews, epsilon {epsilon:.2f} at delta {DELTA}, clipper {engine.grad_sample_mode}"
    )
    return reached, epsilon


if __name__ == "__main__":
    main()
