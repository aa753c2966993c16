"""A tiny adapter of every model type that GGUF is written for, and what llama.cpp makes of it.

`python -m tests.formats.gguf_families path/to/convert_lora_to_gguf.py` runs llama.cpp's converter
on each and prints the digests of what it wrote, which `LLAMA_CPP` holds: those of llama.cpp as in
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.formats.io import save_adapter

HEADS, GROUPS, SIZE, HIDDEN, INNER, ROWS, EXPERTS, RANK = 6, 2, 4, 20, 14, 34, 3, 2
SELF = [f"self_attn.{x}_proj" for x in "qkvo"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
MOE = [f"mlp.experts.{e}.{x}_proj" for e in range(EXPERTS) for x in ("gate", "up", "down")]
SHARED = [f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")]
W = [f"block_sparse_moe.experts.{e}.w{i}" for e in range(EXPERTS) for i in (1, 2, 3)]
ENDS = ["lm_head", "model.embed_tokens"]
FAMILIES: dict[str, tuple[str, list[str], list[str]]] = {
    "llama": ("LlamaForCausalLM", SELF + MLP, ENDS),
    "mistral": ("MistralForCausalLM", SELF + MLP, ENDS),
    "mixtral": ("MixtralForCausalLM", [*SELF, "block_sparse_moe.gate", *W], ENDS),
    "smollm3": ("SmolLM3ForCausalLM", SELF + MLP, ENDS),
    "granite": ("GraniteForCausalLM", SELF + MLP, ENDS),
    "qwen2": ("Qwen2ForCausalLM", SELF + MLP, ENDS),
    "qwen3": ("Qwen3ForCausalLM", SELF + MLP, ENDS),
    "qwen2_moe": ("Qwen2MoeForCausalLM", [*SELF, "mlp.gate", *MOE, *SHARED], ENDS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", [*SELF, "mlp.gate", *MOE], ENDS),
    "gemma": ("GemmaForCausalLM", SELF + MLP, []),
    "gemma2": ("Gemma2ForCausalLM", SELF + MLP, []),
    "gemma3_text": ("Gemma3ForCausalLM", SELF + MLP, []),
    "olmo2": ("Olmo2ForCausalLM", SELF + MLP, ENDS),
    "phi3": ("Phi3ForCausalLM", ["self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"], ENDS),
    "starcoder2": ("Starcoder2ForCausalLM", [*SELF, "mlp.c_fc", "mlp.c_proj"], ENDS),
}
LLAMA_CPP = {
    "llama": "004f7560ee7c5462",
    "mistral": "004f7560ee7c5462",
    "mixtral": "4ec9ff09d8da1e28",
    "smollm3": "527f43167378c0fe",
    "granite": "42a2680fe406d1bb",
    "qwen2": "09e7db9ba0cffb0d",
    "qwen3": "dd3890ebe71d63b7",
    "qwen2_moe": "bbbf80e870f0cb5b",
    "qwen3_moe": "da7cf2a163a65b03",
    "gemma": "8800ec5607ca4e8f",
    "gemma2": "6626428fd679965b",
    "gemma3_text": "52c2c8063438f9b7",
    "olmo2": "bc29aa6c5eb1f237",
    "phi3": "5786cbb1ba2da6f2",
    "starcoder2": "6a43935b7144da1b",
}


def config(name: str) -> dict[str, Any]:
    """config.json of a model that has no weights."""
    return {
        "model_type": name, "architectures": [FAMILIES[name][0]], "tie_word_embeddings": False,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": SIZE,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": ROWS,
        "num_hidden_layers": 2, "num_local_experts": EXPERTS, "num_experts": EXPERTS,
        "layer_types": ["full_attention"] * 2, "max_position_embeddings": 64, "rope_theta": 1e4,
        "rms_norm_eps": 1e-5, "norm_epsilon": 1e-5,
    }  # fmt: skip


def outputs(module: str) -> int:
    """Rows of B."""
    leaf = module.rpartition(".")[2]
    heads = {"q_proj": HEADS, "k_proj": GROUPS, "v_proj": GROUPS, "qkv_proj": HEADS + 2 * GROUPS}
    return SIZE * heads[leaf] if leaf in heads else {"gate_up_proj": 2 * INNER}.get(leaf, INNER)


def counted(start: int, *shape: int) -> np.ndarray[Any, Any]:
    """Numbers that are the same on every machine, in no order that a wrong axis would keep."""
    return (
        ((np.arange(start, start + np.prod(shape)) * 7919 % 1009 - 504) / 256)
        .astype(np.float32)
        .reshape(shape)
    )


def adapter(name: str) -> Adapter:
    """An update of every matrix that llama.cpp takes one of, alpha 6."""
    _, modules, ends = FAMILIES[name]
    entries: dict[str, LowRank] = {}
    for i in (0, 1):
        for n, m in enumerate(modules):
            a, b = counted(n + 50 * i, RANK, HIDDEN), counted(3 * n + i, outputs(m), RANK)
            entries[f"model.layers.{i}.{m}.weight"] = LowRank(a, b, 6.0)
    if ends:
        head, table = (f"{end}.weight" for end in ends)
        entries[head] = LowRank(counted(5, RANK, HIDDEN), counted(6, ROWS, RANK), 6.0)
        table_of = counted(7, RANK, ROWS), counted(8, HIDDEN, RANK)
        entries[table] = LowRank(*table_of, 6.0, origin=Origin(op="embedding"))
    return Adapter(entries)


def digest(path: Path) -> str:
    """Names, types, sizes and bytes of all tensors of a GGUF file, and its alpha."""
    reader, whole = GGUFReader(path), hashlib.sha256()
    for t in sorted(reader.tensors, key=lambda t: t.name):
        whole.update(f"{t.name} {t.tensor_type.name} {t.shape.tolist()} ".encode())
        whole.update(t.data.tobytes())
    fields = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    whole.update(repr([reader.fields[f].contents() for f in fields]).encode())
    return whole.hexdigest()[:16]


def main() -> None:
    """Print what llama.cpp's converter writes."""
    script = Path(sys.argv[1]).resolve()
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            (home / "config.json").write_text(json.dumps(config(name)))
            save_adapter(adapter(name), home / "peft")
            out = ["--base", folder, "--outfile", f"{folder}/x.gguf", f"{folder}/peft"]
            run = [sys.executable, str(script), *out]
            subprocess.run(run, check=True, cwd=script.parent, capture_output=True)
            print(f'    "{name}": "{digest(home / "x.gguf")}",', flush=True)


if __name__ == "__main__":
    main()
