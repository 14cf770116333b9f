"""The private text classifier of text_classification.py, trained by Lightning: the LightningModule knows nothing of privacy.

    python examples/lightning_trainer.py             epsilon 3 on 18,103 reviews, a minute or two
    python examples/lightning_trainer.py --quick     seconds

`DPCallback` exchanges optimizer and loader for private ones while ``Trainer.fit`` runs. The privacy unit is one review.

    python -m pip install 'ghostgrad[trainers,examples]'
"""

from __future__ import annotations

import argparse
import tempfile

import data
import torch
import torch.nn.functional as F
from text_classification import BUCKETS, BagOfWords, accuracy
from torch.utils.data import DataLoader

from ghostgrad.integrations import PrivacyPlan

DELTA = 1e-5


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder that holds the data files")
    parser.add_argument("--epsilon", type=float, default=3.0, help="budget at delta 1e-5 (default: 3)")
    parser.add_argument("--mode", default="auto", help="clipper: auto, hooks, ghost, bk or functorch")
    parser.add_argument("--seed", type=int, help="repeatable, for experiments only: a known seed voids the guarantee")
    parser.add_argument("--quick", action="store_true", help="fewer reviews, seconds")
    return parser.parse_args(argv)


def classifier():  # type: ignore[no-untyped-def]  # lightning is optional
    """As people write it."""
    from lightning.pytorch import LightningModule

    class Reviews(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = BagOfWords()

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            ids, department = batch
            return F.cross_entropy(self.model(ids), department)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=4.0, momentum=0.9)

    return Reviews()


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, print and return test accuracy and epsilon."""
    args = arguments(argv)
    from lightning.pytorch import Trainer

    from ghostgrad.integrations.lightning import DPCallback

    split = data.clothing_reviews(args.data, buckets=BUCKETS)
    if args.quick:
        split = split.head(8000, 1000)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    module = classifier()
    plan = PrivacyPlan(DELTA, target_epsilon=args.epsilon, grad_sample_mode=args.mode, seed=args.seed)
    private = DPCallback(plan, max_grad_norm=1.0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=4 if args.quick else 6, callbacks=[private], default_root_dir=folder, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(split.train, batch_size=500 if args.quick else 1024))
    reached, epsilon = accuracy(module.model, split.test), private.engine.get_epsilon(delta=DELTA)
    print(
        f"reviews: test accuracy {reached:.2%} after {private.engine.steps} steps on {split.n_train} reviews, epsilon "
        f"{epsilon:.2f} at delta {DELTA}, clipping {plan.clipping}"
    )
    return reached, epsilon


if __name__ == "__main__":
    main()
