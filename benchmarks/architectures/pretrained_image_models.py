"""Image classifiers of timm."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from architectures.architecture import RECORDS, Architecture, Batch

_TRANSFORMER = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
_SMALL_STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}
_WINDOWS = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 1),
    "num_heads": (3, 6),
    "drop_path_rate": 0.0,
}

_MODELS: tuple[tuple[str, str, dict[str, object], Literal["none", "replaced", "frozen"]], ...] = (
    ("ResNet with GroupNorm (timm)", "resnet50_gn", {"layers": (1, 1, 1, 1), "channels": (32, 32, 32, 32)}, "none"),
    ("ResNet (timm)", "resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, "replaced"),
    ("ResNetV2, weight-standardised (timm)", "resnetv2.ResNetV2", {"layers": (1, 1), "channels": (128, 128),
        "stem_chs": 32}, "none"),
    ("NFNet (timm)", "nf_resnet26", {"depths": (1, 1), "channels": (32, 64)}, "none"),
    ("ViT (timm)", "vit_tiny_patch16_224", _TRANSFORMER, "none"),
    ("ViT with LayerScale (timm)", "vit_tiny_patch16_224", {**_TRANSFORMER, "init_values": 1e-5, "qk_norm": True},
        "none"),
    ("ViT with registers, attention pooling (timm)", "vit_tiny_patch16_224", {**_TRANSFORMER, "reg_tokens": 2,
        "global_pool": "map", "class_token": False}, "none"),
    ("ViT with relative positions (timm)", "vit_relpos_small_patch16_224", _TRANSFORMER, "none"),
    ("DeiT, distilled (timm)", "deit_tiny_distilled_patch16_224", _TRANSFORMER, "none"),
    ("CaiT (timm)", "cait_xxs24_224", _TRANSFORMER, "none"),
    ("BEiT (timm)", "beit_base_patch16_224", _TRANSFORMER, "none"),
    ("EVA-02 (timm)", "eva02_tiny_patch14_224", {**_TRANSFORMER, "num_heads": 2}, "none"),
    ("Swin (timm)", "swin_tiny_patch4_window7_224", _WINDOWS, "none"),
    ("Swin V2 (timm)", "swinv2_tiny_window8_256", _WINDOWS, "none"),
    ("ConvNeXt (timm)", "convnext_atto", _SMALL_STAGES, "none"),
    ("ConvNeXt V2 (timm)", "convnextv2_atto", _SMALL_STAGES, "none"),
    ("MLP-Mixer (timm)", "mlp_mixer.MlpMixer", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_blocks": 2},
        "none"),
    ("ResMLP (timm)", "mlp_mixer.MlpMixer", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_blocks": 2,
        "mlp_ratio": 4, "block_layer": "mlp_mixer.ResBlock", "norm_layer": "mlp_mixer.Affine"}, "none"),
    ("gMLP (timm)", "mlp_mixer.MlpMixer", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_blocks": 2,
        "mlp_ratio": 6, "block_layer": "mlp_mixer.SpatialGatingBlock", "mlp_layer": "mlp_mixer.GatedMlp"}, "none"),
    ("PoolFormer (timm)", "metaformer.MetaFormer", {**_SMALL_STAGES, "use_mlp_head": False}, "none"),
    ("PVT V2 (timm)", "pvt_v2_b0", {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)},
        "none"),
    ("XCiT (timm)", "xcit_nano_12_p16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1,
        "num_heads": 3}, "replaced"),
    ("CoAtNet (timm)", "coatnet_nano_rw_224", {"img_size": 64, "embed_dim": (32, 32, 32, 64), "depths": (1, 1, 1, 1),
        "stem_width": 8}, "replaced"),
    ("MobileNetV3 (timm)", "mobilenetv3_small_050", {}, "replaced"),
    ("RegNet (timm)", "regnety_002", {"depth": 8, "w0": 8, "wa": 8.0, "wm": 2.0, "group_size": 4, "stem_width": 8},
        "replaced"),
    ("MobileNetV4 (timm)", "mobilenetv4_conv_small_035", {}, "frozen"),
    ("TinyViT (timm)", "tiny_vit.TinyVit", {"embed_dims": (8, 16, 16, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2,
        2, 4), "drop_path_rate": 0.0}, "replaced"),
    ("LeViT (timm)", "levit_128s", {"img_size": 64, "embed_dim": (16, 16, 32), "depth": (1, 1, 1), "num_heads": (2, 2,
        2), "key_dim": 8}, "replaced"),
)  # fmt: skip


def _build(model: str, options: dict[str, object]) -> nn.Module:
    import timm

    if "." not in model:
        return timm.create_model(model, pretrained=False, num_classes=4, **options)
    found = {key: _named(value) if isinstance(value, str) else value for key, value in options.items()}
    return _named(model)(num_classes=4, **found)


def _named(path: str) -> Any:
    """``module.Class`` of timm.models."""
    module, name = path.split(".")
    return getattr(importlib.import_module(f"timm.models.{module}"), name)


def architectures() -> list[Architecture]:
    """Small forms; batch normalisation is replaced by `ModuleValidator.fix`, or stays in eval mode."""

    def same(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return output if isinstance(output, Tensor) else (output[0] + output[1]) / 2

    def images(size: int) -> Batch:
        return (torch.randn(RECORDS, 3, size, size),)

    found = []
    for name, model, options, batch_norm in _MODELS:
        size = int(str(options.get("img_size", 64)))
        found.append(
            Architecture(
                name,
                "timm",
                lambda m=model, o=options: _build(m, o),
                lambda s=size: images(s),
                same,
                batch_norm,  # type: ignore[misc]
            )
        )
    return found
