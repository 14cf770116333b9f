"""What is timed: models that people train, as they write them, with made-up data of the right shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """One model and its batches.

    Attributes:
        title: for tables.
        model: builds the model.
        batch: builds ``(inputs, targets)`` of n records.
        n: records in a batch.
        target: ratios to the plain step that are aimed at: time of bk, of ghost, peak memory of ghost.
        records_loss: the loss of each record, [n].
    """

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    n: int
    target: tuple[float, float, float] | None = None
    records_loss: Callable[[Tensor, Tensor], Tensor] = lambda out, y: F.cross_entropy(out, y, reduction="none")


def _images(channels: int, size: int) -> Callable[[int], Batch]:
    return lambda n: (torch.randn(n, channels, size, size), torch.randint(10, (n,)))


def _tokens(t: int, vocabulary: int) -> Callable[[int], Batch]:
    return lambda n: (torch.randint(vocabulary, (n, t)), torch.randint(vocabulary, (n, t)))


def _loss_of_tokens(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def wide_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def cnn() -> nn.Module:
    """The network of Opacus' MNIST example."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class _Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(8, o)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.GroupNorm(8, o)
        self.short = nn.Conv2d(i, o, 1, stride, bias=False) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.short(x))


def resnet() -> nn.Module:
    """ResNet-20 for 32 x 32 images (He et al. 2016, section 4.2) with group norms and projections."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(8, 16), nn.ReLU()]
    for i, o in ((16, 16), (16, 32), (32, 64)):
        layers += [_Residual(i, o, 1 if i == o else 2), _Residual(o, o, 1), _Residual(o, o, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Block(nn.Module):
    """A transformer block, norms first (Xiong et al. 2020)."""

    def __init__(self, d: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(h.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """32 x 32 images in patches of 4 x 4: 64 positions."""

    def __init__(self, d: int = 192, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, d, 4, 4), nn.Embedding(64, d)
        self.blocks = nn.Sequential(*(Block(d, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = h + self.place(torch.arange(64).expand(len(x), 64))
        return self.head(self.norm(self.blocks(h)).mean(1))


class GPT(nn.Module):
    """A decoder with its own head."""

    def __init__(self, t: int, d: int, depth: int, heads: int, vocabulary: int = 4096) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, d), nn.Embedding(t, d)
        self.blocks = nn.Sequential(*(Block(d, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).expand(ids.shape)
        return self.head(self.norm(self.blocks(self.words(ids) + self.places(places))))


class Recommender(nn.Module):
    """A million items, twenty of them in a record."""

    def __init__(self, items: int = 1_000_000, d: int = 16) -> None:
        super().__init__()
        self.items = nn.Embedding(items, d)
        self.mlp = nn.Sequential(nn.Linear(d, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, ids: Tensor) -> Tensor:
        return self.mlp(self.items(ids).mean(1))


class TextLSTM(nn.Module):
    """A classifier of texts."""

    def __init__(self, vocabulary: int = 1000, d: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(vocabulary, d), nn.LSTM(d, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(ids))[0][:, -1])


def many_layers() -> nn.Module:
    """A thousand small layers, orthogonal so that the signal gets through: all of it is what a call costs."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(1000)))
    for layer in model:
        nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


class _LoRA(nn.Module):
    """A frozen linear layer with a trained update of low rank (Hu et al. 2022)."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def lora() -> nn.Module:
    """The GPT, frozen, with updates of rank 8 in its attention."""
    model = GPT(128, 384, 4, 6).requires_grad_(False)
    for block in model.blocks:
        block.qkv, block.out = _LoRA(block.qkv), _LoRA(block.out)
    return model


def bitfit() -> nn.Module:
    """The ViT with only its biases trained (Ben Zaken et al. 2022)."""
    model = ViT()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return model


WORKLOADS = {
    "mlp": Workload("wide MLP (784-512-512-10)", wide_mlp,
                    lambda n: (torch.randn(n, 784), torch.randint(10, (n,))), 256, (1.5, 1.7, 1.2)),
    "cnn": Workload("CNN (28 x 28)", cnn, _images(1, 28), 256, (1.4, 1.7, 1.3)),
    "resnet": Workload("GroupNorm ResNet-20 (32 x 32)", resnet, _images(3, 32), 32, (1.5, 1.8, 1.3)),
    "vit": Workload("ViT (t=64, d=192)", ViT, _images(3, 32), 32, (1.2, 1.5, 1.2)),
    "gpt": Workload("GPT (t=128, d=384, 4k words)", lambda: GPT(128, 384, 4, 6), _tokens(128, 4096), 8,
                    (1.25, 1.5, 1.2), _loss_of_tokens),
    "gpt512": Workload("long GPT (t=512, d=256)", lambda: GPT(512, 256, 4, 4), _tokens(512, 4096), 4,
                       (1.3, 1.6, 1.2), _loss_of_tokens),
    "gpt2048": Workload("long GPT (t=2048, d=256)", lambda: GPT(2048, 256, 2, 4), _tokens(2048, 4096), 1,
                        None, _loss_of_tokens),
    "recommender": Workload("recommender (10^6 items)", Recommender,
                            lambda n: (torch.randint(1_000_000, (n, 20)), torch.randint(10, (n,))), 256),
    "lstm": Workload("LSTM (t=32)", TextLSTM,
                     lambda n: (torch.randint(1000, (n, 32)), torch.randint(10, (n,))), 64),
    "lora": Workload("LoRA on a frozen GPT", lora, _tokens(128, 4096), 8, None, _loss_of_tokens),
    "bitfit": Workload("BiTFiT on a ViT", bitfit, _images(3, 32), 32),
    "layers": Workload("1,000 layers of 4 x 4", many_layers,
                       lambda n: (torch.randn(n, 4), torch.randint(4, (n,))), 16),
}  # fmt: skip
