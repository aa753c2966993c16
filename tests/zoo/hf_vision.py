"""Image models of transformers: backbones, and one for every task of images and video."""

from __future__ import annotations

from typing import Any

import torch

from .base import (
    BATCH,
    HEADS,
    HIDDEN,
    IMAGE,
    INNER,
    LABELS,
    P_DROP,
    Built,
    entry,
    floats,
    image,
)  # fmt: skip


def vit(**more: Any) -> dict[str, Any]:
    """The fields that ViT's relatives share."""
    return dict(
        image_size=32, patch_size=8, hidden_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=HEADS, intermediate_size=INNER, num_labels=LABELS,
    ) | more  # fmt: skip


def swin(**more: Any) -> dict[str, Any]:
    """A Swin of two stages."""
    return dict(
        image_size=32, patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 3],
        window_size=4, num_labels=LABELS,
    ) | more  # fmt: skip


def resnet(**more: Any) -> Any:
    """The configuration of a backbone of convolutions."""
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic",
        num_labels=LABELS, **more,
    )  # fmt: skip


@entry("hf_vit", "hf", fast=True)
def _hf_vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    more = dict(hidden_dropout_prob=P_DROP, attention_probs_dropout_prob=P_DROP)
    return ViTForImageClassification(ViTConfig(**vit(**more))), (), image()


@entry("hf_swin", "hf")
def _hf_swin() -> Built:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(SwinConfig(**swin())), (), image()


@entry("hf_resnet", "hf", include="*")
def _hf_resnet() -> Built:
    from transformers import ResNetForImageClassification

    return ResNetForImageClassification(resnet()), (), image()


@entry("hf_convnext", "hf")
def _hf_convnext() -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        patch_size=4, num_stages=2, hidden_sizes=[12, 20], depths=[1, 1], image_size=32,
        num_labels=LABELS,
    )  # fmt: skip
    return ConvNextForImageClassification(config), (), image()


@entry("hf_mobilevit", "hf", include="*")
def _hf_mobilevit() -> Built:
    from transformers import MobileViTConfig, MobileViTForImageClassification

    config = MobileViTConfig(
        image_size=128, hidden_sizes=[12, 16, 20], neck_hidden_sizes=[4, 6, 8, 10, 12, 14, 16],
        num_attention_heads=2, num_labels=LABELS, expand_ratio=2.0,
    )  # fmt: skip
    inputs = {"pixel_values": floats(BATCH, 3, 128, 128)}  # four patches even in the last stage
    return MobileViTForImageClassification(config), (), inputs


@entry("hf_dinov2", "hf")
def _hf_dinov2() -> Built:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**vit(mlp_ratio=2))), (), image()


@entry("hf_masked_image", "hf")
def _hf_masked_image() -> Built:
    from transformers import BeitConfig, BeitForMaskedImageModeling

    more = dict(vocab_size=30, use_mask_token=True, use_relative_position_bias=True)
    mask = torch.arange(16).remainder(3).eq(0).expand(BATCH, 16)
    inputs = image() | {"bool_masked_pos": mask.clone()}
    return BeitForMaskedImageModeling(BeitConfig(**vit(**more))), (), inputs


@entry("hf_object_detection", "hf", idle=True, trains=False)  # it looks for infinities in training
def _hf_object_detection() -> Built:
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=resnet(out_features=["stage2"]), d_model=HIDDEN, num_queries=6,
        encoder_layers=2, decoder_layers=2, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, num_labels=LABELS,
    )  # fmt: skip
    return DetrForObjectDetection(config), (), image()


@entry("hf_yolos", "hf")
def _hf_yolos() -> Built:
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(**vit(image_size=[32, 32], num_detection_tokens=6))
    return YolosForObjectDetection(config), (), image()


@entry("hf_semantic_segmentation", "hf")
def _hf_semantic_segmentation() -> Built:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[12, 16],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2],
        decoder_hidden_size=20, num_labels=LABELS,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config), (), image()


@entry("hf_universal_segmentation", "hf", idle=True)
def _hf_universal_segmentation() -> Built:
    from transformers import (
        DetrConfig,
        MaskFormerConfig,
        MaskFormerForInstanceSegmentation,
        MaskFormerSwinConfig,
    )

    features = [f"stage{i}" for i in (1, 2, 3, 4)]
    backbone = MaskFormerSwinConfig(
        **swin(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[2] * 4, window_size=2),
        out_features=features,
    )
    decoder = DetrConfig(
        d_model=HIDDEN, num_queries=6, decoder_layers=2, decoder_ffn_dim=INNER,
        decoder_attention_heads=HEADS, encoder_layers=1, encoder_ffn_dim=INNER,
        encoder_attention_heads=HEADS, use_timm_backbone=False, backbone=None,
        backbone_config=resnet(out_features=["stage2"]),
    )  # fmt: skip
    config = MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=backbone,
        decoder_config=decoder, num_labels=LABELS,
    )  # fmt: skip
    return MaskFormerForInstanceSegmentation(config), (), {"pixel_values": floats(BATCH, 3, 64, 64)}


@entry("hf_depth_estimation", "hf", include="*")
def _hf_depth_estimation() -> Built:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        **vit(mlp_ratio=2, num_hidden_layers=4), out_indices=[1, 2, 3, 4],
        apply_layernorm=False, reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=8, reassemble_hidden_size=HIDDEN,
        neck_hidden_sizes=[8, 12, 16, 20], fusion_hidden_size=12, head_hidden_size=8,
    )  # fmt: skip
    return DepthAnythingForDepthEstimation(config), (), image()


@entry("hf_keypoints", "hf")
def _hf_keypoints() -> Built:
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    backbone = VitPoseBackboneConfig(
        image_size=[32, 32], patch_size=[8, 8], hidden_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=HEADS, mlp_ratio=2, out_indices=[2],
    )  # fmt: skip
    config = VitPoseConfig(backbone_config=backbone, num_labels=5)
    return VitPoseForPoseEstimation(config), (), image()


@entry("hf_image_to_image", "hf")
def _hf_image_to_image() -> Built:
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    config = Swin2SRConfig(
        image_size=16, embed_dim=12, depths=[2], num_heads=[2], window_size=4, mlp_ratio=2.0,
        num_feature=8,
    )  # fmt: skip
    inputs = {"pixel_values": floats(BATCH, 3, 16, 16)}
    return Swin2SRForImageSuperResolution(config), (), inputs


@entry("hf_mask_generation", "hf", idle=True)
def _hf_mask_generation() -> Built:
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config=dict(
            hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, image_size=32,
            patch_size=8, mlp_dim=INNER, output_channels=16, window_size=2,
            global_attn_indexes=[1], num_pos_feats=8,
        ),
        prompt_encoder_config=dict(
            hidden_size=16, image_size=32, patch_size=8, mask_input_channels=4,
        ),
        mask_decoder_config=dict(
            hidden_size=16, mlp_dim=INNER, num_hidden_layers=2, num_attention_heads=2,
            iou_head_hidden_dim=16, iou_head_depth=2,
        ),
    )  # fmt: skip
    points = {"input_points": floats(BATCH, 1, 2, 2), "input_labels": torch.ones(BATCH, 1, 2).int()}
    return SamModel(config), (), {"pixel_values": floats(*IMAGE)} | points


@entry("hf_video_classification", "hf")
def _hf_video_classification() -> Built:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(**vit(num_frames=4, tubelet_size=2))
    inputs = {"pixel_values": floats(BATCH, 4, 3, 32, 32)}
    return VideoMAEForVideoClassification(config), (), inputs


@entry("hf_timesformer", "hf")
def _hf_timesformer() -> Built:
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    config = TimesformerConfig(**vit(num_frames=4))
    inputs = {"pixel_values": floats(BATCH, 4, 3, 32, 32)}
    return TimesformerForVideoClassification(config), (), inputs
