"""An adapter's names and a checkpoint's: what lies between them, and layers that are missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from lora_fx.adapter.adapter import OTHER_READERS, Adapter
from lora_fx.adapter.fused import FUSED, QKV, joined, parent, roles_of, sliced
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry, is_on_base, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.loaded_names import Loaded, Stack, loaded_of
from lora_fx.checkpoint.model_families import CONV1D_NAMES, part_rows
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.files.strict_json import read_json
from lora_fx.formats.peft.config import missing
from lora_fx.targets.names import ENDS, EXACT, NameRule, Names, also_called
from lora_fx.targets.prefix import Prefix, common_prefix
from lora_fx.targets.target import base_name, split_key
from lora_fx.text import JsonView

_EXPERT = re.compile(r"(^|\.)\w*experts\.\d+\.")


@dataclass(frozen=True, eq=False)
class Renaming:
    """What the checkpoint calls the tensors that an adapter names.

    A prefix that the adapter's names have more, or less, than the checkpoint's; then the names of
    the loaded model: rules of `lora_fx.targets.names`. Called with a name of the adapter it gives
    that of the checkpoint.

    Attributes:
        tensors: Those of the checkpoint.
        config: Its config.json.
        loaded: The names of the loaded model.
        prefix: What the adapter's names have before the checkpoint's, or lack.
    """

    tensors: Tensors
    config: JsonView
    loaded: Loaded
    prefix: Prefix

    @cached_property
    def _of_file(self) -> dict[str, str]:
        return {stored: name for name, stored in self.loaded.names.items()}

    @cached_property
    def _names(self) -> Names:
        def read(name: str) -> tuple[str]:
            return (self.prefixed(name),)

        in_model = {stored: (name,) for stored, name in self._of_file.items()}
        return Names(self.tensors, NameRule(readings=read), also_called(in_model, read))

    def __call__(self, name: str) -> str:
        """The checkpoint's name of a tensor; where it has none, the name with its prefix."""
        hits = self._names.find(name)
        return hits[0] if hits else self.prefixed(name)

    def prefixed(self, name: str) -> str:
        """A name of the adapter with the checkpoint's prefix, else as it is."""
        return self.prefix.changed(name)

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
        return self.prefix.back(name)

    def tellers(self, names: Iterable[str]) -> tuple[bool, bool]:
        """Does an adapter have names that only the file has, and some that only the model has?"""
        mine = [self.prefixed(n) for n in names]
        return any(n in self._of_file for n in mine), any(n in self.loaded for n in mine)


def renaming(adapter: Adapter, tensors: Tensors, config: JsonView, notes: list[str]) -> Renaming:
    """The names of the loaded model, and the prefix under which the most names are known."""
    loaded = loaded_of(tensors, config)
    names = [base_name(k) for k in adapter.entries]
    prefix = common_prefix(names, {*tensors, *loaded.names, *loaded.stacks})
    rename = Renaming(tensors, config, loaded, prefix)
    if prefix:
        what = f"without {prefix.more!r}" if prefix.more else f"with {prefix.less!r} before them"
        notes.append(f"the adapter's names are the base's {what}")
    if rename.tellers(names)[1]:
        notes.append(
            "the adapter's names are those of the loaded model: transformers 5 renames the "
            f"parameters of a {config.get('model_type')} when it loads"
        )
    return rename


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


# Fused weights and their parts: which keys of an adapter are of one tensor, and which rows of it.
#
# The base says it by its names, shapes and config, or a file does, in JSON of the ends of names:
#
#     {"attn.qkv_proj": {"attn.q_proj": "0:64", "attn.k_proj": "64:96", "attn.v_proj": "96:128"}}


Roles = tuple[str, ...]
"""The role of a weight; of a fused one those of its parts, in their order."""
Weights = Mapping[Roles, str]
"""Roles → the name of the weight in a module."""
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
    stored = _by_module(name for name, info in base.items() if len(info.shape) == 2)
    modules = Names(stored, EXACT, ENDS)
    result: dict[str, dict[str, str]] = {}
    for module, ours in _by_module(map(base_name, adapter.entries)).items():
        hits = modules.find(module)
        theirs = stored[hits[0]] if len(hits) == 1 else {}
        for roles in FUSED:
            asked = roles in ours if apart else any((role,) in ours for role in roles)
            rows = _rows_by_base(roles, ours, theirs, base, config) if asked else None
            if rows is None:
                continue
            names = {**_usual_names(roles), **theirs, **ours}
            whole = _in_module(module, names[roles])
            parts = {role: _in_module(module, names[role,]) for role in roles}
            result[whole] = {parts[role]: rows.get(role, "") for role in roles}
    return result


def _rows_by_base(
    roles: Roles, ours: Weights, theirs: Weights, base: Tensors, config: JsonView
) -> dict[str, str] | None:
    """Role → its rows in the whole; None where the base has neither that nor all of its parts.

    Args:
        roles: Those of the parts.
        ours: The adapter's names in the module.
        theirs: The base's names in it.
        base: The base's tensors.
        config: Its config.json.
    """
    if roles in theirs:
        name = theirs[roles]
        out, in_ = base[name].shape
        if CONV1D_NAMES.search(name) and out < in_:  # q, k and v are more than in
            out, in_ = in_, out
        return part_rows(name, out, in_, config)
    if any((role,) not in theirs for role in roles):
        return None
    if QKV in ours.get(roles, ""):
        return {}
    ends = [0, *accumulate(base[theirs[role,]].shape[0] for role in roles)]
    return {role: f"{ends[i]}:{ends[i + 1]}" for i, role in enumerate(roles)}


def _usual_names(roles: Roles) -> dict[Roles, str]:
    """What most models call a fused weight and its parts."""
    names: dict[Roles, str] = {(role,): f"{role}_proj.weight" for role in roles}
    names[roles] = "qkv_proj.weight" if "q" in roles else "gate_up_proj.weight"
    return names


def _in_module(module: str, name: str) -> str:
    """The last part of a weight's name, with `.weight` where it has that, in another module."""
    leaf = name[len(parent(name)) :].lstrip(".")
    return f"{module}.{leaf}" if module else leaf


def _by_module(names: Iterable[str]) -> dict[str, dict[Roles, str]]:
    """Module → roles of its weights → the first name that has them."""
    result: dict[str, dict[Roles, str]] = {}
    for name in names:
        result.setdefault(parent(name), {}).setdefault(roles_of(name), name)
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


def _example_of_rows(key: str, parts: Iterable[str], lows: Mapping[str, LowRank]) -> dict[str, str]:
    """What a map could say of the parts of a whole: one after another, as large as is known.

    Args:
        key: The whole.
        parts: The names of its parts.
        lows: Updates of the whole or of parts.
    """
    names = [*parts]
    sizes = [len(lows[name].b) if name in lows else 64 for name in names]
    if key in lows:
        out = len(lows[key].b)
        ends = [out * (i + 1) // len(names) for i in range(len(names))]
    else:
        ends = [*accumulate(sizes)]
    starts = [0, *ends]
    return {
        name.removesuffix(".weight"): f"{start}:{end}"
        for name, start, end in zip(names, starts, ends, strict=False)
    }


def _size(key: str, spans: Mapping[str, str], lows: Mapping[str, LowRank], where: str) -> int:
    """How many rows the whole has: by an update of it, or by one of a part and its rows."""
    if not all(spans.values()):
        example = json.dumps({key.removesuffix(".weight"): _example_of_rows(key, spans, lows)})
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
