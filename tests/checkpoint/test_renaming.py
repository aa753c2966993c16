"""The names of loaded models against transformers: its file in, its parameters out, both ways."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from lora_fx.adapter.expert_families import FAMILIES
from lora_fx.checkpoint.loaded_names import Loaded, loaded_of
from lora_fx.checkpoint.releases import RENAMED, STACKED, Renamed, renamed_parts
from lora_fx.files.checkpoint import open_checkpoint
from tests.checkpoint.made import Array, read

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
TEXT = {**SIZES, "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 32,
        "pad_token_id": 0}  # fmt: skip
MOE = {
    **TEXT, "moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 20,
}  # fmt: skip
MLA = {
    **TEXT, "moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip
VLM = {
    "vision_config": {"model_type": "clip_vision_model", **IMAGE, "projection_dim": 16},
    "text_config": {"model_type": "llama", **TEXT},
}
SIGLIP = {"model_type": "siglip_vision_model", **IMAGE}
QWEN_VL = {
    "text_config": {**TEXT, "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default",
                                                "rope_theta": 1e4}},
    "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2,
                      "intermediate_size": 24, "out_hidden_size": 16, "patch_size": 4},
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", IMAGE),
    "deit": ("DeiTForImageClassification", IMAGE),
    "beit": ("BeitForImageClassification", IMAGE),
    "audio-spectrogram-transformer": (
        "ASTForAudioClassification",
        {**SIZES, "max_length": 32, "num_mel_bins": 16, "patch_size": 4},
    ),
    "ijepa": ("IJepaForImageClassification", IMAGE),
    "vit_mae": (
        "ViTMAEModel",
        {**IMAGE, "decoder_hidden_size": 8, "decoder_num_attention_heads": 2,
         "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 12},
    ),
    "vit_msn": ("ViTMSNModel", IMAGE),
    "vivit": (
        "VivitForVideoClassification",
        {**IMAGE, "num_frames": 4, "tubelet_size": [2, 4, 4]},
    ),
    "dinov2": ("Dinov2ForImageClassification", IMAGE),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", IMAGE),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1],
         "num_heads": [2, 2], "window_size": 4},
    ),
    "llava": ("LlavaForConditionalGeneration", VLM),
    "llava_next": ("LlavaNextForConditionalGeneration", VLM),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", {**VLM, "vision_config": SIGLIP}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"vision_config": SIGLIP, "text_config": {**TEXT, "head_dim": 8},
         "mm_tokens_per_image": 4},
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {"vision_config": SIGLIP, "text_config": {"model_type": "gemma", **TEXT, "head_dim": 8},
         "projection_dim": 16},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {"vision_config": {"model_type": "pixtral", **IMAGE},
         "text_config": {"model_type": "mistral", **TEXT}},
    ),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", QWEN_VL),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", QWEN_VL),
    "granitemoe": ("GraniteMoeForCausalLM", {**TEXT, "num_local_experts": 3}),
    "mixtral": ("MixtralForCausalLM", {**TEXT, "num_local_experts": 3}),
    "minimax": ("MiniMaxForCausalLM", {**TEXT, "num_local_experts": 3, "head_dim": 8}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {**TEXT, "num_local_experts": 3, "head_dim": 8}),
    "phimoe": ("PhimoeForCausalLM", {**TEXT, "num_local_experts": 3}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", MOE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**MOE, "head_dim": 8}),
    "olmoe": ("OlmoeForCausalLM", MOE),
    "flex_olmo": ("FlexOlmoForCausalLM", MOE),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**MLA, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", MLA),
    "dots1": ("Dots1ForCausalLM", {**MLA, "head_dim": 8, "layer_types": ["full_attention"] * 2}),
    "glm4_moe": ("Glm4MoeForCausalLM", {**MLA, "head_dim": 8}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {**MOE, "moe_num_experts": 3, "moe_k": 2}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {**MOE, "head_dim": 8}),
    "jamba": ("JambaForCausalLM", {**MOE, "use_mamba_kernels": False, "mamba_d_state": 4,
                                   "mamba_dt_rank": 4, "attn_layer_period": 2,
                                   "attn_layer_offset": 1, "expert_layer_period": 2,
                                   "expert_layer_offset": 1}),
    "exaone_moe": ("ExaoneMoeForCausalLM", {**MLA, "head_dim": 8, "num_experts": 3}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {**MOE, "head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
         "linear_key_head_dim": 4, "linear_value_head_dim": 4, "layer_types":
         ["linear_attention", "full_attention"]},
    ),
}  # fmt: skip
"""model_type → a class of transformers and a small config; not every one of RENAMED, STACKED."""
SAME = {
    "llava_next_video": "llava_next", "internvl": "llava", "vipllava": "llava",
    "aya_vision": "llava", "granitemoeshared": "granitemoe", "granitemoehybrid": "granitemoe",
}  # fmt: skip
"""Those without a model here → the one whose entry transformers gives them too."""


def saved(kind: str, folder: Path) -> dict[str, Array]:
    """A tiny model of a type, written by transformers; its own tensors, by its own names."""
    import torch

    name, fields = MODELS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls(cls.config_class(**fields))
        model.save_pretrained(folder)
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}


def names_of(folder: Path) -> Loaded:
    base = open_checkpoint(folder)
    return loaded_of(base.tensors, base.config())


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_found_in_the_file(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    file, loaded = read(tmp_path), names_of(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    assert loaded.names or loaded.stacks
    for name, value in model.items():
        if name in loaded.stacks:
            stack = loaded.stacks[name]
            made = np.full(stack.info.shape, np.nan, np.float32)
            for part in stack.parts:
                made[part.expert, part.low : part.high] = file[part.tensor]
        else:
            made = file[loaded.names.get(name, name)]
        assert np.array_equal(made, value), name
    more = {n for n in {*loaded.names, *loaded.stacks} - {*model} if "correction_bias" not in n}
    assert not more, "nothing that the model has not, but for buffers"


def test_every_type_is_covered() -> None:
    types = {kind for row in (*RENAMED, *STACKED) for kind in row.types}
    assert types == {*MODELS, *SAME}


def _sparse() -> Renamed:
    (row,) = (row for row in RENAMED if row.parts == {"block_sparse_moe": "mlp"})
    return row


def test_what_holds_experts_one_by_one_is_what_a_release_renamed() -> None:
    """`convert` lays experts out by a table of its own, which has what vLLM does with them too."""
    (family,) = (family for family in FAMILIES if family.holder != "mlp")
    assert family.types == set(_sparse().types)
    assert (family.holder, "mlp") == next(iter(_sparse().parts.items()))


def test_the_types_without_a_model_here_are_as_said() -> None:
    from transformers import conversion_mapping

    as_of = conversion_mapping._MODEL_TO_CONVERSION_PATTERN
    for kind, other in SAME.items():
        assert as_of[kind] == other or as_of[kind] == as_of.get(other), kind
        assert renamed_parts(kind) == renamed_parts(other)
