"""An adapter's names and a checkpoint's: what lies between them, and layers that are missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lora_fx.adapter.adapter import Adapter
from lora_fx.files.checkpoint import text_config
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.formats.peft.config import missing
from lora_fx.targets.target import base_name
from lora_fx.text import JsonView

_EXPERT = re.compile(r"(^|\.)\w*experts\.\d+\.")


class Renaming:
    """What the checkpoint calls the tensors that an adapter names.

    A prefix that the adapter's names have more, or less, than the checkpoint's; then the names of
    the loaded model. Called with a name of the adapter it gives that of the checkpoint.
    """

    def __init__(self, more: str = "", less: str = "", loaded: Loaded | None = None) -> None:
        self.more, self.less, self.loaded = more, less, loaded or Loaded()
        self._of_file = {stored: name for name, stored in self.loaded.names.items()}

    def __call__(self, name: str) -> str:
        """The checkpoint's name of a tensor."""
        name = self.prefixed(name)
        return self.loaded.names.get(name, name)

    def prefixed(self, name: str) -> str:
        """A name of the adapter with the checkpoint's prefix, else as it is."""
        return self.less + name.removeprefix(self.more)

    def stack(self, name: str) -> Stack | None:
        """The matrices that the checkpoint has instead of one tensor of this name."""
        return self.loaded.stacks.get(self.prefixed(name))

    def info(self, name: str, tensors: Tensors) -> TensorInfo | None:
        """The tensor of an adapter's name; of a stack, its shape and its first matrix."""
        stack = self.stack(name)
        return stack.info if stack else tensors.get(self(name))

    def back(self, name: str, *, loaded: bool = False) -> str:
        """The adapter's name of a tensor of the checkpoint, or of the model that loads it."""
        if loaded:
            name = self._of_file.get(name, name)
        return self.more + name.removeprefix(self.less)

    def tellers(self, names: Iterable[str]) -> tuple[bool, bool]:
        """Does an adapter have names that only the file has, and some that only the model has?"""
        mine = [self.prefixed(n) for n in names]
        return any(n in self._of_file for n in mine), any(n in self.loaded for n in mine)


def renaming(adapter: Adapter, tensors: Tensors, config: JsonView, notes: list[str]) -> Renaming:
    """The names of the loaded model, and the prefix under which the most names are known.

    There is no prefix where names are known as they are. A model saved by its inner class lacks
    the outer's prefix (`bert.`), a component of a pipeline its own (`unet.`), and the reverse.
    """
    loaded = loaded_of(tensors, config)
    known = {*tensors, *loaded.names, *loaded.stacks}
    names = [base_name(k) for k in adapter.entries]
    best = Renaming(loaded=loaded)
    if not any(n in known for n in names):
        tails = {f".{n}" for n in names}
        leads = {n[: i + 1] for n in names for i, c in enumerate(n) if c == "."}
        tries = [Renaming(lead, "", loaded) for lead in sorted(leads)]
        # The ends of a known name that begin after a dot are the names that may lack a prefix.
        ends = {t[: i + 1] for t in known for i, c in enumerate(t) if c == "." and t[i:] in tails}
        tries += [Renaming("", lead, loaded) for lead in sorted(ends)]
        hits = {
            t: sum(n.startswith(t.more) and t.prefixed(n) in known for n in names) for t in tries
        }
        most = max(hits.values(), default=0)
        winners = [t for t in tries if hits[t] == most]
        if most and len(winners) == 1:
            best = winners[0]
            what = f"without {best.more!r}" if best.more else f"with {best.less!r} before them"
            notes.append(f"the adapter's names are the base's {what}")
    if best.tellers(names)[1]:
        notes.append(
            "the adapter's names are those of the loaded model: transformers 5 renames the "
            f"parameters of a {config.get('model_type')} when it loads"
        )
    return best


def absent_of(adapter: Adapter, tensors: Tensors, rename: Renaming) -> dict[str, str]:
    """{module of the base that PEFT would have adapted and the adapter lacks: by which entry}.

    PEFT compares target_modules with the names of the model that it was given, which are the
    file's, or those that transformers 5 makes of them. Where the adapter's own names do not tell
    which, a module counts only if both say so. Experts that the file has one by one may have been
    stacks there, and no modules; they count where the adapter has an update of one.
    """
    config = adapter.metadata.get("peft")
    if not isinstance(config, Mapping):
        return {}
    names = list(adapter.entries)
    for low in adapter.lowrank.values():  # other names of the same tensor
        names += [low.use, *low.twins]
    adapted = [base_name(name).removesuffix(".weight") for name in names]
    apart = any(_EXPERT.search(name) for name in adapted)
    weights = [n for n, t in tensors.items() if n.endswith(".weight") and len(t.shape) > 1]
    weights = [n for n in weights if apart or not _EXPERT.search(n)]
    of_file, of_model = rename.tellers(map(base_name, names))
    answers = []
    for loaded in (False, True):
        if of_file != of_model and loaded == of_file:
            continue  # the adapter's own names tell
        modules = {
            rename.back(n, loaded=loaded).removesuffix(".weight"): n.removesuffix(".weight")
            for n in weights
        }
        lost = missing(config, modules, adapted)
        answers.append({modules[m]: entry for m, entry in lost.items()})
    return {m: entry for m, entry in answers[0].items() if all(m in a for a in answers)}


# Names in a checkpoint's file and in the loaded model, where transformers 5 has them differ.
#
# It renames parameters when it loads, and back when it saves, so an adapter made on the loaded
# model has names that the file has not. Two kinds of it are known here, by model_type:
#
# * a part of a name is another:  vit.encoder.layer.0.attention.attention.query
#                              →  vit.layers.0.attention.q_proj
# * experts are one stack each:   mlp.experts.N.gate_proj [I, H] and .up_proj [I, H], N < E
#                              →  mlp.experts.gate_up_proj [E, 2I, H], gate's rows first
#
# Facts of transformers 5.24, conversion_mapping.py; the tests compare them with its models.


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

_EXPERT_WEIGHT = re.compile(r"(.+\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
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


def loaded_of(tensors: Tensors, config: JsonView) -> Loaded:
    """The names of the model that transformers 5 makes of a checkpoint; empty where not known.

    Args:
        tensors: The checkpoint's tensors.
        config: Its config.json.
    """
    kind, inner = config.get("model_type"), text_config(config).get("model_type")
    rules = RENAMED.get(kind, {}) if isinstance(kind, str) else {}
    model = {_renamed(name, rules): name for name in tensors}
    stacks = _stacks(model, tensors) if kind in STACKED or inner in STACKED else {}
    apart = {part.tensor for stack in stacks.values() for part in stack.parts}
    names = {new: old for new, old in model.items() if new != old and new not in tensors}
    names = {new: old for new, old in names.items() if old not in apart}
    return Loaded(names, {n: s for n, s in stacks.items() if n not in tensors})


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    for old, new in rules.items():
        start = old.startswith("^")
        lead, found, rest = f".{name}.".partition(f".{old.removeprefix('^')}.")
        if found and not (start and lead):
            name = f"{lead}.{new}.{rest}".strip(".")
    return name


def _stacks(model: Mapping[str, str], tensors: Tensors) -> dict[str, Stack]:
    """Every stack that is whole: equal shapes, experts from 0 on without a gap."""
    lists: dict[str, dict[tuple[str, int], str]] = {}
    for name, stored in model.items():
        match = _EXPERT_WEIGHT.fullmatch(name)
        if match:
            lists.setdefault(match[1], {})[match[3], int(match[2])] = stored
    result = {}
    for module, found in lists.items():
        for leaf, ways in (("gate_up_proj", _GATE_UP), ("down_proj", _DOWN)):
            for sources in ways:
                sides = [{i: t for (n, i), t in found.items() if n == s} for s in sources]
                stack = _stack(sides, tensors)
                if stack is not None:
                    result[f"{module}.{leaf}"] = stack
    return result


def _stack(sides: list[dict[int, str]], tensors: Tensors) -> Stack | None:
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
