"""Merges of every kind of update that PEFT's files hold, against PEFT's own merge."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lora_fx


def llama(tied: bool = False) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=1100, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=1100))


def experts() -> Any:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=48, intermediate_size=80, moe_intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=12, num_experts=4,
            num_experts_per_tok=2, vocab_size=1100, decoder_sparse_step=1,
        )
    )  # fmt: skip


LINEARS = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dora": (llama, {"target_modules": LINEARS, "use_dora": True}),
    "dora conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "dora rslora": (llama, {"target_modules": LINEARS, "use_dora": True, "use_rslora": True}),
    "lora_bias": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True}),
    "bias": (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 1001]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "pissa": (llama, {"target_modules": LINEARS, "init_lora_weights": "pissa"}),
    "olora": (llama, {"target_modules": LINEARS, "init_lora_weights": "olora"}),
    "patterns": (
        llama,
        {
            "target_modules": LINEARS,
            "rank_pattern": {"v_proj": 2, r"layers\.1\..*q_proj": 7},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
}


def drawn(model: Any, scale: float = 0.1) -> None:
    """Random values for everything that is trained, so that no update is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_magnitude" not in name:
                p.add_(torch.randn_like(p) * scale)
            elif p.requires_grad:
                p.mul_(1 + 0.2 * torch.rand_like(p))


def states(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_merge_is_pefts(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build, config = CASES[case]
    torch.manual_seed(0)
    model = build().to(dtype)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model.save_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=dtype),
            LoraConfig(r=4, lora_alpha=6, **config),
        )
        drawn(tuned)
        tuned.save_pretrained(adapter)
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=dtype), str(adapter)
        )
        want = loaded.merge_and_unload().state_dict()
    lora_fx.merge(base, adapter, out)
    # PEFT's SVD and QR of W are in fp32 too, and their rounding is theirs.
    floor = 1e-5 if config.get("init_lora_weights") else 2e-6
    check(states(out), states(base), want, dtype, floor)


def check(
    got: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
    want: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    floor: float = 2e-6,
) -> None:
    eps = torch.finfo(dtype).eps
    moved = 0
    for name, value in got.items():
        a, b = value.double().numpy(), want[name].double().numpy()
        np.testing.assert_allclose(
            a, b, rtol=max(eps, floor), atol=max(floor, eps / 4) * np.abs(b).max(), err_msg=name
        )
        moved += not torch.equal(value, base[name])
    assert moved, "the adapter changes something"


def test_stacks_of_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = experts()
    names = [n for n, p in model.named_parameters() if p.ndim == 3 and "layers.0" in n]
    assert names, "the model has stacks"
    # save_pretrained would write the experts apart; here as the module has them.
    base.mkdir()
    save_file({k: v.clone() for k, v in model.state_dict().items()}, base / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=[], target_parameters=[names[0]], rank_pattern={}
        )
        tuned = get_peft_model(model, config)
        drawn(tuned)
        tuned.save_pretrained(adapter)
        want = tuned.merge_and_unload().state_dict()
    lora_fx.merge(base, adapter, out)
    check(states(out), states(base), want, torch.float32)
