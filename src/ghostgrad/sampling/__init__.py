"""Which records make up a logical batch, and how the batches reach the training loop."""

from ghostgrad.sampling.feed import Feed
from ghostgrad.sampling.loader import DPDataLoader
from ghostgrad.sampling.padding import Padding, cut_to
from ghostgrad.sampling.poisson import PoissonBatchSampler

__all__ = ["DPDataLoader", "Feed", "Padding", "PoissonBatchSampler", "cut_to"]
