"""A private character language model of the State of the Union addresses.

    python examples/char_lm.py             epsilon 3, about six minutes
    python examples/char_lm.py --quick     seconds

The privacy unit is one passage of 129 characters: what is protected is whether any one passage was in the training
text. A whole address is some hundreds of passages and is *not* protected at this epsilon.

The loss of a passage is the mean over its own 128 predictions, all of which count, so that the mean over the batch is a
mean of per-record losses.
"""

from __future__ import annotations

import argparse
import math

import data
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ghostgrad import BatchMemoryManager, PrivacyEngine

DELTA = 1e-5


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder that holds the data files")
    parser.add_argument("--epsilon", type=float, default=3.0, help="budget at delta 1e-5 (default: 3)")
    parser.add_argument("--mode", default="auto", help="clipper: auto, hooks, ghost, bk or functorch")
    parser.add_argument("--seed", type=int, help="repeatable, for experiments only: a known seed voids the guarantee")
    parser.add_argument("--quick", action="store_true", help="a few hundred passages, seconds")
    return parser.parse_args(argv)


class CausalBlock(nn.Module):
    """A residual convolution that sees a position and those before it."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.past = 2 * dilation
        self.convolution = nn.Conv1d(width, width, kernel_size=3, dilation=dilation)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.relu(self.convolution(F.pad(h, (self.past, 0))))


class CharacterModel(nn.Module):
    """Scores ``[n, characters, t]`` of the next character at each position of ids ``[n, t]``."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(data.VOCABULARY, width)
        self.blocks = nn.Sequential(*(CausalBlock(width, dilation) for dilation in (1, 2, 4)))
        self.head = nn.Linear(width, data.VOCABULARY)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.blocks(self.embedding(ids).transpose(1, 2))
        return self.head(h.transpose(1, 2)).transpose(1, 2)


@torch.no_grad()
def perplexity(model: nn.Module, passages: TensorDataset) -> float:
    batches = zip(*(t.split(250) for t in passages.tensors), strict=True)
    nats = sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in batches)
    return math.exp(nats / passages.tensors[1].numel())


def train_privately(passages: TensorDataset, args: argparse.Namespace) -> tuple[nn.Module, PrivacyEngine]:
    batch_size, epochs = (100, 3) if args.quick else (1024, 2)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model: nn.Module = CharacterModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    loader = DataLoader(passages, batch_size=batch_size)

    engine = PrivacyEngine(seed=args.seed)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=args.epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=0.3,
        grad_sample_mode=args.mode,
    )
    progress = tqdm(total=epochs * len(loader), unit="step")
    for _ in range(epochs):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=128, optimizer=optimizer) as pieces:
            for ids, following in pieces:
                loss = F.cross_entropy(model(ids), following)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                progress.update(engine.steps - progress.n)
    progress.close()
    return model, engine


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, print and return test perplexity per character and epsilon."""
    args = arguments(argv)
    split = data.speeches(args.data)
    split = split.head(600, 100) if args.quick else split.head(split.n_train, 1000)
    model, engine = train_privately(split.train, args)
    reached, epsilon = perplexity(model, split.test), engine.get_epsilon(delta=DELTA)
    print(
        f"speeches: test perplexity {reached:.2f} per character (guessing: {data.VOCABULARY}) after {engine.steps} "
        f"steps on {split.n_train} passages, epsilon {epsilon:.2f} at delta {DELTA} for one passage, "
        f"clipper {engine.grad_sample_mode}"
    )
    return reached, epsilon


if __name__ == "__main__":
    main()
