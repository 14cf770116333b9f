"""A small GPT-2 trained privately by transformers' own Trainer, all weights, embedding and head tied: American speeches.

    python examples/transformers_trainer.py             epsilon 3 on 78,810 passages of 129 characters; an hour on a CPU core
    python examples/transformers_trainer.py --quick     seconds

The model is transformers' GPT2LMHeadModel from a small configuration, over characters. `DPTrainer` takes the arguments of
``transformers.Trainer`` and a `PrivacyPlan`; progress bar, schedule, checkpoints and logs are the Trainer's. The privacy unit
is one passage.

    python -m pip install 'ghostgrad[trainers,examples]'
"""

from __future__ import annotations

import argparse
import math
import tempfile

import data
import torch
from torch.utils.data import Dataset, TensorDataset

from ghostgrad.integrations import PrivacyPlan

DELTA = 1e-5


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder that holds the data files")
    parser.add_argument("--epsilon", type=float, default=3.0, help="budget at delta 1e-5 (default: 3)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the passages (default: 2)")
    parser.add_argument(
        "--physical", type=int, default=128, help="passages in memory at once, on average (default: 128)"
    )
    parser.add_argument("--mode", default="auto", help="clipper: auto, hooks, ghost, bk or functorch")
    parser.add_argument("--seed", type=int, help="repeatable, for experiments only: a known seed voids the guarantee")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer passages, seconds")
    return parser.parse_args(argv)


class Passages(Dataset):
    """As the Trainer takes records: a dict of each. The model predicts every character from those before it."""

    def __init__(self, passages: TensorDataset) -> None:
        self.ids = passages.tensors[0]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def small_gpt2(width: int, layers: int, length: int):  # type: ignore[no-untyped-def]  # transformers is optional
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=data.VOCABULARY, n_embd=width, n_layer=layers, n_head=4, n_positions=length, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, print and return perplexity a character on passages not seen, and epsilon."""
    args = arguments(argv)
    from transformers import TrainingArguments

    from ghostgrad.integrations.transformers import DPTrainer

    length = 32 if args.quick else 128
    split = data.speeches(args.data, length=length)
    if args.quick:
        split = split.head(2000, 200)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model = small_gpt2(32 if args.quick else 128, 1 if args.quick else 4, length)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPTrainer(
            model,
            TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=125 if args.quick else args.physical,
                gradient_accumulation_steps=2 if args.quick else 1024 // args.physical,
                num_train_epochs=4 if args.quick else args.epochs,
                learning_rate=2e-2 if args.quick else 3e-3,
                lr_scheduler_type="cosine",
                max_grad_norm=0.3,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
            ),
            privacy=PrivacyPlan(DELTA, target_epsilon=args.epsilon, grad_sample_mode=args.mode, seed=args.seed),
            train_dataset=Passages(split.train),
            eval_dataset=Passages(split.test),
        )
        trainer.train()
        perplexity = math.exp(trainer.evaluate()["eval_loss"])
    epsilon = trainer.engine.get_epsilon(delta=DELTA)
    print(
        f"speeches: perplexity {perplexity:.2f} a character after {trainer.engine.steps} steps on {split.n_train} passages, "
        f"epsilon {epsilon:.2f} at delta {DELTA}, clipper {trainer.engine.grad_sample_mode}"
    )
    return perplexity, epsilon


if __name__ == "__main__":
    main()
