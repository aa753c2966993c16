"""Tiny bases and adapters by their names and shapes alone, for the table of pairs."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import torch
from safetensors.numpy import save_file

from tests.checkpoint.doctor import pairs
from tests.checkpoint.made import Array, adapter, checkpoint, factors

Options = dict[str, Any]
"""Of the merge that is meant."""
Build = Callable[[Path], Options | None]
"""Makes `base` and `adapter` in a folder."""

RNG = np.random.default_rng(5)
ATTENTION = "model.layers.{}.self_attn"
Q, V = f"{ATTENTION.format(0)}.q_proj", f"{ATTENTION.format(0)}.v_proj"


def normal(*shape: int, size: float = 1.0) -> Array:
    return (size * RNG.standard_normal(shape)).astype(np.float32)


def _llama() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (20, 16)}
    for i in (0, 1):
        lead = f"model.layers.{i}"
        rows = {"q": 16, "k": 8, "v": 8}
        shapes |= {f"{lead}.self_attn.{n}_proj.weight": (r, 16) for n, r in rows.items()}
        shapes |= {f"{lead}.self_attn.o_proj.weight": (16, 16)}
        shapes |= {f"{lead}.mlp.{n}_proj.weight": (24, 16) for n in ("gate", "up")}
        shapes |= {f"{lead}.mlp.down_proj.weight": (16, 24), f"{lead}.norm.weight": (16,)}
    return shapes | {"lm_head.weight": (20, 16)}


def _bert() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in (0, 1):
        lead = f"bert.encoder.layer.{i}"
        for n in ("query", "key", "value"):
            shapes[f"{lead}.attention.self.{n}.weight"] = (12, 12)
            shapes[f"{lead}.attention.self.{n}.bias"] = (12,)
        shapes[f"{lead}.intermediate.dense.weight"] = (20, 12)
        shapes[f"{lead}.output.dense.weight"] = (12, 20)
    return shapes | {"classifier.weight": (3, 12), "classifier.bias": (3,)}


def _gpt2() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (20, 16)}
    for i in (0, 1):
        lead = f"transformer.h.{i}"
        shapes |= {f"{lead}.attn.c_attn.weight": (16, 48), f"{lead}.attn.c_proj.weight": (16, 16)}
        shapes |= {f"{lead}.mlp.c_fc.weight": (16, 64), f"{lead}.mlp.c_fc.bias": (64,)}
    return shapes


ATTN1 = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "llama": _llama(),
    "bert": _bert(),
    "gpt2": _gpt2(),
    "unet": {
        "conv_in.weight": (8, 4, 3, 3),
        f"{ATTN1}.to_q.weight": (8, 6),
        f"{ATTN1}.to_q.bias": (8,),
        "mid_block.resnets.0.conv1.weight": (10, 8, 3, 3),
        "conv_norm_out.weight": (8,),
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    },
    "bert": {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
    "gpt2": {"model_type": "gpt2", "architectures": ["GPT2Model"]},
}  # fmt: skip


def base(
    folder: Path,
    kind: str = "llama",
    change: Mapping[str, Array | None] | None = None,
    *,
    shards: int = 1,
    dtype: Any = np.float32,
    **config: Any,
) -> Path:
    """A base of this kind with some tensors changed, or left out where None."""
    made: dict[str, Array | None] = {n: normal(*s).astype(dtype) for n, s in SHAPES[kind].items()}
    tensors = {n: v for n, v in (made | dict(change or {})).items() if v is not None}
    if kind == "unet":
        (folder / "base").mkdir()
        save_file(tensors, folder / "base" / "diffusion_pytorch_model.safetensors")
        return folder / "base"
    return checkpoint(folder / "base", tensors, shards, config=CONFIGS[kind] | config)


def sides(kind: str, module: str) -> tuple[int, int]:
    """out, in of a linear weight."""
    shape = SHAPES[kind][f"{module}.weight"]
    turned = kind == "gpt2"
    return (shape[1], shape[0]) if turned else (shape[0], shape[1])


def lora(folder: Path, kind: str, *ends: str, rank: int = 2, **config: Any) -> Path:
    """PEFT's folder for the weights of a kind whose module ends so."""
    made = [n.removesuffix(".weight") for n, s in SHAPES[kind].items() if len(s) == 2]
    mine = [m for m in made if m.endswith(ends)]
    every = {m: factors(RNG, *sides(kind, m), rank) for m in mine}
    settings: dict[str, Any] = {"target_modules": list(ends), "r": rank}
    return adapter(folder / "adapter", every, **settings | config)


def peft_folder(folder: Path, model: Any, config: Any) -> None:
    """A model and an adapter of it as transformers and PEFT save them."""
    pairs.save_base(model, folder / "base")
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            p.mul_(0.02 if ".lora_B" in name else 1)
    adapted.save_pretrained(folder / "adapter")


def kohya(folder: Path, tensors: Mapping[str, Array | float], lead: str = "lora_unet_") -> None:
    """A kohya file of tensors by module and end."""
    made = {f"{lead}{n}": np.asarray(v, np.float32) for n, v in tensors.items()}
    save_file(made, folder / "adapter")
    (folder / "adapter").rename(folder / "adapter.safetensors")


TO_Q = ATTN1.replace(".", "_") + "_to_q"
CONV1 = "mid_block_resnets_0_conv1"
LINEAR = {f"{TO_Q}.lora_down.weight": normal(2, 6),
          f"{TO_Q}.lora_up.weight": normal(8, 2, size=0.2)}  # fmt: skip
CONV = {f"{CONV1}.lora_down.weight": normal(2, 8, 3, 3),
        f"{CONV1}.lora_up.weight": normal(10, 2, 1, 1, size=0.1)}  # fmt: skip


def edit(folder: Path, change: Callable[[dict[str, Array], dict[str, Any]], Any]) -> None:
    """Change the tensors and the config of the adapter's folder."""
    old = folder / "old"
    (folder / "adapter").rename(old)
    pairs.edited(old, folder / "adapter", change)
    shutil.rmtree(old)


def pickled(file: Path, target: Path) -> None:
    """A safetensors file as torch.save writes its tensors."""
    from safetensors.torch import load_file

    torch.save(load_file(file), target)
    file.unlink()


def of_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter" / "adapter_config.json").read_text()))


BF16 = ml_dtypes.bfloat16
