"""RNN, LSTM and GRU as they are: unrolled once more, so that every step's matrix products are seen.

Letters: r rows (n * fold), t steps, a gates * hidden units, h hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ghostgrad.errors import UnsupportedModuleError
from ghostgrad.gradients import Explicit, Matmul, Use, wide
from ghostgrad.layers.call import Call
from ghostgrad.layers.recompute import check_same, positions, recomputing, rows_first, working_dtype
from ghostgrad.layers.registry import Rule, add_rule

_MOST_LAYERS = 128
"""A deeper stack goes to the generic rule."""

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

State = tuple[Tensor, ...]
"""The hidden state [r, h], and for an LSTM the cell state [r, hidden units]."""


@dataclass
class _Scan:
    """One layer run in one direction; time runs as that direction sees it.

    Attributes:
        suffix: of its parameters' names, such as ``_l0_reverse``.
        x: what ``weight_ih`` multiplied, [t, r, i].
        active: where a row's sequence is under way, [t, r, 1]; None where it always is.
        at_input: zeros added to what came out, so that its gradient is seen, [t, r, a].
        at_state: the same for ``weight_hh``; the same tensor where the two are only ever added up.
        at_projection: the same for ``weight_hr``, [t, r, h]; None without it.
        states, cells: what ``weight_hh`` and ``weight_hr`` multiplied, one [r, ...] for each step.
    """

    suffix: str
    x: Tensor
    active: Tensor | None
    at_input: Tensor
    at_state: Tensor
    at_projection: Tensor | None
    states: list[Tensor] = field(default_factory=list)
    cells: list[Tensor] = field(default_factory=list)

    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are wanted, each once."""
        leaves = [self.at_input] if self.at_state is self.at_input else [self.at_input, self.at_state]
        return leaves if self.at_projection is None else [*leaves, self.at_projection]


def recurrent(call: Call) -> dict[str, Use]:
    """``h_t = f(W_ih x_t + b_ih, W_hh h_(t-1) + b_hh)``; LSTM: Hochreiter and Schmidhuber 1997; GRU: Cho et al. 2014.

    A weight's gradient is a sum over steps of (gradient of its product) x (what it multiplied). The gradients come from
    autograd over the whole batch: rows do not meet there.
    """
    x, active = _input(call)
    with recomputing(call):
        scans, outputs = _unroll(call, x, active)
    if call.outputs is not None:
        check_same(
            call, [out.detach() for out in outputs], [_by_time(call, i, out) for i, out in enumerate(call.outputs)]
        )
    grads = {i: _by_time(call, i, grad).to(x.dtype) for i, grad in enumerate(call.grad_outputs) if grad is not None}
    leaves = [leaf for scan in scans for leaf in scan.leaves()]
    found = torch.autograd.grad(
        [outputs[i] for i in grads], leaves, list(grads.values()), allow_unused=True, materialize_grads=True
    )
    seen = dict(zip(leaves, found, strict=True))
    return {name: use for scan in scans for name, use in _uses(call, scan, seen)}


def _input(call: Call) -> tuple[Tensor, Tensor | None]:
    """The input by time, [t, r, i], and where it is part of a sequence, [t, r, 1] (None: everywhere)."""
    x, dtype = call.argument(0, "input"), working_dtype(call)
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x)
        rows_first(call, padded, 1)
        steps = torch.arange(len(padded), device=padded.device).unsqueeze(1)
        return padded.to(dtype), (steps < lengths.to(padded.device)).unsqueeze(2)
    if not isinstance(x, Tensor) or x.dim() != 3:
        found = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UnsupportedModuleError(
            f"{call.path}: the input has {found}; a sequence without a batch dimension cannot be attributed to records. Give "
            f"the layer three dimensions, the batch among them, or a PackedSequence."
        )
    return rows_first(call, x, _batch_dim(call.module)).transpose(0, 1).to(dtype), None


def _batch_dim(module: nn.Module) -> int:
    return 0 if module.batch_first else 1


def _initial(call: Call, x: Tensor) -> list[Tensor]:
    """Initial states [layers * directions, r, ...]: given, or zeros."""
    module: Any = call.module
    given = call.argument(1, "hx")
    if given is not None:
        given = [given] if isinstance(given, Tensor) else given
        return [rows_first(call, state, 1).transpose(0, 1).to(x.dtype) for state in given]
    count = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or module.hidden_size, *([module.hidden_size] if module.mode == "LSTM" else [])]
    return [x.new_zeros(count, x.shape[1], width) for width in widths]


def _by_time(call: Call, index: int, output: Tensor) -> Tensor:
    """An output or its gradient as the recomputation has it: [t, r, ...] the first, [layers * directions, r, ...] the others."""
    x = call.argument(0, "input")
    if index == 0 and isinstance(x, PackedSequence):
        return pad_packed_sequence(PackedSequence(output, *x[1:]))[0]
    return output.transpose(0, 1) if index == 0 and call.module.batch_first else output


def _unroll(call: Call, x: Tensor, active: Tensor | None) -> tuple[list[_Scan], list[Tensor]]:
    """All layers and directions: their scans, and the outputs by time."""
    module: Any = call.module
    initial = _initial(call, x)
    scans: list[_Scan] = []
    finals: list[State] = []
    for layer in range(module.num_layers):
        outs = []
        for reverse in (False, True) if module.bidirectional else (False,):
            scan = _scan(module, f"_l{layer}{'_reverse' if reverse else ''}", *_turned(reverse, x, active))
            out, final = _run(module, scan, tuple(state[len(scans)] for state in initial))
            scans.append(scan)
            finals.append(final)
            outs.append(out.flip(0) if reverse else out)
        x = torch.cat(outs, 2)
        if call.randomness is not None and layer < module.num_layers - 1:
            x = x * _dropped(call, x)
    return scans, [x, *(torch.stack(column) for column in zip(*finals, strict=True))]


def _dropped(call: Call, x: Tensor) -> Tensor:
    """The factors of the dropout between layers, in the shape of ``x`` [t, r, h]; drawn in the order that the call drew them."""
    packed, module = call.argument(0, "input"), cast(nn.RNNBase, call.module)
    if not isinstance(packed, PackedSequence):
        return F.dropout(torch.ones_like(x), module.dropout)
    factors = F.dropout(x.new_ones(len(packed.data), x.shape[2]), module.dropout)
    return pad_packed_sequence(PackedSequence(factors, *packed[1:]))[0]


def _turned(reverse: bool, x: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (x.flip(0), None if active is None else active.flip(0)) if reverse else (x, active)


def _scan(module: Any, suffix: str, x: Tensor, active: Tensor | None) -> _Scan:
    def zeros(width: int) -> Tensor:
        return x.new_zeros(*x.shape[:2], width, requires_grad=True)

    width = _GATES[module.mode] * module.hidden_size
    at_input = zeros(width)
    # The reset gate of a GRU multiplies what the state gives, not what the input gives: two gradients.
    at_state = zeros(width) if module.mode == "GRU" else at_input
    return _Scan(suffix, x, active, at_input, at_state, zeros(module.proj_size) if module.proj_size else None)


def _run(module: Any, scan: _Scan, state: State) -> tuple[Tensor, State]:
    """The hidden states [t, r, h], zero where a sequence has ended, and the last state of every row."""
    w_ih, w_hh, w_hr, b_ih, b_hh = (
        _weight(module, kind + scan.suffix, scan.x.dtype)
        for kind in ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")
    )
    assert w_hh is not None
    from_input = (F.linear(scan.x, w_ih, b_ih) + scan.at_input).unbind(0)  # type: ignore[arg-type]
    at_state = None if scan.at_state is scan.at_input else scan.at_state.unbind(0)
    outs = []
    for step, gates in enumerate(from_input):
        scan.states.append(state[0].detach())
        from_state = F.linear(state[0], w_hh, b_hh)
        new = _cell(module.mode, gates, from_state if at_state is None else from_state + at_state[step], state)
        if scan.at_projection is not None:
            assert w_hr is not None
            scan.cells.append(new[0].detach())
            new = (F.linear(new[0], w_hr) + scan.at_projection[step], *new[1:])
        if scan.active is not None:
            new = tuple(torch.where(scan.active[step], a, b) for a, b in zip(new, state, strict=True))
        outs.append(new[0] if scan.active is None else torch.where(scan.active[step], new[0], 0))
        state = new
    return torch.stack(outs), state


def _weight(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor | None:
    weight = getattr(module, name, None)
    return None if weight is None else weight.detach().to(dtype)


def _cell(mode: str, from_input: Tensor, from_state: Tensor, state: State) -> State:
    """One step, before any projection."""
    if mode == "GRU":
        (r, z, n), (r_h, z_h, n_h) = from_input.chunk(3, 1), from_state.chunk(3, 1)
        update = torch.sigmoid(z + z_h)
        return ((1 - update) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + update * state[0],)
    gates = from_input + from_state
    if mode == "LSTM":
        i, f, g, o = gates.chunk(4, 1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell
    return (torch.tanh(gates) if mode == "RNN_TANH" else torch.relu(gates),)


def _uses(call: Call, scan: _Scan, grads: Mapping[Tensor, Tensor]) -> Iterator[tuple[str, Use]]:
    """What one scan made of its trainable parameters."""

    def by_row(steps: Tensor) -> Tensor:
        return positions(call, steps.transpose(0, 1))

    sides = [
        ("ih", scan.at_input, [scan.x.detach()]),
        ("hh", scan.at_state, scan.states),
        ("hr", scan.at_projection, scan.cells),
    ]
    for kind, leaf, factors in sides:
        if leaf is None:
            continue
        dy = by_row(grads[leaf])
        weight, bias = f"weight_{kind}{scan.suffix}", f"bias_{kind}{scan.suffix}"
        if weight in call.parameters:
            x = by_row(factors[0] if kind == "ih" else torch.stack(factors))
            yield weight, Matmul(x, dy, call.parameters[weight].shape)
        if bias in call.parameters:
            yield bias, Explicit(wide(dy).sum((1, 2)))


def _names() -> Iterator[str]:
    for layer in range(_MOST_LAYERS):
        for kind in ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh"):
            yield from (f"{kind}_l{layer}", f"{kind}_l{layer}_reverse")


def _draws(module: nn.Module) -> bool:
    layers: Any = module.num_layers
    return module.training and bool(module.dropout) and layers > 1


def _refuses(module: nn.Module) -> str | None:
    if _draws(module) and next(module.parameters()).is_cuda:
        return (
            f"dropout={module.dropout} between its layers is drawn by cuDNN, which does not draw it again; set its .dropout to "
            f"0.0, or stack layers of num_layers=1 with nn.Dropout between them"
        )
    return None


def _shuffled(arguments: Any) -> bool:
    """Packed without sorting: the caller may have sorted the records by length, another way in every batch."""
    args, kwargs = arguments
    x = args[0] if args else kwargs.get("input")
    return isinstance(x, PackedSequence) and x.sorted_indices is None


def _led(call: Call, grad: Tensor, index: int) -> Tensor:
    return rows_first(call, _by_time(call, index, grad), 1)


add_rule(
    nn.RNN, nn.LSTM, nn.GRU,
    rule=Rule(
        "recurrent", recurrent, frozenset(_names()), refuses=_refuses, led=_led, compares=True, draws=_draws, shuffled=_shuffled
    ),
)  # fmt: skip
