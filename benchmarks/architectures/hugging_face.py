"""Models of transformers: language, images, speech, and both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from architectures.architecture import RECORDS, Architecture, Batch
from architectures.hugging_face_configs import IMAGE_MODELS, SPEECH_MODELS, TEXT_MODELS, Entry

_VOCABULARY = 53
_TOKENS = 7


def _build(config_class: str, auto_class: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    config = getattr(transformers, config_class)(**options)
    _switch_off_randomness(config)
    kind = getattr(transformers, auto_class)
    return kind.from_config(config) if auto_class.startswith("Auto") else kind(config)


def _switch_off_randomness(config: Any) -> None:
    """Dropout in all its names, and the masking of speech."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _switch_off_randomness(value)
        if ("drop" in name or name.startswith("mask_time_prob") or name == "router_jitter_noise") and isinstance(
            value, float
        ):
            setattr(config, name, 0.0)
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False


def _text() -> Batch:
    """Token ids with padding at the end of some records."""
    mask = torch.ones(RECORDS, _TOKENS, dtype=torch.long)
    mask[1, -2:] = 0
    mask[3, -1:] = 0
    return {"input_ids": torch.randint(5, _VOCABULARY, (RECORDS, _TOKENS)), "attention_mask": mask}


def _unpadded_text() -> Batch:
    return {"input_ids": torch.randint(5, _VOCABULARY, (RECORDS, _TOKENS))}


def _text_to_text() -> Batch:
    source = _text()
    assert isinstance(source, dict)
    return {**source, "decoder_input_ids": torch.randint(5, _VOCABULARY, (RECORDS, 4))}


def _images() -> Batch:
    return {"pixel_values": torch.randn(RECORDS, 3, 32, 32)}


def _image_and_text() -> Batch:
    return {**_text(), "pixel_values": torch.randn(RECORDS, 3, 32, 32)}  # type: ignore[dict-item]


def _waves() -> Batch:
    return {"input_values": torch.randn(RECORDS, 640)}


def _spectrograms() -> Batch:
    return {
        "input_features": torch.randn(RECORDS, 8, 24),
        "decoder_input_ids": torch.randint(5, _VOCABULARY, (RECORDS, 4)),
    }


def _spectrogram_frames() -> Batch:
    return {"input_values": torch.randn(RECORDS, 32, 16)}


_BATCHES: dict[str, Callable[[], Batch]] = {
    "text": _text,
    "text without mask": _unpadded_text,
    "text to text": _text_to_text,
    "images": _images,
    "image and text": _image_and_text,
    "waves": _waves,
    "spectrograms": _spectrograms,
    "spectrogram frames": _spectrogram_frames,
}


def _scores(output: Any) -> Tensor:
    for name in ("logits", "pooler_output", "last_hidden_state"):
        found = getattr(output, name, None)
        if found is not None:
            return found
    return output[0]


def _architecture(entry: Entry) -> Architecture:
    def build() -> nn.Module:
        return _build(entry.config, entry.auto, entry.options)

    return Architecture(
        entry.name, "transformers", build, _BATCHES[entry.batch], _scores, "replaced" if entry.fix else "none"
    )


def architectures() -> list[Architecture]:
    """Of the installed version of transformers; families that it does not know are left out."""
    import transformers

    entries = [*TEXT_MODELS, *IMAGE_MODELS, *SPEECH_MODELS]
    return [_architecture(entry) for entry in entries if hasattr(transformers, entry.config)]
