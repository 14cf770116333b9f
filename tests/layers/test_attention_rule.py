"""`nn.MultiheadAttention` and the Transformer layers, untouched: every option, against the loop over single records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_case import RECORDS, Case, frozen, randn
from private_step import MODES, step_by_hand, truth
from single_record import Gradients, assert_same_gradients, bound_that_clips_some, expected_gradient
from torch import Tensor, nn

from ghostgrad import GhostgradError

# torch says that it will not take a faster path in eval mode, which nothing here does.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

HEADS = 2


class Attention(nn.Module):
    """One attention between layers of its own, batch first outside whatever it is inside.

    ``seen`` says which inputs come besides the queries: their keys and values, masks, or nothing.
    """

    def __init__(self, call: dict[str, Any] | None = None, width: int = 4, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, **options)
        self.call = {"need_weights": False} if call is None else call
        self.before, self.after = nn.Linear(width, width), nn.Linear(width, 2, bias=False)

    def forward(self, query: Tensor, *others: Tensor, **masks: Any) -> tuple[Tensor, ...]:
        query = self.before(query)
        inputs = (query, *others) if others else (query, query, query)
        if not self.attention.batch_first:
            inputs = tuple(x.transpose(0, 1) for x in inputs)
        out, weights = self.attention(*inputs, **self.call, **masks)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        return (self.after(out.sin()),) if weights is None else (self.after(out.sin()), weights)


def padded(model: nn.Module, x: Tensor, kept: Tensor) -> Any:
    return model(x, key_padding_mask=~kept)


def padded_by_floats(model: nn.Module, x: Tensor, mask: Tensor) -> Any:
    return model(x, key_padding_mask=mask)


def masked(model: nn.Module, x: Tensor, mask: Tensor) -> Any:
    return model(x, attn_mask=mask.flatten(0, 1))  # [n, heads, t, s] to [n * heads, t, s]


def both_masks(model: nn.Module, x: Tensor, mask: Tensor, kept: Tensor) -> Any:
    return model(x, attn_mask=mask.flatten(0, 1), key_padding_mask=~kept)


def with_mask(mask: Tensor, **options: Any) -> Any:
    return lambda model, *inputs: model(*inputs, attn_mask=mask, **options)


def lengths() -> Tensor:
    """Which of three positions are there, at least one of them: [RECORDS, 3]."""
    return torch.arange(3) <= torch.arange(RECORDS).unsqueeze(1) % 3


def with_lengths() -> tuple[Tensor, ...]:
    return (*randn(3, 4)(), lengths())


def per_head(kind: torch.dtype) -> Any:
    def inputs() -> tuple[Tensor, ...]:
        mask = torch.randn(RECORDS, HEADS, 3, 3, dtype=torch.float64)
        if kind == torch.bool:
            mask = (mask > 0.3) & ~torch.eye(3, dtype=torch.bool)
        return (*randn(3, 4)(), mask)

    return inputs


def cross(keys: int, values: int, sources: int = 5) -> Any:
    return lambda: tuple(part for shape in ((3, 4), (sources, keys), (sources, values)) for part in randn(*shape)())


CAUSAL = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
SLOPES = torch.arange(9, dtype=torch.float64).view(3, 3).cos()
WEIGHTS: dict[str, Any] = {"need_weights": True}
HEAD_WEIGHTS: dict[str, Any] = {"need_weights": True, "average_attn_weights": False}
FIRST: dict[str, Any] = {"batch_first": True}


class OnlyAttention(nn.MultiheadAttention):
    """A subclass that adds nothing keeps the rule."""


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = OnlyAttention(4, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, key=x, value=x, need_weights=False)[0]


class Windows(SelfAttention):
    """Windows of a record as rows of the attention's own batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, (len(x), -1))


class OnlyWeights(nn.Module):
    """Uses the attention weights and not what was attended."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[1]


class Twice(nn.Module):
    """One attention called twice, over itself and over its result."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x)[0]
        return self.attention(x, y, y.sin())[0]


ATTENTION = [
    Case("self", lambda: Attention(**FIRST), randn(3, 4)),
    Case("self-many-positions", lambda: Attention(**FIRST), randn(9, 4)),
    Case("self-as-many-positions-as-records", lambda: Attention(), randn(RECORDS, 4)),
    Case("self-time-first", lambda: Attention(), randn(3, 4)),
    Case("self-by-keyword-in-subclass", SelfAttention, randn(3, 4)),
    Case("self-no-bias", lambda: Attention(bias=False), randn(3, 4)),
    Case("self-twice", Twice, randn(3, 4)),
    Case("self-averaged-weights", lambda: Attention(WEIGHTS, **FIRST), randn(3, 4)),
    Case("self-averaged-weights-time-first", lambda: Attention(WEIGHTS), randn(3, 4)),
    Case("self-weights-of-each-head", lambda: Attention(HEAD_WEIGHTS), randn(3, 4)),
    Case("self-only-weights-used", OnlyWeights, randn(3, 4)),
    Case("cross", lambda: Attention(**FIRST), cross(4, 4)),
    Case("cross-time-first-weights", lambda: Attention(WEIGHTS), cross(4, 4)),
    Case("cross-fewer-keys-than-queries", lambda: Attention(**FIRST), cross(4, 4, sources=2)),
    Case("cross-separate-projections", lambda: Attention(kdim=3, vdim=2, **FIRST), cross(3, 2)),
    Case("cross-separate-projections-no-bias", lambda: Attention(WEIGHTS, kdim=3, vdim=2, bias=False), cross(3, 2)),
    Case("bias-kv", lambda: Attention(add_bias_kv=True, **FIRST), randn(3, 4)),
    Case("bias-kv-zero-attention-weights", lambda: Attention(WEIGHTS, add_bias_kv=True, add_zero_attn=True), randn(3, 4)),
    Case("zero-attention", lambda: Attention(add_zero_attn=True, **FIRST), randn(3, 4)),
    Case("bias-kv-separate-projections", lambda: Attention(add_bias_kv=True, kdim=3, vdim=2), cross(3, 2)),
    Case("padding", lambda: Attention(**FIRST), with_lengths, run=padded),
    Case("padding-bias-kv-time-first", lambda: Attention(WEIGHTS, add_bias_kv=True), with_lengths, run=padded),
    Case("padding-by-floats", lambda: Attention(**FIRST), lambda: (*randn(3, 4)(), *randn(3)()), run=padded_by_floats),
    Case("mask", lambda: Attention(**FIRST), randn(3, 4), run=with_mask(CAUSAL < 0)),
    Case("mask-by-floats-weights", lambda: Attention(WEIGHTS), randn(3, 4), run=with_mask(SLOPES)),
    Case("mask-causal", lambda: Attention(**FIRST), randn(3, 4), run=with_mask(CAUSAL, is_causal=True)),
    Case("mask-causal-weights", lambda: Attention(WEIGHTS), randn(3, 4), run=with_mask(CAUSAL, is_causal=True)),
    Case("mask-causal-bias-kv", lambda: Attention(add_bias_kv=True), randn(3, 4), run=with_mask(CAUSAL, is_causal=True)),
    Case("mask-of-each-head", lambda: Attention(**FIRST), per_head(torch.bool), run=masked),
    Case("mask-of-each-head-by-floats", lambda: Attention(WEIGHTS), per_head(torch.float64), run=masked),
    Case("mask-of-each-head-by-floats-bias-kv", lambda: Attention(WEIGHTS, add_bias_kv=True, add_zero_attn=True),
         per_head(torch.float64), run=masked),
    Case("mask-of-each-head-and-padding", lambda: Attention(add_zero_attn=True),
         lambda: (*per_head(torch.bool)(), lengths()), run=both_masks),
    Case("in-projection-frozen", frozen(lambda: Attention(**FIRST), "in_proj_weight", "in_proj_bias"), randn(3, 4)),
    Case("biases-frozen", frozen(lambda: Attention(add_bias_kv=True, **FIRST), "in_proj_bias", "bias_k", "bias"), randn(3, 4)),
    Case("key-projection-frozen", frozen(lambda: Attention(kdim=3, vdim=2, **FIRST), "k_proj_weight"), cross(3, 2)),
    Case("only-bias-v-trains", frozen(lambda: Attention(add_bias_kv=True, **FIRST), "weight", "bias", "in_proj_weight",
                                      "in_proj_bias", "bias_k"), randn(3, 4)),
    Case("folded-windows", Windows, randn(2, 3, 4)),
]  # fmt: skip


def encoder_layer(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"dim_feedforward": 5, "dropout": 0.0, "batch_first": True, **options}
    return nn.TransformerEncoderLayer(4, HEADS, **settings)


def decoder_layer(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"dim_feedforward": 5, "dropout": 0.0, "batch_first": True, **options}
    return nn.TransformerDecoderLayer(4, HEADS, **settings)


def transformer(**options: Any) -> nn.Module:
    return nn.Transformer(
        4, HEADS, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=5, dropout=0.0, **{**FIRST, **options}
    )


class TimeFirst(nn.Module):
    """Turns the batch inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        return self.inner(*(x.transpose(0, 1) for x in inputs), **options).transpose(0, 1)


def encode(model: nn.Module, x: Tensor, kept: Tensor) -> Any:
    return model(x, mask=CAUSAL < 0, src_key_padding_mask=~kept)


def decode(model: nn.Module, x: Tensor, memory: Tensor) -> Any:
    return model(x, memory, tgt_mask=CAUSAL.to(x.dtype), tgt_is_causal=True)


def translate(model: nn.Module, source: Tensor, target: Tensor) -> Any:
    return model(source, target, tgt_mask=CAUSAL.to(target.dtype))


def two() -> tuple[Tensor, ...]:
    return (*randn(5, 4)(), *randn(3, 4)())


TRANSFORMERS = [
    Case("encoder-layer", encoder_layer, randn(3, 4)),
    Case("encoder-layer-norm-first", lambda: encoder_layer(norm_first=True, activation="gelu"), randn(3, 4)),
    Case("encoder-layer-no-bias", lambda: encoder_layer(bias=False), randn(3, 4)),
    Case("encoder-layer-time-first", lambda: TimeFirst(encoder_layer(batch_first=False)), randn(3, 4)),
    Case("encoder-masks", lambda: nn.TransformerEncoder(encoder_layer(), 2, nn.LayerNorm(4)), with_lengths, run=encode),
    Case("decoder-layer", decoder_layer, lambda: two()[::-1], run=decode),
    Case("decoder-layer-norm-first", lambda: decoder_layer(norm_first=True), lambda: two()[::-1], run=decode),
    Case("decoder", lambda: nn.TransformerDecoder(decoder_layer(), 2), lambda: two()[::-1], run=decode),
    Case("transformer", transformer, two, run=translate),
    Case("transformer-norm-first-time-first", lambda: TimeFirst(transformer(norm_first=True, batch_first=False)), two,
         run=translate),
    Case("transformer-root-time-first", lambda: transformer(batch_first=False),
         lambda: tuple(x.transpose(0, 1) for x in two()), run=translate, dims=(1, 1), out_dim=1, batch_first=False),
]  # fmt: skip

ALL = [*ATTENTION, *TRANSFORMERS]
EVERY = [
    *((case, mode) for case in ALL for mode in MODES if mode != "functorch"),
    *((case, "functorch") for case in ALL[::4]),  # the generic rule, as a second opinion
]


@pytest.mark.parametrize(("case", "mode"), EVERY, ids=str)
def test_attention_is_clipped_as_in_the_single_record_loop(case: Case, mode: str) -> None:
    each, bound = truth(case)
    found = step_by_hand(case, mode, max_grad_norm=bound)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


def seeded(model: nn.Module, *inputs: Tensor) -> Any:
    torch.manual_seed(5)
    return model(*inputs)


def seeded_causal(model: nn.Module, *inputs: Tensor) -> Any:
    torch.manual_seed(5)
    return model(*inputs, attn_mask=CAUSAL.to(inputs[0].dtype), is_causal=True)


RANDOM = [
    Case("dropout", lambda: Attention(dropout=0.4, **FIRST), randn(3, 4), run=seeded),
    Case("dropout-weights", lambda: Attention(WEIGHTS, dropout=0.4), randn(3, 4), run=seeded),
    Case("dropout-causal-bias-kv", lambda: Attention(dropout=0.4, add_bias_kv=True), randn(3, 4), run=seeded_causal),
    Case("dropout-everywhere", lambda: encoder_layer(dropout=0.3), randn(3, 4), run=seeded),
    Case("dropout-in-a-transformer", lambda: nn.TransformerEncoder(encoder_layer(dropout=0.2, norm_first=True), 2), randn(3, 4),
         run=seeded),
]  # fmt: skip


def gradients_in_one_batch(case: Case) -> list[Gradients]:
    """Each record's gradient with the numbers that the batch drew: records do not meet, so its own loss is enough."""
    model = case.model()
    parameters = dict(model.named_parameters())
    losses = case.losses(model, *case.batch())
    found = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    return [dict(zip(parameters, grads, strict=True)) for grads in found]


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_dropout_in_the_attention_is_replayed(case: Case, mode: str) -> None:
    each = gradients_in_one_batch(case)
    bound = bound_that_clips_some(each)
    found = step_by_hand(case, mode, max_grad_norm=bound)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


def test_dropout_of_an_attention_in_eval_mode_is_off() -> None:
    def build() -> nn.Module:
        model = Attention(dropout=0.4, **FIRST)
        model.attention.eval()
        return model

    case = Case("dropout-eval", build, randn(3, 4))
    each = gradients_in_one_batch(case)
    bound = bound_that_clips_some(each)
    found = step_by_hand(case, "bk", max_grad_norm=bound)
    assert_same_gradients(found, expected_gradient(each, bound, expected_batch_size=RECORDS), relative=1e-9)


class WrongLayout(nn.Module):
    """``batch_first`` forgotten: positions are taken for records."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("mode", ["hooks", "ghost", "bk"])
@pytest.mark.parametrize("shape", [(5, 4), (RECORDS, 4), (1, 4), (4,)], ids=str)
def test_a_batch_taken_for_a_sequence_is_refused(shape: tuple[int, ...], mode: str) -> None:
    with pytest.raises(GhostgradError, match="record"):
        step_by_hand(Case("wrong-layout", WrongLayout, randn(*shape)), mode, max_grad_norm=1.0)
