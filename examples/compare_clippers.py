"""All clippers on the same private training: at one seed they draw the same batches and noise and give the same curve.

    python examples/compare_clippers.py                 3 epochs on 4,000 digits, noise 0 and 1, about a minute
    python examples/compare_clippers.py --quick         seconds

Writes one figure with a panel for each noise multiplier, and prints how far apart losses and final parameters are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import data
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ghostgrad import PrivacyEngine

MODES = ("hooks", "ghost", "bk", "functorch")
NOISE_MULTIPLIERS = (0.0, 1.0)
DELTA = 1e-5


@dataclass(frozen=True)
class Run:
    """One training: the loss of every logical batch, the final parameters, test accuracy, epsilon."""

    mode: str
    losses: list[float]
    parameters: Tensor
    accuracy: float
    epsilon: float


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder that holds the data files")
    parser.add_argument("--figure", type=Path, default=Path("runs/clippers.png"), help="where the figure goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one epoch on a few hundred images, seconds")
    return parser.parse_args(argv)


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3),
        nn.GroupNorm(4, 16),
        nn.Tanh(),
        nn.Conv2d(16, 16, 4, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 10),
    )


def train(split: data.Split, mode: str, noise_multiplier: float, epochs: int, seed: int) -> Run:
    torch.manual_seed(seed)  # the same initial parameters
    model = small_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(split.train, batch_size=200)
    engine = PrivacyEngine(seed=seed)  # the same batches and the same noise
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    losses = []
    for _ in range(epochs):
        for x, y in tqdm(loader, desc=f"noise {noise_multiplier:g} {mode}", leave=False):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    return Run(
        engine.grad_sample_mode, losses, parameters, accuracy(model, split.test), engine.get_epsilon(delta=DELTA)
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: TensorDataset) -> float:
    x, y = images.tensors
    return float((model(x).argmax(1) == y).float().mean())


def draw(runs: dict[float, list[Run]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(runs), figsize=(11, 4), sharey=True)
    for panel, (noise_multiplier, group) in zip(panels, runs.items(), strict=True):
        for k, run in enumerate(group):  # the first line wide, the later ones thin on top, so that all can be seen
            panel.plot(run.losses, label=run.mode, linewidth=8 - 2 * k, alpha=0.4 + 0.2 * k)
        panel.set(title=f"noise multiplier {noise_multiplier:g}", xlabel="step")
    panels[0].set_ylabel("loss of the logical batch")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> float:
    """Train in every mode and return the largest relative difference between final parameters."""
    args = arguments(argv)
    split = data.mnist_5k(args.data)
    split, epochs = (split.head(600, 200), 2) if args.quick else (split, 3)
    runs = {noise: [train(split, mode, noise, epochs, args.seed) for mode in MODES] for noise in NOISE_MULTIPLIERS}
    worst = 0.0
    for noise_multiplier, group in runs.items():
        for run in group:
            apart = float((run.parameters - group[0].parameters).norm() / group[0].parameters.norm())
            worst = max(worst, apart)
            print(
                f"noise {noise_multiplier:g}  clipper {run.mode:9}  test accuracy {run.accuracy:.2%}  last loss "
                f"{run.losses[-1]:.6f}  epsilon {run.epsilon:.2f} at delta {DELTA}  parameters {apart:.1e} from hooks"
            )
    draw(runs, args.figure)
    print(f"figure: {args.figure}")
    return worst


if __name__ == "__main__":
    main()
