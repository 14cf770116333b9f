"""All architectures, of the libraries that are installed."""

from __future__ import annotations

from architectures import hugging_face, plain, pretrained_image_models, vision
from architectures.architecture import Architecture, declare_torchvision_operators, installed

_SOURCES = {
    "transformers": hugging_face.architectures,
    "timm": pretrained_image_models.architectures,
    "torchvision": vision.architectures,
    "torch": plain.architectures,
}


def all_architectures() -> list[Architecture]:
    """In a fixed order."""
    declare_torchvision_operators()
    return [found for library, listing in _SOURCES.items() if installed(library) for found in listing()]
