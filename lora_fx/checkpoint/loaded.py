"""Names in a checkpoint's file and in the loaded model, where transformers 5 has them differ.

It renames parameters when it loads, and back when it saves, so an adapter made on the loaded model
has names that the file has not. Two kinds of it are known here, by model_type:

* a part of a name is another:  vit.encoder.layer.0.attention.attention.query
                             →  vit.layers.0.attention.q_proj
* experts are one stack each:   mlp.experts.N.gate_proj [I, H] and .up_proj [I, H], N < E
                             →  mlp.experts.gate_up_proj [E, 2I, H], gate's rows first

Facts of transformers 5.24, conversion_mapping.py; the tests compare them with its models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_fx.files.safetensors import TensorInfo

_QKV = {f"attention.attention.{n}": f"attention.{n[0]}_proj" for n in ("query", "key", "value")}
_SELF = {f"attention.self.{n}": f"attention.{n[0]}_proj" for n in ("query", "key", "value")}
_DENSE = {
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_VIT = {"encoder.layer": "layers", **_QKV, **_DENSE}
_DINO = {**_QKV, "attention.output.dense": "attention.o_proj"}
_SWIN = {
    **_SELF,
    "attention.self.relative_position_bias_table": (
        "attention.relative_position_bias.relative_position_bias_table"
    ),
    **_DENSE,
}
_LLAVA = {
    "^language_model.lm_head": "lm_head",
    "^language_model.model": "model.language_model",
    "^vision_tower.vision_model": "model.vision_tower",
    "^vision_tower": "model.vision_tower",
    "^multi_modal_projector": "model.multi_modal_projector",
    "^image_newline": "model.image_newline",
}
_QWEN_VL = {
    "^visual": "model.visual",
    "^model.embed_tokens": "model.language_model.embed_tokens",
    "^model.layers": "model.language_model.layers",
    "^model.norm": "model.language_model.norm",
}
_GRANITE_MOE = {
    "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
    "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
    "block_sparse_moe.router.layer": "block_sparse_moe.router",
}
_SPARSE = {"block_sparse_moe": "mlp"}

RENAMED: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        ("vit", "deit", "beit", "audio-spectrogram-transformer", "ijepa", "vit_mae", "vit_msn",
         "vivit"), _VIT,
    ),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINO),
    "swin": _SWIN,
    **dict.fromkeys(
        ("llava", "llava_next", "llava_next_video", "llava_onevision", "gemma3", "paligemma",
         "mistral3", "internvl", "vipllava", "aya_vision"), _LLAVA,
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN_VL),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _GRANITE_MOE),
    **dict.fromkeys(("mixtral", "minimax"), _SPARSE),
    "phimoe": {**_SPARSE, "mlp.gate": "mlp.router"},
    "ernie4_5_moe": {"mlp.moe_statics": "mlp.gate.moe_statics"},
}  # fmt: skip
"""model_type → whole parts of a name in the file → in the model, in the order of replacing.

`^` stands for the start of the name.
"""

STACKED = frozenset(
    ("mixtral", "minimax", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo",
     "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "jamba",
     "exaone_moe")
)  # fmt: skip
"""model_type of models whose experts are apart in the file and stacks in the model."""

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
_GATE_UP = (("gate_proj", "up_proj"), ("w1", "w3"))
_DOWN = (("down_proj",), ("w2",))


@dataclass(frozen=True)
class Part:
    """A matrix of a stack: rows low ≤ i < high of one expert are the whole of a tensor."""

    tensor: str
    expert: int
    low: int
    high: int


@dataclass(frozen=True)
class Stack:
    """A parameter [experts, out, in] of the loaded model whose matrices the file has apart.

    Attributes:
        info: Shape and dtype of the whole; where it lies is where the first matrix does.
        parts: All of its matrices.
    """

    info: TensorInfo
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Loaded:
    """What the loaded model calls the tensors of a file, where it calls them otherwise.

    Attributes:
        names: Name in the model → in the file.
        stacks: Name in the model → its matrices in the file.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        """True for a name that only the loaded model has."""
        return name in self.names or name in self.stacks


def loaded_of(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Loaded:
    """The names of the model that transformers 5 makes of a checkpoint; empty where not known.

    Args:
        tensors: Of the checkpoint.
        config: Its config.json.
    """
    kind, text = config.get("model_type"), config.get("text_config")
    kinds = {kind, text.get("model_type") if isinstance(text, Mapping) else None}
    rules = RENAMED.get(kind, {}) if isinstance(kind, str) else {}
    model = {_renamed(name, rules): name for name in tensors}
    stacks = _stacks(model, tensors) if any(k in STACKED for k in kinds) else {}
    apart = {part.tensor for stack in stacks.values() for part in stack.parts}
    names = {
        new: old
        for new, old in model.items()
        if new != old and new not in tensors and old not in apart
    }
    return Loaded(names, {n: s for n, s in stacks.items() if n not in tensors})


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    for old, new in rules.items():
        start = old.startswith("^")
        lead, found, rest = f".{name}.".partition(f".{old.removeprefix('^')}.")
        if found and not (start and lead):
            name = f"{lead}.{new}.{rest}".strip(".")
    return name


def _stacks(model: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> dict[str, Stack]:
    """Every stack that is whole: equal shapes, experts from 0 on without a gap."""
    lists: dict[str, dict[tuple[str, int], str]] = {}
    for name, stored in model.items():
        match = _EXPERT.fullmatch(name)
        if match:
            lists.setdefault(match[1], {})[match[3], int(match[2])] = stored
    result = {}
    for module, found in lists.items():
        for leaf, ways in (("gate_up_proj", _GATE_UP), ("down_proj", _DOWN)):
            for sources in ways:
                stack = _stack([{i: t for (n, i), t in found.items() if n == s} for s in sources],
                               tensors)  # fmt: skip
                if stack is not None:
                    result[f"{module}.{leaf}"] = stack
    return result


def _stack(sides: list[dict[int, str]], tensors: Mapping[str, TensorInfo]) -> Stack | None:
    """The stack of matrices that lie on each other in the order of `sides`."""
    experts = range(len(sides[0]))
    if not experts or any(set(side) != set(experts) for side in sides):
        return None
    parts, at = [], 0
    for side in sides:
        shapes = {tensors[name].shape for name in side.values()}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
            return None
        parts += [Part(side[i], i, at, at + shape[0]) for i in experts]
        at += shape[0]
    first = tensors[sides[0][0]]
    if any(tensors[p.tensor].shape[1] != first.shape[1] for p in parts):
        return None
    info = replace(first, shape=(len(experts), at, first.shape[1]))
    return Stack(info, tuple(sorted(parts, key=lambda p: (p.expert, p.low))))
