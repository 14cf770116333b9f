"""What is added to a sum of given sensitivity."""

from ghostgrad.noise.gaussian import KeyedGaussian
from ghostgrad.noise.generator import GeneratorGaussian
from ghostgrad.noise.mechanism import NoiseMechanism

__all__ = ["GeneratorGaussian", "KeyedGaussian", "NoiseMechanism"]
