"""A private image classifier on real images.

    python examples/images.py                        5,000 MNIST digits: the demo, about a minute
    python examples/images.py --dataset fashion      all of Fashion-MNIST: two to four minutes
    python examples/images.py --quick                seconds

The privacy unit is one image. Fixed edge features (oriented_energy.py) feed a small network that is trained privately.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import data
import torch
import torch.nn.functional as F
from oriented_energy import CHANNELS, oriented_energy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ghostgrad import BatchMemoryManager, PrivacyEngine

DELTA = 1e-5


@dataclass(frozen=True)
class Settings:
    """What the printed accuracy was reached with; README.md has the figures."""

    load: Callable[..., data.Split]
    batch_size: int
    epochs: int
    learning_rate: float
    max_grad_norm: float


SETTINGS = {
    "mnist": Settings(data.mnist_5k, batch_size=1024, epochs=25, learning_rate=4.0, max_grad_norm=0.1),
    "fashion": Settings(data.fashion_mnist, batch_size=4096, epochs=14, learning_rate=12.0, max_grad_norm=0.1),
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=SETTINGS, default="mnist")
    parser.add_argument("--data", metavar="DIR", help="folder that holds the data files")
    parser.add_argument("--epsilon", type=float, default=3.0, help="budget at delta 1e-5 (default: 3)")
    parser.add_argument("--mode", default="auto", help="clipper: auto, hooks, ghost, bk or functorch")
    parser.add_argument("--physical", type=int, default=512, help="most images in memory at once (default: 512)")
    parser.add_argument("--seed", type=int, help="repeatable, for experiments only: a known seed voids the guarantee")
    parser.add_argument("--quick", action="store_true", help="a few hundred images, seconds")
    return parser.parse_args(argv)


def small_network() -> nn.Module:
    head = nn.Linear(32 * 7 * 7, 10)
    nn.init.zeros_(head.weight)  # the first step then moves all classes alike
    return nn.Sequential(nn.Conv2d(CHANNELS, 32, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), head)


def with_features(images: TensorDataset) -> TensorDataset:
    return TensorDataset(oriented_energy(images.tensors[0]), images.tensors[1])


@torch.no_grad()
def accuracy(model: nn.Module, images: TensorDataset) -> float:
    batches: zip[tuple[Tensor, Tensor]] = zip(*(t.split(1000) for t in images.tensors), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(images)


def train_privately(
    images: TensorDataset, settings: Settings, args: argparse.Namespace
) -> tuple[nn.Module, PrivacyEngine]:
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=0.9)
    loader = DataLoader(images, batch_size=settings.batch_size)

    engine = PrivacyEngine(seed=args.seed)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=args.epsilon,
        target_delta=DELTA,
        epochs=settings.epochs,
        max_grad_norm=settings.max_grad_norm,
        grad_sample_mode=args.mode,
    )
    progress = tqdm(total=settings.epochs * len(loader), unit="step")
    for _ in range(settings.epochs):
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=args.physical, optimizer=optimizer
        ) as pieces:
            for x, y in pieces:
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                progress.update(engine.steps - progress.n)
    progress.close()
    return model, engine


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, print and return test accuracy and epsilon."""
    args = arguments(argv)
    settings = SETTINGS[args.dataset]
    split = settings.load(args.data)
    if args.quick:
        split = split.head(800, 500)
        settings = replace(settings, batch_size=200, epochs=4)
    model, engine = train_privately(with_features(split.train), settings, args)
    reached, epsilon = accuracy(model, with_features(split.test)), engine.get_epsilon(delta=DELTA)
    print(
        f"{args.dataset}: test accuracy {reached:.2%} after {engine.steps} steps on {split.n_train} images, "
        f"epsilon {epsilon:.2f} at delta {DELTA}, clipper {engine.grad_sample_mode}"
    )
    return reached, epsilon


if __name__ == "__main__":
    main()
