"""Differentially private training of unmodified PyTorch models."""
