"""A table of the parameters that releases of transformers rename when they load a file.

A release may rename parameters when it loads a checkpoint, and back when it saves it. An adapter
made on the loaded model then has names that the file has not. A row of `RENAMED` says one such
change; all rows that name a model's type hold, in the order of the table.

* a part of a name is another:  vit.encoder.layer.0.attention.attention.query
                             →  vit.layers.0.attention.q_proj
* experts are one stack each:   mlp.experts.N.gate_proj [I, H] and .up_proj [I, H], N < E
                             →  mlp.experts.gate_up_proj [E, 2I, H], gate's rows first

Facts of transformers 5.24, conversion_mapping.py; the tests compare them with its models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

START = "^"
"""Before a part that is renamed only where it begins the name."""


@dataclass(frozen=True)
class Renamed:
    """Parts of names that models of some types have otherwise than their files.

    Attributes:
        since: The release that renamed them.
        types: model_type of these models.
        parts: Whole parts of a name in the file → in the model, in the order of replacing.
    """

    since: str
    types: tuple[str, ...]
    parts: Mapping[str, str]


@dataclass(frozen=True)
class Stacked:
    """Experts that are one by one in a file and stacks [experts, out, in] in the model.

    Attributes:
        since: The release that stacked them.
        types: model_type of these models, or of their language model.
        leaves: Name of a stack → what the rows of an expert are in the file, from the first to the
            last; one row of names for each spelling.
    """

    since: str
    types: tuple[str, ...]
    leaves: Mapping[str, tuple[tuple[str, ...], ...]]


_VIT = (
    "vit", "deit", "beit", "audio-spectrogram-transformer", "ijepa", "vit_mae", "vit_msn", "vivit",
)  # fmt: skip
_DINO = ("dinov2", "dinov2_with_registers")
_LLAVA = (
    "llava", "llava_next", "llava_next_video", "llava_onevision", "gemma3", "paligemma",
    "mistral3", "internvl", "vipllava", "aya_vision",
)  # fmt: skip

_MOE = (
    "mixtral", "minimax", "minimax_m2", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe",
    "flex_olmo", "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "ernie4_5_moe",
    "hunyuan_v1_moe", "jamba", "exaone_moe",
)  # fmt: skip

RENAMED = (
    Renamed("5", _VIT, {"encoder.layer": "layers"}),
    Renamed(
        "5",
        (*_VIT, *_DINO),
        {
            "attention.attention.query": "attention.q_proj",
            "attention.attention.key": "attention.k_proj",
            "attention.attention.value": "attention.v_proj",
        },
    ),
    Renamed(
        "5",
        ("swin",),
        {
            "attention.self.query": "attention.q_proj",
            "attention.self.key": "attention.k_proj",
            "attention.self.value": "attention.v_proj",
            "attention.self.relative_position_bias_table": (
                "attention.relative_position_bias.relative_position_bias_table"
            ),
        },
    ),
    Renamed("5", (*_VIT, *_DINO, "swin"), {"attention.output.dense": "attention.o_proj"}),
    Renamed(
        "5",
        (*_VIT, "swin"),
        {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"},
    ),
    Renamed(
        "5",
        _LLAVA,
        {
            "^language_model.lm_head": "lm_head",
            "^language_model.model": "model.language_model",
            "^vision_tower.vision_model": "model.vision_tower",
            "^vision_tower": "model.vision_tower",
            "^multi_modal_projector": "model.multi_modal_projector",
            "^image_newline": "model.image_newline",
        },
    ),
    Renamed(
        "5",
        ("qwen2_vl", "qwen2_5_vl"),
        {
            "^visual": "model.visual",
            "^model.embed_tokens": "model.language_model.embed_tokens",
            "^model.layers": "model.language_model.layers",
            "^model.norm": "model.language_model.norm",
        },
    ),
    Renamed(
        "5",
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        {
            "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
            "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
            "block_sparse_moe.router.layer": "block_sparse_moe.router",
        },
    ),
    Renamed("5", ("mixtral", "minimax", "minimax_m2", "phimoe"), {"block_sparse_moe": "mlp"}),
    Renamed("5", ("phimoe",), {"mlp.gate": "mlp.router"}),
    Renamed("5", ("ernie4_5_moe",), {"mlp.moe_statics": "mlp.gate.moe_statics"}),
)

STACKED = (
    Stacked(
        "5",
        _MOE,
        {
            "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
            "down_proj": (("down_proj",), ("w2",)),
        },
    ),
)


def renamed_parts(model_type: object) -> dict[str, str]:
    """Parts of names in the file → in the model of a type; empty where none is renamed.

    >>> renamed_parts("phimoe"), renamed_parts("llama")
    ({'block_sparse_moe': 'mlp', 'mlp.gate': 'mlp.router'}, {})
    """
    parts: dict[str, str] = {}
    for row in RENAMED:
        if model_type in row.types:
            parts |= row.parts
    return parts


def name_in_model(name: str, parts: Mapping[str, str]) -> str:
    """The loaded model's name for a tensor of the file; replaces the first match of each part.

    >>> name_in_model("language_model.model.norm.weight", renamed_parts("llava"))
    'model.language_model.norm.weight'
    """
    for part, renamed in parts.items():
        head, match, tail = f".{name}.".partition(f".{part.removeprefix(START)}.")
        if not match or (head and part.startswith(START)):
            continue
        name = f"{head}.{renamed}.{tail}".strip(".")
    return name


def stacked_experts(types: Iterable[object]) -> tuple[Stacked, ...]:
    """The rows of `STACKED` that hold for a model, by its model_type and those of its parts."""
    model_types = tuple(types)
    return tuple(row for row in STACKED if any(kind in row.types for kind in model_types))
