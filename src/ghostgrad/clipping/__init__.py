"""Clip functions (norms to factors) and the clipper (when what is computed, and what is kept)."""

from ghostgrad.clipping.accumulator import ClippedSum, trainable
from ghostgrad.clipping.adaptive import AdaptiveClipping
from ghostgrad.clipping.clipper import Clipper, Mode
from ghostgrad.clipping.functions import AutomaticClipping, ClipFunction, FlatClipping, PerLayerClipping
from ghostgrad.clipping.measurement import Measurement, Seen

__all__ = [
    "AdaptiveClipping",
    "AutomaticClipping",
    "ClipFunction",
    "ClippedSum",
    "Clipper",
    "FlatClipping",
    "Measurement",
    "Mode",
    "PerLayerClipping",
    "Seen",
    "trainable",
]
