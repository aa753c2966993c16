"""llama.cpp's tensor names, by architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import model_config, text_config
from lora_fx.formats.checked_file import File
from lora_fx.formats.rotary_rows import heads_of
from lora_fx.text import JsonView, StrPath

_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
_DENSE = (*_ATTENTION, *(f"mlp.{name}" for name in _MLP))
_EXPERTS = (*_ATTENTION, "mlp.gate", *(f"mlp.experts.{name}" for name in _MLP))
_SHARED = ("mlp.shared_expert_gate", *(f"mlp.shared_expert.{name}" for name in _MLP))
_MIXTRAL = (
    "block_sparse_moe.gate",
    *(f"block_sparse_moe.experts.{name}" for name in ("w1", "w2", "w3")),
)
_LIKE_LLAMA = ("smollm3", "granite", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2")
_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "llama": (*_DENSE, *_MIXTRAL),
    **dict.fromkeys(_LIKE_LLAMA, _DENSE),
    "qwen2moe": (*_EXPERTS, *_SHARED),
    "qwen3moe": _EXPERTS,
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "starcoder2": (*_ATTENTION, "mlp.c_fc", "mlp.c_proj"),
}
"""llama.cpp's architecture → Hugging Face modules of a layer, unchanged but for rows of q, k."""
_MODEL_TYPES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
"""Hugging Face's model_type → llama.cpp's architecture, for names that differ."""
_NEIGHBOURS = ("llama", "smollm3", "granite")
"""Architectures with q and k rows in llama.cpp's order, in which rotary pairs are neighbours."""
HEADS = {"num_attention_heads": "head_count", "num_key_value_heads": "head_count_kv"}
"""A field of config.json → the GGUF header field, after `ARCH.attention.`."""
HEAD = "lm_head"
TABLE = "model.embed_tokens"
OUTSIDE_LAYERS = {HEAD: "output.weight", TABLE: "token_embd.weight"}
"""Hugging Face's module → llama.cpp's tensor."""


@dataclass(frozen=True)
class LlamaCppNames:
    """The names of an architecture's tensors.

    Attributes:
        architecture: llama.cpp's name of it.
        modules: Hugging Face's module of a layer → the tensor's name in blk.N.
        config: config.json of the model, or the fields that a GGUF header has.
        where: The file that has the config, for messages.
    """

    architecture: str
    modules: Mapping[str, str]
    config: JsonView
    where: str

    def turned(self, b: Array, module: str, file: File, order: Callable[..., Array]) -> Array:
        """Return B with its rows reordered, if this is q or k and llama.cpp's order differs."""
        if self.architecture not in _NEIGHBOURS or not module.endswith((".q_proj", ".k_proj")):
            return b
        return order(b, heads_of(module, len(b), self.config, self.where, file))


def names_of_architecture(architecture: str, config: JsonView, where: str) -> LlamaCppNames:
    """Return the names of an architecture or model type; raise for an unknown one."""
    gguf = gguf_package()
    known_names = (*_ARCHITECTURES, *_MODEL_TYPES)
    if architecture not in known_names:
        raise LoraFxError(
            f"{where}: architecture {architecture!r}; lora-fx knows llama.cpp's names for "
            f"{', '.join(known_names)}",
            "save the adapter for PEFT and convert it with llama.cpp's convert_lora_to_gguf.py",
        )
    architecture = _MODEL_TYPES.get(architecture, architecture)
    number_of = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(number_of[architecture], 1)
    modules = {}
    for module in _ARCHITECTURES[architecture]:
        name = table.get_name(f"model.layers.0.{module}")
        modules[module] = f"{name.removeprefix('blk.0.')}.weight"
    return LlamaCppNames(architecture, modules, config, where)


def names_of_base(base: StrPath | None) -> LlamaCppNames | None:
    """Return the names of a base model, from its config.json; None if it has none."""
    if not base:
        return None
    home = Path(base)
    folder = home if home.is_dir() else home.parent
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = model_config(path)
    config = {**config, **text_config(config)}
    return names_of_architecture(str(config.get("model_type")), config, str(path))


def gguf_package() -> ModuleType:
    """Return the package gguf; raise with the installation command if it is missing."""
    try:
        import gguf
    except ImportError as error:
        hint = "pip install 'lora-fx[gguf]'"
        raise LoraFxError("GGUF needs the package gguf, which is not installed", hint) from error
    return gguf
