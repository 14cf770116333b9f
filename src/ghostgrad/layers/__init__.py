"""From a module's call to the uses it made of its parameters: one family a file, a registry, and the generic rule."""

from ghostgrad.layers import convolution, embedding, linear, normalisation  # noqa: F401 (they register themselves)
from ghostgrad.layers.call import Call, Rows
from ghostgrad.layers.generic import generic
from ghostgrad.layers.registry import Rule, RuleFunction, add_rule, find_rule

__all__ = ["Call", "Rows", "Rule", "RuleFunction", "add_rule", "find_rule", "generic"]
