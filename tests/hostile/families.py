"""Tiny folders of many families, as save_pretrained writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
RESNET = {
    "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic",
    "out_features": ["stage1", "stage2"],
}  # fmt: skip
STAGES = {
    **RESNET, "model_type": "resnet", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
"""A backbone of four stages, as decoders of segments and boxes read it."""
DETR = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "num_queries": 4, "num_labels": 3,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", {**TEXT, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2ForCausalLM", {**TEXT, "num_key_value_heads": 1, "head_dim": 8}),
    "mixtral": ("MixtralForCausalLM", {**TEXT, "num_key_value_heads": 2, "num_local_experts": 2}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 64,
         "max_position_embeddings": 32, "attention_types": [[["global", "local"], 1]]},
    ),
    "bert": ("BertForSequenceClassification", TEXT),
    "roberta": ("RobertaForMaskedLM", TEXT),
    "deberta-v2": ("DebertaV2Model", {**TEXT, "pos_att_type": ["p2c", "c2p"]}),
    "albert": ("AlbertModel", {**TEXT, "embedding_size": 8}),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64},
    ),
    "bart": (
        "BartModel",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
         "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "vocab_size": 64, "max_position_embeddings": 32},
    ),
    "vit": ("ViTForImageClassification", VISION),
    "swin": (
        "SwinModel",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1],
         "window_size": 4},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "resnet": ("ResNetModel", RESNET),
    "clip": ("CLIPModel", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 8}),
    "wav2vec2": (
        "Wav2Vec2Model",
        {**TEXT, "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [4, 4],
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2},
    ),
    "whisper": (
        "WhisperModel",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
         "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 32,
         "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 1},
    ),
    "mamba": ("MambaForCausalLM", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2,
                                   "vocab_size": 64}),
    "timm_wrapper": ("TimmWrapperForImageClassification",
                     {"architecture": "test_resnet.r160_in1k", "num_labels": 3}),
    "dpt": (
        "DPTForDepthEstimation",
        {"backbone_config": {"model_type": "resnet", **RESNET}, "neck_hidden_sizes": [8, 8],
         "fusion_hidden_size": 8, "hidden_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "intermediate_size": 16, "is_hybrid": False, "image_size": 32,
         "patch_size": 8, "reassemble_factors": [1, 0.5], "backbone_out_indices": [0, 0]},
    ),
    "detr": ("DetrForObjectDetection", {**DETR, "backbone_config": STAGES}),
    "conditional_detr": (
        "ConditionalDetrForObjectDetection",
        {**DETR, "backbone_config": {"model_type": "timm_backbone", "backbone": "test_resnet",
                                     "out_indices": [1, 2, 3, 4]}},
    ),
    "upernet": (
        "UperNetForSemanticSegmentation",
        {"backbone_config": STAGES, "hidden_size": 16, "auxiliary_channels": 8, "num_labels": 3,
         "auxiliary_in_channels": 16, "pool_scales": [1, 2]},
    ),
    "mask2former": (
        "Mask2FormerModel",
        {"backbone_config": {
             "model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 8,
             "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4,
             "out_features": ["stage1", "stage2", "stage3", "stage4"]},
         "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32,
         "encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 2,
         "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 4, "num_labels": 3},
    ),
    "vitpose": (
        "VitPoseForPoseEstimation",
        {"backbone_config": {**VISION, "model_type": "vitpose_backbone", "num_experts": 1,
                             "image_size": [32, 32], "patch_size": [16, 16],
                             "out_features": ["stage2"]},
         "num_labels": 3},
    ),
    "depth_anything": (
        "DepthAnythingForDepthEstimation",
        {"backbone_config": {**VISION, "model_type": "dinov2", "image_size": 28, "patch_size": 14,
                             "out_features": ["stage1", "stage2"], "reshape_hidden_states": False},
         "reassemble_hidden_size": 16, "reassemble_factors": [1, 0.5], "neck_hidden_sizes": [8, 8],
         "fusion_hidden_size": 8, "head_hidden_size": 8, "patch_size": 14},
    ),
}  # fmt: skip
"""model_type → a class of transformers and fields of its config. timm_wrapper's model is timm's own
smallest. Backbones stand in the configs of their models, and that of conditional_detr is timm's."""


def save(family: str, folder: Path, **fields: Any) -> dict[str, Any]:
    """Write a folder of random weights; what its config.json says."""
    import json

    import transformers

    name, own = FAMILIES[family]
    config = transformers.CONFIG_MAPPING[family](**own, **fields)
    torch.manual_seed(0)
    with transformers.utils.logging.disable_progress_bar() or torch.no_grad():
        module = getattr(transformers, name)(config)
    module.save_pretrained(folder)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


Change = Callable[[dict[str, Any]], None]
