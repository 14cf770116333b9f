"""Embedding tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.gradients import Lookup, Use, wide
from ghostgrad.gradients.use import rows_where
from ghostgrad.layers.call import Call
from ghostgrad.layers.registry import Rule, add_rule


def embedding(call: Call) -> dict[str, Use]:
    """``y[n, t] = W[ids[n, t]]``.

    ``padding_idx`` learns nothing. ``scale_grad_by_freq`` divides by how often the id occurs *in the record*: what the
    single-record loop does; over the batch, one record would rescale the others.
    """
    table: Any = call.module
    n = call.rows.n
    ids = call.rows.split(call.input, least=1).reshape(n, -1)
    dy = call.rows.split(call.grad_output).reshape(n, ids.shape[1], -1)
    if table.padding_idx is not None:
        dy = rows_where((ids != table.padding_idx).flatten(), dy.flatten(0, 1)).view_as(dy)
    if table.scale_grad_by_freq:
        records = torch.arange(n, device=ids.device).unsqueeze(1)
        dy = wide(dy) / _occurrences(ids, records, table.num_embeddings).unsqueeze(-1)
    return {"weight": Lookup(ids, dy, call.parameters["weight"].shape)}


def embedding_bag(call: Call) -> dict[str, Use]:
    """``y[n] = sum, mean or max over the bag of W[ids]``, one bag of equal length for each row of a 2-d input."""
    bag: Any = call.module
    ids, offsets = call.input, call.argument(1, "offsets")
    weights = call.argument(2, "per_sample_weights")
    lengths, owner = _bags(call, ids, offsets)
    flat = ids.flatten()
    dy = call.grad_output[owner]  # each id's share of its bag's gradient, [entries, o]
    counted = torch.ones_like(flat, dtype=torch.bool) if bag.padding_idx is None else flat != bag.padding_idx
    if bag.mode == "mean":
        sizes = torch.zeros_like(lengths).index_add_(0, owner, counted.long()).clamp(min=1)
        dy = dy / sizes[owner].unsqueeze(1)
    elif bag.mode == "max":
        dy = dy * _winners(bag, flat, owner, counted, len(lengths))
    if weights is not None:
        dy = dy * weights.flatten().unsqueeze(1)
    dy = rows_where(counted, dy)
    records = owner * call.rows.n // len(lengths)  # several bags in a row may belong to one record
    if bag.scale_grad_by_freq:
        dy = wide(dy) / _occurrences(flat, records, bag.num_embeddings).unsqueeze(-1)
    ids, dy = _by_record(flat, dy, records, call.rows.n)
    return {"weight": Lookup(ids, dy, call.parameters["weight"].shape)}


def _bags(call: Call, ids: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """How long each bag is, and which bag each id is in."""
    bag: Any = call.module
    if ids.dim() == 2:
        lengths = torch.full((ids.shape[0],), ids.shape[1], device=ids.device)
    else:
        ends = offsets[1:] if offsets is not None else ids.new_zeros(0)
        if offsets is None:
            raise UnsupportedModuleError(f"{call.path}: a 1-d input needs offsets.")
        if not bag.include_last_offset:
            ends = torch.cat([ends, ends.new_tensor([len(ids)])])
        starts = offsets[:-1] if bag.include_last_offset else offsets
        lengths = ends - starts
    if len(lengths) % call.rows.n:
        raise UnsupportedModuleError(
            f"{call.path}: {len(lengths)} bags in a batch of {call.rows.n} records; each record needs the same number."
        )
    return lengths, torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)


def _winners(bag: Any, ids: Tensor, owner: Tensor, counted: Tensor, bags: int) -> Tensor:
    """1 for the first entry of each bag that reaches the bag's maximum in a feature, else 0: [entries, o]."""
    rows = bag.weight.detach()[ids]
    rows = torch.where(counted.unsqueeze(1), rows, -torch.inf)
    index = owner.unsqueeze(1).expand_as(rows)
    best = rows.new_full((bags, rows.shape[1]), -torch.inf).scatter_reduce(0, index, rows, "amax")
    place = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(rows)
    place = torch.where(rows == best[owner], place, len(ids))
    first = place.new_full((bags, rows.shape[1]), len(ids)).scatter_reduce(0, index, place, "amin")
    return (place == first[owner]) & (place < len(ids))


def _by_record(ids: Tensor, dy: Tensor, records: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Ragged entries as [n, t] and [n, t, o], filled up with id 0 and gradient 0."""
    counts = torch.bincount(records, minlength=n)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(ids), device=ids.device) - starts[records]
    longest = int(counts.max()) if len(ids) else 1
    out_ids = ids.new_zeros(n, longest)
    out_dy = dy.new_zeros(n, longest, dy.shape[-1])
    out_ids[records, place] = ids
    out_dy[records, place] = dy
    return out_ids, out_dy


def _occurrences(ids: Tensor, records: Tensor, rows: int) -> Tensor:
    """How often each id occurs in its record, in the shape of ``ids``."""
    keys = ids.long() + records * rows
    _, place, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    occurrences: Tensor = counts[place]
    return occurrences


def _refuses(module: nn.Module) -> str | None:
    if module.max_norm is not None:
        return "max_norm rescales rows of the table in the forward pass, unclipped and without noise; set max_norm=None"
    return None


add_rule(nn.Embedding, rule=Rule("embedding", embedding, refuses=_refuses, least=lambda table: 2))
add_rule(nn.EmbeddingBag, rule=Rule("embedding bag", embedding_bag, refuses=_refuses, least=lambda bag: None))
