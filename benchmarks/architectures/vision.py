"""Image classifiers of torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from architectures.architecture import RECORDS, Architecture, Batch


def _small(size: int) -> Callable[[], Batch]:
    return lambda: (torch.randn(RECORDS, 3, size, size),)


def _models() -> list[tuple[str, Callable[[], nn.Module], int, bool]]:
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.mobilenetv3 import InvertedResidualConfig

    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    inverted = [InvertedResidualConfig(8, 3, 16, 8, True, "HS", 2, 1, 1.0)]
    return [
        ("ResNet", lambda: _resnet(models, models.resnet.BasicBlock, 1), 33, True),
        ("ResNeXt", lambda: _resnet(models, models.resnet.Bottleneck, 4), 33, True),
        ("VGG", lambda: _vgg(models), 16, False),
        ("Inception block", lambda: _inception(), 16, True),
        ("SqueezeNet", lambda: models.squeezenet1_1(num_classes=4, dropout=0.0), 40, False),
        ("DenseNet", lambda: models.DenseNet(8, (2, 2), 16, num_classes=4), 33, True),
        ("MobileNetV2", lambda: models.MobileNetV2(4, 0.25, [[2, 8, 2, 2], [2, 16, 1, 2]], dropout=0.0), 33, True),
        ("MobileNetV3", lambda: models.MobileNetV3(inverted, 32, num_classes=4, dropout=0.0), 33, True),
        ("ShuffleNetV2", lambda: models.ShuffleNetV2([1, 1, 1], [8, 16, 16, 32, 32], num_classes=4), 33, True),
        ("EfficientNet", lambda: _efficientnet(models), 33, True),
        ("RegNet", lambda: _regnet(models), 33, True),
        ("ConvNeXt (torchvision)", lambda: models.ConvNeXt(blocks, num_classes=4), 32, False),
        ("ViT (torchvision)", lambda: models.VisionTransformer(16, 8, 2, 4, 16, 32, num_classes=4), 16, False),
        ("Swin (torchvision)", lambda: _swin(models, "v1"), 32, False),
        ("Swin V2 (torchvision)", lambda: _swin(models, "v2"), 32, False),
        ("MaxViT (torchvision)", lambda: _maxvit(models), 32, True),
    ]  # fmt: skip


def _efficientnet(models: Any) -> nn.Module:
    config = models.efficientnet.MBConvConfig(4, 3, 2, 8, 8, 1)
    return models.EfficientNet([config], dropout=0.0, stochastic_depth_prob=0.0, num_classes=4, last_channel=32)


def _regnet(models: Any) -> nn.Module:
    params = models.regnet.BlockParams([1, 1], [8, 16], [4, 4], [1.0, 1.0], [2, 2], 0.25)
    return models.RegNet(params, num_classes=4, stem_width=8)


def _inception() -> nn.Module:
    from torchvision.models.googlenet import Inception

    return nn.Sequential(Inception(3, 8, 8, 8, 8, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def _vgg(models: Any) -> nn.Module:
    """With a small head: the original one has 120 million weights."""
    model = models.VGG(models.vgg.make_layers([8, "M", 16, "M"]), num_classes=4, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(64, 16), nn.ReLU(True), nn.Linear(16, 4))
    return model


def _resnet(models: Any, block: Any, groups: int) -> nn.Module:
    """Without the last two stages, which hold most of the weights."""
    model = models.ResNet(block, [1, 1, 1, 1], num_classes=4, groups=groups, width_per_group=64 // groups)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, 4)
    return model


def _swin(models: Any, version: str) -> nn.Module:
    block = (
        models.swin_transformer.SwinTransformerBlock
        if version == "v1"
        else models.swin_transformer.SwinTransformerBlockV2
    )
    merge = models.swin_transformer.PatchMerging if version == "v1" else models.swin_transformer.PatchMergingV2
    return models.SwinTransformer(
        [4, 4],
        8,
        [2, 1],
        [2, 4],
        [4, 4],
        2.0,
        stochastic_depth_prob=0.0,
        num_classes=4,
        block=block,
        downsample_layer=merge,
    )


def _maxvit(models: Any) -> nn.Module:
    return models.MaxVit(
        (32, 32),
        8,
        4,
        [8, 16],
        [1, 1],
        4,
        stochastic_depth_prob=0.0,
        attention_dropout=0.0,
        mlp_dropout=0.0,
        num_classes=4,
    )


def architectures() -> list[Architecture]:
    """Small forms; batch normalisation is replaced by `ModuleValidator.fix`."""

    def same(output: Tensor) -> Tensor:
        return output

    return [
        Architecture(name, "torchvision", build, _small(size), same, "replaced" if fix else "none")
        for name, build, size, fix in _models()
    ]
