"""Layer rules under the package that Opacus keeps them in; they live in `ghostgrad.layers`."""

from ghostgrad.layers import Rule, add_rule, find_rule

__all__ = ["Rule", "add_rule", "find_rule"]
