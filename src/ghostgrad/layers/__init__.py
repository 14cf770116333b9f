"""From a module's call to the uses it made of its parameters: one family a file, a registry, and the generic rule."""

# Opacus has layers of its own in the place of these; here torch's have rules, under both names.
from torch.nn import GRU as DPGRU
from torch.nn import LSTM as DPLSTM
from torch.nn import RNN as DPRNN
from torch.nn import MultiheadAttention as DPMultiheadAttention

from ghostgrad.layers import (  # noqa: F401 (they register themselves)
    attention,
    convolution,
    embedding,
    linear,
    normalisation,
    recurrent,
    small,
)
from ghostgrad.layers.buffers import Buffers
from ghostgrad.layers.call import Call, Places, Rows
from ghostgrad.layers.custom import register_grad_sampler, register_rule, registered_rule, unregister_rule
from ghostgrad.layers.generic import generic
from ghostgrad.layers.randomness import Randomness
from ghostgrad.layers.registry import Rule, RuleFunction, add_rule, find_rule

__all__ = [
    "DPGRU", "DPLSTM", "DPRNN", "Buffers", "Call", "DPMultiheadAttention", "Places", "Randomness", "Rows", "Rule", "RuleFunction",
    "add_rule", "find_rule", "generic", "register_grad_sampler", "register_rule", "registered_rule", "unregister_rule",
]  # fmt: skip
