"""Modules that stand where users of Opacus look for them."""
