"""Models of torchvision and timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import BATCH, HEADS, HIDDEN, IMAGE, INNER, LABELS, P_DROP, Built, entry, floats


def timm_model(name: str, size: int = 32, **options: Any) -> Built:
    """A timm model by name, without its weights."""
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=LABELS, **options)
    return model, (floats(BATCH, 3, size, size),), {}


@entry("tv_vit", "torchvision", fast=True)
def _tv_vit() -> Built:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=HEADS, hidden_dim=HIDDEN,
        mlp_dim=INNER, dropout=P_DROP, attention_dropout=P_DROP, num_classes=LABELS,
    )  # fmt: skip
    return model, (floats(*IMAGE),), {}


@entry("tv_resnet18", "torchvision", fast=True, include="*", gain=0.3)
def _tv_resnet18() -> Built:
    from torchvision.models import resnet18

    return resnet18(weights=None, num_classes=LABELS), (floats(BATCH, 3, 64, 64),), {}


@entry("tv_swin", "torchvision")
def _tv_swin() -> Built:
    from torchvision.models import SwinTransformer

    model = SwinTransformer(
        patch_size=[4, 4], embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=[4, 4],
        stochastic_depth_prob=0.0, num_classes=LABELS,
    )  # fmt: skip
    return model, (floats(*IMAGE),), {}


@entry("tv_mobilenet_v3", "torchvision", include="*")
def _tv_mobilenet_v3() -> Built:
    from torchvision.models import mobilenet_v3_small

    model = mobilenet_v3_small(weights=None, num_classes=LABELS, width_mult=0.25)
    return model, (floats(*IMAGE),), {}


@entry("tv_densenet", "torchvision", include="*")
def _tv_densenet() -> Built:
    from torchvision.models import DenseNet

    model = DenseNet(6, (2, 2), num_init_features=10, bn_size=2, num_classes=LABELS)
    return model, (floats(*IMAGE),), {}


@entry("tv_googlenet", "torchvision", include="*", gain=0.3)
def _tv_googlenet() -> Built:
    from torchvision.models import googlenet

    model = googlenet(weights=None, num_classes=LABELS, aux_logits=False, init_weights=False)
    return model, (floats(BATCH, 3, 64, 64),), {}


@entry("tv_deeplab", "torchvision", include="*", gain=0.3)
def _tv_deeplab() -> Built:
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

    backbone = nn.ModuleDict({"out": nn.Conv2d(3, 12, 3, 2, 1)})
    model = DeepLabV3(_Features(backbone), DeepLabHead(12, LABELS))
    return model, (floats(BATCH, 3, 16, 16),), {}


class _Features(nn.Module):
    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Any) -> dict[str, Any]:
        return {name: part(x) for name, part in self.parts.items()}


@entry("tv_video_resnet", "torchvision", include="*", gain=0.3)
def _tv_video_resnet() -> Built:
    from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

    model = VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, LABELS)
    return model, (floats(BATCH, 3, 4, 16, 16),), {}


@entry("tv_fasterrcnn", "torchvision", captures=False)
def _tv_fasterrcnn() -> Built:
    from torchvision.models import resnet18
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    backbone = _resnet_fpn_extractor(resnet18(weights=None), 1)
    model = FasterRCNN(backbone, num_classes=4, min_size=64, max_size=64)
    return model, ([*floats(BATCH, 3, 64, 64)],), {}


@entry("timm_resnet18", "timm", fast=True, include="*", gain=0.3)
def _timm_resnet18() -> Built:
    return timm_model("resnet18", 64)


@entry("timm_mixer", "timm", fast=True)
def _timm_mixer() -> Built:
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(
        num_classes=LABELS, img_size=32, patch_size=8, num_blocks=2, embed_dim=HIDDEN,
        mlp_ratio=(0.5, 2.0), drop_rate=P_DROP, proj_drop_rate=P_DROP,
    )  # fmt: skip
    return model, (floats(*IMAGE),), {}


@entry("timm_vit", "timm")
def _timm_vit() -> Built:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=HIDDEN, depth=2, num_heads=HEADS, mlp_ratio=2.0,
        num_classes=LABELS, proj_drop_rate=P_DROP, init_values=0.5,
    )  # fmt: skip
    return model, (floats(*IMAGE),), {}


@entry("timm_convnext", "timm")
def _timm_convnext() -> Built:
    from timm.models.convnext import ConvNeXt

    model = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=LABELS)
    return model, (floats(*IMAGE),), {}


@entry("timm_efficientnet_b0", "timm", include="*")
def _timm_efficientnet_b0() -> Built:
    return timm_model("efficientnet_b0", drop_path_rate=0.0)


@entry("timm_maxvit", "timm")
def _timm_maxvit() -> Built:
    return timm_model("test_maxvit", 64, img_size=64, drop_path_rate=0.0)


@entry("timm_swinv2", "timm")
def _timm_swinv2() -> Built:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    model = SwinTransformerV2(
        img_size=32, patch_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4,
        num_classes=LABELS, drop_path_rate=0.0,
    )  # fmt: skip
    return model, (floats(*IMAGE),), {}


@entry("timm_nfnet", "timm", include="*", gain=0.3)
def _timm_nfnet() -> Built:
    return timm_model("test_nfnet", 32)


@entry("timm_vision_lstm", "timm")
def _timm_sequencer() -> Built:
    from timm.models.sequencer import Sequencer2d

    model = Sequencer2d(
        layers=(1, 1), patch_sizes=(8, 1), embed_dims=(12, 16), hidden_sizes=(6, 8),
        mlp_ratios=(2.0, 2.0), img_size=32, num_classes=LABELS, drop_path_rate=0.0,
    )  # fmt: skip
    return model, (floats(*IMAGE),), {}
