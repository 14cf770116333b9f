"""A private tabular classifier: does a person earn more than 50,000 dollars a year? (Adult, 48,842 people)

    python examples/tabular.py             epsilon 1, about twenty seconds
    python examples/tabular.py --quick     seconds

The privacy unit is one person. Categories and bin edges are public constants (data.py), nothing is fitted to the table.
"""

from __future__ import annotations

import argparse

import data
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ghostgrad import PrivacyEngine

DELTA = 1e-5


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder that holds the data files")
    parser.add_argument("--epsilon", type=float, default=1.0, help="budget at delta 1e-5 (default: 1)")
    parser.add_argument("--mode", default="auto", help="clipper: auto, hooks, ghost, bk or functorch")
    parser.add_argument("--seed", type=int, help="repeatable, for experiments only: a known seed voids the guarantee")
    parser.add_argument("--quick", action="store_true", help="a tenth of the people, seconds")
    return parser.parse_args(argv)


@torch.no_grad()
def accuracy(model: nn.Module, people: TensorDataset) -> float:
    features, target = people.tensors
    return float((model(features).argmax(1) == target).float().mean())


def train_privately(people: TensorDataset, args: argparse.Namespace) -> tuple[nn.Module, PrivacyEngine]:
    batch_size, epochs = (400, 3) if args.quick else (2048, 10)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    columns = people.tensors[0].shape[1]
    model: nn.Module = nn.Sequential(nn.Linear(columns, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    loader = DataLoader(people, batch_size=batch_size)

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
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, engine


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, print and return test accuracy and epsilon."""
    args = arguments(argv)
    split = data.adult(args.data)
    if args.quick:
        split = split.head(4000, 1000)
    model, engine = train_privately(split.train, args)
    reached, epsilon = accuracy(model, split.test), engine.get_epsilon(delta=DELTA)
    print(
        f"adult: test accuracy {reached:.2%} (always 'no': {1 - split.test.tensors[1].float().mean():.2%}) after "
        f"{engine.steps} steps on {split.n_train} people, epsilon {epsilon:.2f} at delta {DELTA}, "
        f"clipper {engine.grad_sample_mode}"
    )
    return reached, epsilon


if __name__ == "__main__":
    main()
