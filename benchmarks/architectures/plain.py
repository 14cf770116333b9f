"""Models that people write from torch.nn itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from architectures.architecture import RECORDS, Architecture, Batch


class _Recurrent(nn.Module):
    """Embeds tokens, runs a recurrent layer, and classifies its last state."""

    def __init__(self, kind: type[nn.RNNBase], *, layers: int = 1, bidirectional: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 8)
        self.recurrent = kind(8, 12, num_layers=layers, bidirectional=bidirectional, batch_first=True)
        self.head = nn.Linear(12 * (1 + bidirectional), 4)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(tokens))
        return self.head(states[:, -1])


class _Translator(nn.Module):
    """`nn.Transformer` with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 16)
        self.positions = nn.Parameter(torch.zeros(9, 16))
        self.transformer = nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 23)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        src = self.embedding(source) + self.positions[: source.shape[1]]
        tgt = self.embedding(target) + self.positions[: target.shape[1]]
        return self.head(self.transformer(src, tgt))


class _Encoder(nn.Module):
    """`nn.TransformerEncoder` over a sequence with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 16, padding_idx=0)
        self.cls = nn.Parameter(torch.zeros(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(tokens), -1, -1), self.embedding(tokens)], dim=1)
        return self.head(self.encoder(x)[:, 0])


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(11, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))


def _normalised_cnn() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 6, 3)), nn.ReLU(),
        nn.utils.parametrizations.orthogonal(nn.Conv2d(6, 6, 1)), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 4),
    )  # fmt: skip


def _tokens() -> Batch:
    return (torch.randint(1, 23, (RECORDS, 7)),)


def _pairs() -> Batch:
    return torch.randint(1, 23, (RECORDS, 7)), torch.randint(1, 23, (RECORDS, 6))


def _images() -> Batch:
    return (torch.randn(RECORDS, 1, 10, 10),)


def _rows() -> Batch:
    return (torch.randn(RECORDS, 11),)


def architectures() -> list[Architecture]:
    """Recurrent, attention and convolutional models of plain torch."""

    def same(output: Tensor) -> Tensor:
        return output

    return [
        Architecture("MLP", "torch", _mlp, _rows, same),
        Architecture("CNN with GroupNorm", "torch", _cnn, _images, same),
        Architecture("CNN with parametrizations", "torch", _normalised_cnn, _images, same),
        Architecture("nn.RNN classifier", "torch", lambda: _Recurrent(nn.RNN), _tokens, same),
        Architecture("nn.LSTM classifier", "torch", lambda: _Recurrent(nn.LSTM), _tokens, same),
        Architecture(
            "nn.LSTM, 2 layers, both ways",
            "torch",
            lambda: _Recurrent(nn.LSTM, layers=2, bidirectional=True),
            _tokens,
            same,
        ),
        Architecture("nn.GRU classifier", "torch", lambda: _Recurrent(nn.GRU), _tokens, same),
        Architecture("nn.TransformerEncoder", "torch", _Encoder, _tokens, same),
        Architecture("nn.Transformer", "torch", _Translator, _pairs, same),
    ]
