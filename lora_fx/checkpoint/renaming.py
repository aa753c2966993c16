"""An adapter's names and a checkpoint's: what lies between them, and layers that are missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from lora_fx.adapter.adapter import OTHER_READERS, Adapter
from lora_fx.adapter.fused import FUSED, QKV, joined, parent, sliced
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry, is_on_base, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.model_families import CONV1D_NAMES, part_rows
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.checkpoint import open_checkpoint, text_config
from lora_fx.files.read import read_json
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.formats.peft.config import missing
from lora_fx.targets.target import base_name, role_by_name, split_key
from lora_fx.text import JsonView, by_key

_EXPERT = re.compile(r"(^|\.)\w*experts\.\d+\.")


@dataclass(frozen=True, eq=False)
class Renaming:
    """What the checkpoint calls the tensors that an adapter names.

    A prefix that the adapter's names have more, or less, than the checkpoint's; then the names of
    the loaded model. Called with a name of the adapter it gives that of the checkpoint.

    Attributes:
        tensors: Those of the checkpoint.
        config: Its config.json.
        loaded: The names of the loaded model.
        more: What the adapter's names have before the checkpoint's.
        less: What the checkpoint's names have before the adapter's.
    """

    tensors: Tensors
    config: JsonView
    loaded: Loaded
    more: str = ""
    less: str = ""

    @cached_property
    def _of_file(self) -> dict[str, str]:
        return {stored: name for name, stored in self.loaded.names.items()}

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

    def info(self, name: str) -> TensorInfo | None:
        """The tensor of an adapter's name; of a stack, its shape and its first matrix."""
        stack = self.stack(name)
        return stack.info if stack else self.tensors.get(self(name))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of that tensor."""
        info = self.info(name)
        return info.shape if info else None

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
    best = Renaming(tensors, config, loaded)
    if not any(n in known for n in names):
        tails = {f".{n}" for n in names}
        leads = {n[: i + 1] for n in names for i, c in enumerate(n) if c == "."}
        tries = [replace(best, more=lead) for lead in sorted(leads)]
        # The ends of a known name that begin after a dot are the names that may lack a prefix.
        ends = {t[: i + 1] for t in known for i, c in enumerate(t) if c == "." and t[i:] in tails}
        tries += [replace(best, less=lead) for lead in sorted(ends)]
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


def absent_of(adapter: Adapter, rename: Renaming) -> dict[str, str]:
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
        names += [low.use, *low.origin.twins]
    adapted = [base_name(name).removesuffix(".weight") for name in names]
    apart = any(_EXPERT.search(name) for name in adapted)
    weights = [n for n, t in rename.tensors.items() if n.endswith(".weight") and len(t.shape) > 1]
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
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _SPARSE),
    "phimoe": {**_SPARSE, "mlp.gate": "mlp.router"},
    "ernie4_5_moe": {"mlp.moe_statics": "mlp.gate.moe_statics"},
}  # fmt: skip
"""model_type → whole parts of a name in the file → in the model, in the order of replacing.

`^` stands for the start of the name.
"""

STACKED = frozenset(
    ("mixtral", "minimax", "minimax_m2", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe",
     "flex_olmo", "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "ernie4_5_moe",
     "hunyuan_v1_moe", "jamba", "exaone_moe")
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


# Fused weights and their parts: which keys of an adapter are of one tensor, and which rows of it.
#
# The base says it by its names, shapes and config, or a file does, in JSON of the ends of names:
#
#     {"attn.qkv_proj": {"attn.q_proj": "0:64", "attn.k_proj": "64:96", "attn.v_proj": "96:128"}}


Rows = Mapping[str, Mapping[str, str]]
"""Key of a whole → key of a part → its rows, as `part_rows` has them; empty where not known."""
_SPAN = re.compile(r"\d{1,6}:\d{1,6}(:[1-9]\d{0,5})?")
_MOST = 10**6
"""Rows that a whole can have."""


def known_rows(adapter: Adapter, base: Tensors, config: JsonView, *, apart: bool) -> Rows:
    """The wholes and parts of an adapter by its base, which has either of them.

    Args:
        adapter: Its keys may have a prefix more, or less, than the base's names.
        base: The base's tensors.
        config: Its config.json.
        apart: Those of which the adapter has the whole; else those of which it has parts.
    """
    homes = _by_parent(n for n, info in base.items() if len(info.shape) == 2)
    longer = by_key((tail, home) for home in homes for tail in _tails(home))
    result: dict[str, dict[str, str]] = {}
    for path, ours in _by_parent(map(base_name, adapter.entries)).items():
        near = [*longer.get(path, ()), *(tail for tail in _tails(path)[1:] if tail in homes)]
        there = homes.get(path) or (homes[near[0]] if len(near) == 1 else {})
        for roles in FUSED:
            whole, rows = str(roles), dict[str, str]()
            if whole not in ours if apart else ours.keys().isdisjoint(roles):
                continue
            if name := there.get(whole):
                out, in_ = base[name].shape
                turned = CONV1D_NAMES.search(name) and out < in_  # q, k and v are more than in
                rows = part_rows(name, *((in_, out) if turned else (out, in_)), config)
            elif not there.keys() >= {*roles}:
                continue
            elif QKV not in ours.get(whole, ""):
                ends = [0, *accumulate(base[there[r]].shape[0] for r in roles)]
                rows = {r: f"{ends[i]}:{ends[i + 1]}" for i, r in enumerate(roles)}
            made = {r: f"{r}_proj.weight" for r in roles}
            made[whole] = "qkv_proj.weight" if "q" in roles else "gate_up_proj.weight"
            names, lead = {**made, **there, **ours}, f"{path}." if path else ""
            keys = {r: lead + names[r][len(parent(names[r])) :].lstrip(".") for r in made}
            result[keys[whole]] = {keys[r]: rows.get(r, "") for r in roles}
    return result


def _tails(path: str) -> list[str]:
    """A path, and its ends after each dot."""
    return [path, *(path[i + 1 :] for i, c in enumerate(path) if c == ".")]


def _by_parent(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Module → role of its weights, or the roles of a fused one as text → name."""
    result: dict[str, dict[str, str]] = {}
    for name in names:
        module = name.removesuffix(".weight")
        fused = next((str(roles) for roles, rule in FUSED.items() if rule.search(module)), "")
        result.setdefault(parent(name), {}).setdefault(fused or role_by_name(module), name)
    return result


def told_rows(adapter: Adapter, told: JsonView, where: str) -> Rows:
    """The same from a file, by names, or their ends from a dot on, without `.weight`.

    Raises:
        LoraFxError: It is no such table.
    """
    result: dict[str, dict[str, str]] = {}
    for whole, parts in told.items():
        good = isinstance(parts, dict) and parts
        if not good or not all(_SPAN.fullmatch(str(v)) for v in parts.values()):
            raise LoraFxError(
                f"{where}: {whole!r} is {one_line(repr(parts), 80)}; expected its parts' rows",
                'as {"attn.qkv": {"attn.q": "0:64", …}}; "0:64:192" are such rows of every 192',
            )
        for key in map(base_name, adapter.entries):
            module = key.removesuffix(".weight")
            name = next((n for n in (whole, *parts) if f".{module}".endswith(f".{n}")), None)
            if name is not None:
                lead, end = module.removesuffix(name), key.removeprefix(module)
                result[f"{lead}{whole}{end}"] = {f"{lead}{p}{end}": v for p, v in parts.items()}
    return result


def refitted(
    adapter: Adapter, base: str | None, fuse: bool, split: bool, table: str | None
) -> tuple[Adapter, list[str]]:
    """An adapter with one update of each whole, or of each part; and what became of which.

    Args:
        adapter: As a loader returned it.
        base: The checkpoint that says which rows are whose, and how large the whole of a region is.
        fuse: Parts, and regions of one tensor, become the whole.
        split: Wholes become parts.
        table: A file that says which rows are whose.

    Raises:
        LoraFxError: Nothing to do, rows that are not known or are no division of the whole, an
            update that is no LoRA or DoRA of a linear layer.
    """
    if fuse == split or not (base or table):
        raise LoraFxError(
            "expected one of --fuse and --split, with --base or --map", "--fuse --base FOLDER"
        )
    opened = open_checkpoint(base) if base else None
    tensors, config = (opened.tensors, opened.config()) if opened else ({}, {})
    if table:
        rows = told_rows(adapter, read_json(table), table)
    else:
        rows = known_rows(adapter, tensors, config, apart=split)
    regions = _regions(adapter, tensors) if fuse else {}
    where = table or str(base)
    entries, said, notes = dict(adapter.entries), list[str](), list[str]()
    read = dict(adapter.metadata.get(OTHER_READERS) or {})
    for key in {**rows, **regions}:
        spans = rows.get(key, {})
        every = {**spans, **regions.get(key, {})}
        mine = {k: entries[k] for k in (key, *(() if split else every)) if k in entries}
        if not mine or (mine.keys() == {key} and not split):
            continue
        lows = {k: _linear(k, entries.pop(k), entries) for k in mine}
        out = _size(key, every, lows, where)
        at = {k: _rows(span, out) for k, span in every.items()} | {key: np.arange(out)}
        covered = np.sort(np.concatenate([at[k] for k in spans or [key]]))
        if not np.array_equal(covered, at[key]):
            raise LoraFxError(
                f"{where}: {key!r} has {out} rows, of which {', '.join(spans)} are no division",
                f"expected each row in one part, and not {json.dumps(spans)}",
            )
        if split:
            parts = {k: sliced(lows[key], at[k]) for k in spans}
            live = {k: p for k, p in parts.items() if p.b.any() or variant_of(p).reads_weight}
            new = live or parts
        else:
            new = {key: joined(key, out, {k: (low, at[k]) for k, low in lows.items()})}
        if taken := entries.keys() & new.keys():
            raise LoraFxError(f"{min(taken)!r} has an update of its own too", "--exclude it")
        entries |= new
        read |= {k: read[name] for name in mine if name in read for k in new}
        old, made = ([f"{k} {every.get(k, '')}".strip() for k in names] for names in (mine, new))
        said.append(f"{', '.join(old)} → {', '.join(made)}")
        first, *others = lows
        scaled = [k for k in others if lows[k].scale != lows[first].scale]
        notes += [f"B of {k!r} is multiplied, in fp32: {first!r} has another scale" for k in scaled]
    if not said:
        what = "the whole" if split else "a part"
        raise LoraFxError(
            f"{where}: the adapter has no update of {what} of a fused weight that is known here",
            "--map FILE names wholes and parts, with the rows of each",
        )
    metadata = {**adapter.metadata, "notes": [*adapter.metadata.get("notes", []), *notes]}
    metadata |= {OTHER_READERS: read} if read else {}
    return replace(adapter, entries=entries, metadata=metadata), said


def _regions(adapter: Adapter, base: Tensors) -> dict[str, dict[str, str]]:
    """Regions of whole rows of a matrix, as parts of it; others stay what they are."""
    result: dict[str, dict[str, str]] = {}
    for key, low in adapter.lowrank.items():
        name, layout = base_name(key), low.layout
        if key.endswith("]") and layout and len(layout.stored) == 2 and name in base:
            (out,), (in_,), shape = layout.out, layout.in_, base[name].shape
            bounds = split_key(key, shape)[1]
            if bounds[in_] == (0, shape[in_]):
                low_, high = bounds[out]
                result.setdefault(name, {})[key] = f"{low_}:{high}:{shape[out]}"
    return result


def _linear(key: str, entry: Entry, others: Mapping[str, Entry]) -> LowRank:
    """An update whose rows can be moved; raises for others."""
    if (bias := f"{key.removesuffix('weight')}bias") in others:
        raise LoraFxError(f"{bias!r} is trained too, and cannot move with {key!r}", "--exclude it")
    if isinstance(entry, LowRank) and is_on_base(entry) and variant_of(entry).rows_apart:
        origin = entry.origin
        odd = origin.kernel or origin.tied or entry.use or origin.op in ("embedding", "experts")
        if entry.a.ndim == 2 and not odd:
            return entry
    raise LoraFxError(
        f"{key!r} is {name_of(entry)}; expected LoRA or DoRA of a linear layer",
        "--as lora --rank R makes LoRA of other methods; --exclude leaves it out",
    )


def _size(key: str, spans: Mapping[str, str], lows: Mapping[str, LowRank], where: str) -> int:
    """How many rows the whole has: by an update of it, or by one of a part and its rows."""
    if not all(spans.values()):
        parts = dict.fromkeys((name.removesuffix(".weight") for name in spans), "0:64")
        example = json.dumps({key.removesuffix(".weight"): parts})
        raise LoraFxError(
            f"{where}: which rows of {key!r} are whose is not known", f"--map FILE, as {example}"
        )
    numbers = {k: [*map(int, span.split(":"))] for k, span in spans.items()}
    name, low = next(iter(lows.items()))
    first, last, *period = numbers.get(name, (0, len(low.b)))
    if name != key and not period:
        return max(high for _, high, *_ in numbers.values())
    return min(_MOST, (period or [last])[0] * len(low.b) // max(1, last - first))


def _rows(span: str, out: int) -> Array:
    low, high, period = (int(n) for n in f"{span}:{max(1, out)}".split(":")[:3])
    at = np.arange(out)
    return at[(low <= at % period) & (at % period < high)]
