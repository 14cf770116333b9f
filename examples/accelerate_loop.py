"""The private tabular classifier of tabular.py, in a loop for Accelerate: does a person earn more than 50,000 dollars a year?

    python examples/accelerate_loop.py             epsilon 1, about half a minute
    python examples/accelerate_loop.py --quick     seconds

`prepare` stands in for ``Accelerator.prepare``: model, optimizer and scheduler are accelerate's, the loader keeps its own
batches. The privacy unit is one person.

    python -m pip install 'ghostgrad[trainers,examples]'
"""

from __future__ import annotations

import argparse

import data
import torch
import torch.nn.functional as F
from tabular import accuracy
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
    parser.add_argument(
        "--bf16", action="store_true", help="forward and backward in bfloat16; sums and noise stay float32"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the people, seconds")
    return parser.parse_args(argv)


def train_privately(people: TensorDataset, args: argparse.Namespace) -> tuple[nn.Module, PrivacyEngine]:
    from accelerate import Accelerator

    from ghostgrad.integrations.accelerate import prepare

    batch_size, epochs = (400, 3) if args.quick else (2048, 10)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    columns = people.tensors[0].shape[1]
    model: nn.Module = nn.Sequential(nn.Linear(columns, 32), nn.Tanh(), nn.Linear(32, 2))
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no")
    model.to(accelerator.device)
    engine = PrivacyEngine(seed=args.seed)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
        data_loader=DataLoader(people, batch_size=batch_size),
        target_epsilon=args.epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=1.0,
        grad_sample_mode=args.mode,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader), eta_min=0.3)
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
    for _ in tqdm(range(epochs), unit="epoch"):
        for x, y in loader:
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False).cpu(), engine


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, print and return test accuracy and epsilon."""
    args = arguments(argv)
    split = data.adult(args.data)
    if args.quick:
        split = split.head(4000, 1000)
    model, engine = train_privately(split.train, args)
    reached, epsilon = accuracy(model, split.test), engine.get_epsilon(delta=DELTA)
    print(
        f"adult: test accuracy {reached:.2%} after {engine.steps} steps on {split.n_train} people, epsilon {epsilon:.2f} at "
        f"delta {DELTA}, clipper {engine.grad_sample_mode}"
    )
    return reached, epsilon


if __name__ == "__main__":
    main()
