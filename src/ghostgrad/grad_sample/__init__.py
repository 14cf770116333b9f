"""Layer rules under the package that Opacus keeps them in; they live in `ghostgrad.layers`."""

from ghostgrad.layers import Rule, add_rule, find_rule, register_grad_sampler, unregister_rule

__all__ = ["Rule", "add_rule", "find_rule", "register_grad_sampler", "unregister_rule"]
