"""Adapters as PEFT stores them: adapter_config.json beside adapter_model.safetensors.

ΔW of a module X is s · B · A with s = lora_alpha / r, or lora_alpha / √r with use_rslora; the rank
and alpha of single modules come from rank_pattern and alpha_pattern. Modules of modules_to_save
are stored whole under their own names. With use_dora the rows of W + s · B · A (in [out, in]
order, see `lora_fx.adapter.variant`) get the norms lora_magnitude_vector. Checked against peft
0.21.2.

What PEFT cannot say (parts of a tensor, stacks, parameters that are no `.weight`) goes into the
same file under names that PEFT passes over, and is described, with the layouts of all updates,
by JSON under `lora_fx` in the header. Files without that JSON are read as PEFT reads them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_fx import regexes
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import FileLayer, Origin
from lora_fx.adapter.qalora import grouped
from lora_fx.adapter.updates import Dense, Entry, ReplacedRows, from_json
from lora_fx.adapter.variant import (
    bare,
    expect_variant,
    fields_of_files,
    named_variant,
    with_values,
)
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, check_format, one_line
from lora_fx.files.strict_json import json_object, read_json
from lora_fx.files.tensor_files import is_float, read_tensors, write_tensors
from lora_fx.formats import lycoris
from lora_fx.formats.base import PeftFile, holds, metadata_text
from lora_fx.formats.format import FileHead, Format
from lora_fx.formats.peft import config as fields
from lora_fx.formats.peft.names import (
    DELTA,
    OWN,
    PREFIX,
    WRAPPER,
    Group,
    candidates,
    from_tensors,
    groups,
    one_stack,
    read_stacks,
    split_name,
    unknown_name,
    unwrapped,
)
from lora_fx.formats.peft.write import encode
from lora_fx.text import Json, JsonView, is_whole

_OUT = f".{WRAPPER}.out_proj"
_BESIDE = {
    "magnitude": ("lora_magnitude_vector", "DoRA", "use_dora"),
    "diagonal": ("lora_diag", "KaSA", "kasa_config"),
}
"""Parts of a layer: the tensor's name, what it is of, and the field that calls for it."""


def decode(source: PeftFile, ours: JsonView) -> Adapter:
    """The adapter of one file with peft_type LORA.

    Args:
        source: The file; its notes become the adapter's.
        ours: The JSON under `lora_fx` in its header; empty for files of PEFT.
    """
    tensors, config, file, notes = source.tensors, source.config, source.name, source.notes
    notes += fields.check_config(config, source.config_file)
    reader = _Reader(source)
    if ours:
        check_format(ours, f"{file}: metadata lora_fx")
    described, told = (ours.get("entries"), ours.get("metadata")) if ours else ({}, {})
    if not isinstance(described, dict) or not isinstance(told, dict):
        raise LoraFxError(f"{file}: metadata lora_fx is damaged", "convert the adapter again")
    metadata = dict(told)
    entries: dict[str, Entry] = {}
    own_entries(described, reader, groups(tensors, file), entries)
    left = {name: value for name, value in tensors.items() if name not in reader.taken}
    reader.theirs(left, entries)
    for pattern in (reader.ranks, reader.alphas):
        notes += pattern.notes()
    whole = [k.rpartition(".")[0] for k, entry in entries.items() if isinstance(entry, Full)]
    listed = dict.fromkeys(fields.listed_whole(config))
    there = {n for n in listed for m in whole if fields.saved_whole({"modules_to_save": [n]}, m)}
    heads = {*fields.heads_of(config)}
    unsaid = heads if there & heads or not config.get("modules_to_save") else set()
    for module in (m for m in listed if m not in there | unsaid):
        notes.append(f"{file}: modules_to_save {module!r} has no tensor in the file")
    metadata |= fields.target_facts(config, reader.modules, file, notes)
    if ours:  # which names each update, and the config names modules in full
        del metadata["peft"]
        if config.get(fields.VERSION):
            metadata["peft"] = {fields.VERSION: config[fields.VERSION]}
    metadata |= {field: config[field] for field in fields.ORIGIN if config.get(field)}
    if config.get("fan_in_fan_out"):
        metadata["fan_in_fan_out"] = True
    kept = metadata.get("dropout") if config.get("target_parameters") else 0.0  # PEFT wants it 0
    metadata["dropout"] = float(config.get("lora_dropout") or kept or 0.0)
    metadata["notes"] = notes
    return Adapter(entries, metadata)


class _Reader:
    """Reads the updates of one file.

    Attributes:
        source: The file.
        ranks: r and rank_pattern.
        alphas: lora_alpha and alpha_pattern.
        variant: lora or rslora.
        modules: Names of the modules with low-rank tensors, as PEFT compares them.
        taken: Names of the tensors that our JSON describes.
    """

    def __init__(self, source: PeftFile) -> None:
        """Compile the patterns."""
        config = source.config
        self.source, self.config, self.file = source, config, source.name
        self.ranks = fields.Pattern(config, "rank_pattern", "r", source.config_file)
        self.alphas = fields.Pattern(config, "alpha_pattern", "lora_alpha", source.config_file)
        self.variant = "rslora" if config.get("use_rslora") else "lora"
        self.modules: list[str] = []
        self.taken: set[str] = set()

    def theirs(self, tensors: Mapping[str, Array], entries: dict[str, Entry]) -> None:
        """Everything that our JSON does not describe, as PEFT would apply it."""
        found = groups(tensors, self.file)
        for lead, group in self._twins(found).items():
            outer = unwrapped(lead)
            if self._is_stacked(outer):
                if not lead.endswith(f".{WRAPPER}"):
                    deeper = (lead + f".{WRAPPER}" * i for i in itertools.count())
                    levels = [found[n] for n in itertools.takewhile(found.__contains__, deeper)]
                    stacks = read_stacks(levels, self.source, self.ranks, self.alphas, self.variant)
                    self.modules.append(outer)
                    for key, low in stacks.items():
                        self.source.add(entries, key, low, group.names["a"])
                elif lead.removesuffix(f".{WRAPPER}") not in found:
                    raise self._nested(group)
                continue
            self._check_place(group, found)
            key = f"{outer}.weight"
            if f"{lead}{_OUT}" in found:
                key = f"{outer}.in_proj_weight"
            low = self.update(group, found)
            self.source.add(entries, key, low, group.names["a"])
            self.bias(entries, low, group)
        names = {n for g in found.values() for n in g.names.values()}
        rest = [n for n in tensors if n not in names]
        read_rest(rest, self.source, found, entries)

    def update(self, group: Group, found: Mapping[str, Group]) -> LowRank:
        """The update of one layer in PEFT's shapes."""
        a_name = group.names["a"]
        halves = ((half, self.source.factor(group.names[half])) for half in "ab")
        a, b = (fields.whole_factor(self.config, group.module, *half, self.file) for half in halves)
        a, b, op, kernel = from_tensors(group.kind, a, b, f"{self.file}: {a_name!r}")
        seen = unwrapped(group.lead.removesuffix(_OUT))  # PEFT wraps out_proj inside
        attention = f"{group.lead.removesuffix(_OUT)}{_OUT}" in found
        self.modules.append(seen)
        if not (fields.targets(self.config, group.module) or fields.targets(self.config, seen)):
            raise LoraFxError(
                f"{self.file}: {a_name!r} is of a module that target_modules leaves out; PEFT "
                "would drop it",
                f"correct target_modules in {self.source.config_file}",
            )
        rank, alpha = self.ranks.of(seen), self.alphas.of(seen)
        if rank is not None and rank != a.shape[-2]:
            raise LoraFxError(
                f"{self.file}: {a_name!r} has rank {a.shape[-2]}; expected {rank:g}, as "
                f"{self.source.config_file} says: the scale would be in doubt",
                "correct r or rank_pattern",
            )
        assert alpha is not None  # check_config saw lora_alpha
        if attention and group.lead.endswith(_OUT):
            alpha *= 2  # PEFT adds this update twice, in training and in merging
        mutated = self._mutated(group, plain=not (attention or kernel))
        length = self._beside(group, "magnitude", on=bool(self.config.get("use_dora")))
        between = self._beside(group, "diagonal", on=mutated == "kasa")
        if between is not None:
            a = a * self.source.numbers(between, len(a))[:, None]
        layer = FileLayer(group.lead) if attention else None
        low = LowRank(
            a,
            b,
            alpha,
            None,
            self.variant,
            magnitude=None if length is None else self.source.numbers(length, len(b)),
            mutated=mutated,
            origin=Origin(op, kernel, bool(group.tied), tuple(group.tied), layer),
        )
        # PEFT pools the inputs of GPTQ's linear layers alone, and ignores the flag at all others
        if group.kind != "linear" or attention:
            return low
        size = fields.group_of(self.config, low.a, f"{self.file}: {group.names['a']!r}")
        return grouped(low, size) if size else low

    def _mutated(self, group: Group, *, plain: bool) -> str:
        """How PEFT changed the base of an update; raises where it changes none of that kind."""
        changed = fields.mutation(self.config)
        if not changed or group.kind == "embedding":
            return ""  # PEFT leaves embeddings as they are
        if not plain:
            raise LoraFxError(
                f"{self.file}: {group.names['a']!r} is of an attention module or a convolution; "
                f"expected a linear layer, as its start is {changed!r}",
                "correct the config to what the adapter was trained with",
            )
        return changed

    def _beside(self, group: Group, part: str, *, on: bool) -> str | None:
        """The name of a tensor that a field of the config calls for, where that is on."""
        name, (tensor, kind, field) = group.names.get(part), _BESIDE[part]
        if on and name is None:
            raise LoraFxError(
                f"{self.file}: {group.names['a']!r} has no {tensor} beside it; expected one, as "
                f"{field} is on in {self.source.config_file}",
                f"PEFT would start one of its own; correct {field} or save again",
            )
        if name is not None and not on:
            raise LoraFxError(
                f"{self.file}: {name!r} is of {kind}; expected none, as {field} is off in "
                f"{self.source.config_file}: PEFT would drop it and the result would differ",
                f"turn {field} on if the adapter was trained with it",
            )
        return name

    def bias(self, entries: dict[str, Entry], low: LowRank, group: Group) -> None:
        """The bias of B, which PEFT adds times the scale to the layer's own."""
        name, wanted = group.names.get("bias"), bool(self.config.get("lora_bias"))
        if (name is not None) != wanted and group.kind == "linear":
            have = repr(name) if name else f"{group.names['b']!r} without a bias"
            raise LoraFxError(
                f"{self.file}: {have}; expected {'one' if wanted else 'no bias of B'}, as "
                f"lora_bias is {str(wanted).lower()} in {self.source.config_file}",
                "set lora_bias to what the adapter was trained with",
            )
        if name is None:
            return
        value, scale = self.source.numbers(name, len(low.b)), low.scale
        if group.lead.endswith(_OUT):
            scale /= 2  # the update is added twice, its bias once
        elif low.origin.layer:
            self.source.notes.append(f"{self.file}: {name!r} is not read; PEFT does not apply it")
            return
        key = f"{group.module}.bias"
        trained = entries.get(key)
        if isinstance(trained, Full):  # PEFT adds the bias of B to the trained one
            entries[key] = replace(trained, value=trained.value + np.float32(scale) * value)
            return
        self.source.add(entries, key, Dense(value, scale), name)

    def _twins(self, found: dict[str, Group]) -> dict[str, Group]:
        """The layers, without heads that ensure_weight_tying keeps equal to an embedding.

        PEFT writes such a head as a pair of its own, A = Bᵀ and B = Aᵀ of the embedding. It is one
        update of one tensor, so the embedding's is kept and `twins` names the head. (In
        peft 0.21.2 merge_and_unload adds it twice, unlike its own forward.)
        """
        if not self.config.get("ensure_weight_tying"):
            return found
        result = dict(found)
        for lead, group in found.items():
            tables = (t for t in found.values() if t.kind == "embedding" and self._turned(group, t))
            head = group.kind == "linear" and not fields.targets(self.config, group.module)
            if head and (table := next(tables, None)):
                table.tied.append(f"{group.module}.weight")
                self.modules.append(group.module)
                del result[lead]
        return result

    def _turned(self, head: Group, table: Group) -> bool:
        a, b = (self.source.tensors[head.names[half]] for half in "ab")
        c, d = (self.source.tensors[table.names[half]] for half in "ab")
        return set(head.names) == {"a", "b"} and np.array_equal(a.T, d) and np.array_equal(b.T, c)

    def _is_stacked(self, module: str) -> bool:
        """True for a module whose parameters are targets; PEFT lets no module be one as well."""
        listed = self.config.get("target_modules") not in (None, "all-linear")
        own = listed and fields.targets(self.config, module)
        return not own and bool(candidates(self.config, module))

    def _check_place(self, group: Group, found: Mapping[str, Group]) -> None:
        """Raise for a layer inside a wrapper that is none of PEFT's known ones."""
        parts = group.lead.split(".")
        for at in [i for i, part in enumerate(parts) if part == WRAPPER]:
            around = ".".join(parts[:at])
            stack = self._is_stacked(unwrapped(around))
            attention = group.lead == f"{around}{_OUT}" and around in found
            if not (stack or attention) or at == len(parts) - 1:
                raise self._nested(group)

    def _nested(self, group: Group) -> LoraFxError:
        return LoraFxError(
            f"{self.file}: {group.names['a']!r} is nested in another layer of PEFT's; expected one "
            "that target_parameters or a MultiheadAttention explains",
            f"correct target_parameters in {self.source.config_file}, or merge it into its model "
            "with PEFT (merge_and_unload)",
        )


# What a PEFT file holds beside low-rank tensors: trained tokens, biases, whole modules.
#
# * `X.token_adapter.trainable_tokens_delta` [n, dim] holds rows of X's weight as trained (not what
#   is added to them); their numbers are in trainable_token_indices of the config.
# * `X.base_layer.bias` and plain `Y.bias` are trained biases of the base where bias is lora_only
#   or all; PEFT adds s · (bias of B) to them where lora_bias is on as well.
# * `Y.…` under no other name is a module of modules_to_save, whole.


def read_rest(
    names: Iterable[str], source: PeftFile, found: Mapping[str, Group], entries: dict[str, Entry]
) -> None:
    """Add what these tensors say to `entries`.

    Args:
        names: The names of tensors that belong to no low-rank layer.
        source: The file.
        found: Its low-rank layers.
        entries: Those of the layers; biases of B may get the trained bias beneath them.

    Raises:
        LoraFxError: A tensor that PEFT would not read, or that the config contradicts.
    """
    idle = [f".{part}" for field, (part, _) in fields.TRAINS.items() if source.config.get(field)]
    for name in names:
        short = name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
        if any(part in short for part in idle):
            continue
        if short.endswith(DELTA):
            module = short.removesuffix(DELTA)
            source.add(entries, f"{unwrapped(module)}.weight", _rows(name, module, source), name)
        elif short.endswith(".bias") and _is_trained_bias(short, source, found):
            # PEFT trains such a bias where it is, so all names of a shared one
            full = replace(source.full(name), tied=True)
            _add_bias(entries, unwrapped(short), full, name, source)
        elif _is_whole(name, short, source, bool(found)):
            # PEFT asked to save embeddings writes a trained one twice, under its wrapper as well.
            key = short.replace(".modules_to_save.", ".")
            # PEFT writes an unlisted one into the model's own tensor, which may have other names
            listed = fields.saved_whole(source.config, short.rpartition(".")[0])
            full, old = replace(source.full(name), tied=not listed), entries.get(key)
            if not isinstance(old, Full) or not np.array_equal(old.value, full.value):
                source.add(entries, key, full, name)
    _check_tokens(source, entries)


def _is_trained_bias(short: str, source: PeftFile, found: Mapping[str, Group]) -> bool:
    """True for a bias that PEFT trained; raises for one that the config denies."""
    bias = source.config.get("bias") or "none"
    module = short.removesuffix(".bias")
    if ".lora_" in short or ".original_module." in short or ".modules_to_save." in short:
        return False
    if not module.endswith(f".{WRAPPER}"):
        wrapped = any(g.module == module for g in found.values())
        return bias == "all" or (bias == "lora_only" and wrapped)
    if bias == "none":
        if f"{PREFIX}{module}.weight" in source.tensors:
            return False  # a copy of the whole frozen layer
        raise LoraFxError(
            f"{source.name}: {PREFIX + short!r} is a trained bias of the base; expected none, as "
            f"bias is 'none' in {source.config_file}",
            "set bias to what the adapter was trained with",
        )
    return True


def _add_bias(entries: dict[str, Entry], key: str, full: Full, name: str, source: PeftFile) -> None:
    old = entries.get(key)
    if isinstance(old, Dense):  # lora_bias: PEFT adds it to the trained bias, in this order
        entries[key] = replace(full, value=full.value + old.value * np.float32(old.scale))
    elif isinstance(old, Full) and np.array_equal(old.value, full.value):
        return  # of a module that is saved whole as well
    else:
        source.add(entries, key, full, name)


def _rows(name: str, module: str, source: PeftFile) -> ReplacedRows:
    """Trained rows with their numbers."""
    value = source.factor(name)
    config = source.config.get("trainable_token_indices")
    if not config:
        raise LoraFxError(
            f"{source.name}: {name!r} holds rows of an embedding; expected their numbers in "
            f"trainable_token_indices of {source.config_file}",
            "put the config of this very adapter beside the file",
        )
    index = config
    if isinstance(config, dict):
        fits = [v for k, v in config.items() if unwrapped(module).endswith(k)]
        index = fits[0] if fits and all(f == fits[0] for f in fits) else None
    if (
        not isinstance(index, list)
        or not all(is_whole(i) and i >= 0 for i in index)
        or len(set(index)) != len(index)
        or value.shape[:1] != (len(index),)
        or value.ndim != 2
    ):
        raise LoraFxError(
            f"{source.name}: {name!r} is {list(value.shape)} and trainable_token_indices gives "
            f"{index!r} for it; expected [n, dim] and n different numbers",
            f"correct {source.config_file}",
        )
    return ReplacedRows(tuple(index), value)


def _check_tokens(source: PeftFile, entries: Mapping[str, Entry]) -> None:
    """Raise for tokens in the config that no tensor holds; PEFT stores tied ones once."""
    config = source.config.get("trainable_token_indices")
    if not config:
        return
    rows = [list(e.index) for e in entries.values() if isinstance(e, ReplacedRows)]
    if isinstance(config, dict):
        lost = [v for v in config.values() if v not in rows]
    else:
        lost = [] if rows else [config]
    if lost:
        raise LoraFxError(
            f"{source.config_file}: trainable_token_indices gives {lost[0]!r}; expected a tensor "
            f"X{DELTA} for them in {source.name}",
            "the file is incomplete; save or fetch it again",
        )


_ANY_HEAD = {"modules_to_save": [name for names in fields.HEADS.values() for name in names]}


def _is_whole(name: str, short: str, source: PeftFile, low_rank: bool) -> bool:
    """True for a whole tensor to keep, False for one that is noted; raises for others."""
    module = short.rpartition(".")[0]
    value = source.tensors[name]
    outer = module.removesuffix(f".{WRAPPER}")
    frozen = outer != module and any(n.startswith(f"{PREFIX}{outer}.lora_") for n in source.tensors)
    if frozen or ".original_module." in short:
        # PEFT stores the frozen embedding again when the embedding is a target.
        source.notes.append(f"{source.name}: {name!r} is a copy of the base weight; not read")
        return False
    if not name.startswith(OWN) and ".lora_" not in short and module:
        if fields.saved_whole(source.config, module):
            return True
        table = value.ndim == 2 and short.endswith(".weight")
        if low_rank and (table or fields.saved_whole(_ANY_HEAD, module)):
            # PEFT stores resized embeddings and heads so, without listing them, beside updates.
            source.notes.append(f"{source.name}: {name!r} replaces a whole tensor of the model")
            return True
    raise unknown_name(name, source.name)


# Our own JSON in the header of an adapter file: what PEFT's names and config do not say.
#
# `{"version": 1, "format": 1, "metadata": {…}, "entries": {key: …}}`, one object for each entry:
#
# * `{"a", "b", "layout", "use", "extra"}`: a low-rank update. Rank, alpha and variant come from the
#   config where the tensors have PEFT's names, since people edit it; else they are here, with
#   "magnitude" for DoRA. "swapped" says that a is Bᵀ and b is Aᵀ.
# * `{"full"}`, `{"dense", "scale", "layout", "extra"}`, `{"rows", "index"}`: names of tensors.


def own_entries(
    rows: JsonView, reader: _Reader, found: Mapping[str, Group], entries: dict[str, Entry]
) -> None:
    """Add the entries that our JSON describes, and biases of B beside them.

    Args:
        rows: key → object.
        reader: The file's reader.
        found: PEFT's layers in it.
        entries: Get them.
    """
    layers: list[tuple[LowRank, Group]] = []
    for key, row in rows.items():
        try:
            entry, group = _one(key, row, reader, found)
            fits = not isinstance(entry, LowRank) or holds(entry.layout, entry.shape)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise LoraFxError(
                f"{reader.file}: metadata lora_fx does not fit the tensors at {key!r}: "
                f"{type(error).__name__} {one_line(error)}",
                "the file was edited; save the adapter again",
            ) from error
        if isinstance(entry, LowRank) and not fits:
            raise LoraFxError(
                f"{reader.file}: {key!r} has A {list(entry.a.shape)} and B {list(entry.b.shape)}; "
                f"expected those of its layout {row['layout']}",
                "the file was edited; save the adapter again",
            )
        entries[key] = entry
        if isinstance(entry, LowRank) and group is not None:
            layers.append((entry, group))
    for low, group in layers:  # once every trained bias is there
        reader.bias(entries, low, group)


def _one(
    key: str, row: JsonView, reader: _Reader, found: Mapping[str, Group]
) -> tuple[Entry, Group | None]:
    """The entry of one object, and the layer of PEFT's that it was read from."""
    source, taken = reader.source, reader.taken
    for kind in ("full", "dense", "rows"):
        if kind in row:
            name = row[kind]
            taken.add(name)
            whole = source.full(name)
            if kind == "full":
                twins = row.get("tied", True)  # files without it meant all uses
                if isinstance(twins, list):
                    taken.update(PREFIX + twin for twin in twins)
                    return replace(whole, tied=bool(twins), twins=tuple(twins)), None
                return replace(whole, tied=bool(twins)), None
            if not is_float(source.tensors[name]):
                raise ValueError(f"{name!r} has no float dtype")
            value = np.ascontiguousarray(whole.value, np.float32)
            if kind == "rows":
                index = tuple(int(i) for i in row["index"])
                if len(index) != len(value):
                    raise ValueError(f"{len(index)} rows, {len(value)} in {name!r}")
                return ReplacedRows(index, value), None
            return from_json(Dense(value), row), None
    named = str(row.get("variant", reader.variant))
    expect_variant(named, f"{source.name}: the update of {key!r}")
    if not named_variant(named).peft_type:
        stored = {field: str(row[field]) for field in fields_of_files() if field in row}
        taken.update(stored.values())
        values = {f: source.master(name, source.tensors[name]) for f, name in stored.items()}
        return with_values(from_json(bare(values, row), row), values), None
    names = (str(row["a"]), str(row["b"]))
    group = None
    if names[0].startswith(OWN):
        taken.update(names)
        low = _pair(source, names, row, taken)
    else:
        split = split_name(names[0].removeprefix(PREFIX))
        if split is None:
            raise ValueError(f"{names[0]!r} is no name of an A")
        group = found[split[0]]
        taken.update(group.names.values())
        batch = (row["layout"] or {}).get("batch")
        # the end of its name may be that of another one's parameter: h.h.weight beside h.weight
        modules = source.config.get("target_modules")
        listed = isinstance(modules, list) and group.module in modules
        if batch or (not listed and "weight" in candidates(source.config, group.module)):
            low = one_stack(key, group, source, reader.ranks, reader.alphas)
            low = replace(low, variant=reader.variant)
            low = low if batch else replace(low, a=low.a[0], b=low.b[0])
            reader.modules.append(group.module)
        else:
            low = reader.update(group, found)
    if row.get("swapped"):
        low = replace(low, a=np.ascontiguousarray(low.b.T), b=np.ascontiguousarray(low.a.T))
    told = from_json(low, row)
    return replace(told, mutated=low.mutated or told.mutated), group


def _pair(source: PeftFile, names: tuple[str, str], entry: JsonView, taken: set[str]) -> LowRank:
    """An update under names of our own."""
    a, b = (source.factor(name) for name in names)
    if a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
        raise LoraFxError(
            f"{source.name}: {names[0]!r} is {list(a.shape)} and {names[1]!r} is "
            f"{list(b.shape)}; expected [*batch, r, in] and [*batch, out, r]",
            "save the adapter again",
        )
    magnitude = None
    if "magnitude" in entry:
        taken.add(entry["magnitude"])
        size = math.prod(b.shape[:-1])
        magnitude = source.numbers(entry["magnitude"], size).reshape(b.shape[:-1])
    return LowRank(a, b, float(entry["alpha"]), None, str(entry["variant"]), magnitude=magnitude)


# The files themselves, read and written.


CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Decode = Callable[[PeftFile, JsonView], Adapter]
"""(file and config, our JSON) → adapter."""
KINDS: dict[str, Decode] = {"LORA": decode, **dict.fromkeys(lycoris.KINDS, lycoris.read_peft)}
"""peft_type → what reads its tensors."""


def detect(seen: FileHead) -> bool:
    """True for a file with PEFT's prefix, or with our own JSON."""
    return "lora_fx" in seen.metadata or any(n.startswith((PREFIX, OWN)) for n in seen.names)


def read(path: str | Path) -> Adapter:
    """An adapter from a folder or a single file.

    Args:
        path: A folder with adapter_config.json and adapter_model.safetensors, or a .safetensors
            file that has a config inside (ours) or beside it.

    Returns:
        An Adapter of entries by parameter name, `X.weight` or `X.weight` of an alias:

        * LowRank `a` [r, in] and `b` [out, r] in fp32, with `magnitude` [out] for DoRA. In files
          of PEFT layouts are None, and other fields say what the file does:
          op embedding with in = rows, out = dim, and `twins`, to which the same change applies;
          op conv2d and its kernel with in = C_in · ∏k; op experts and `layer` for a parameter,
          `a` [E, r, in] and `b` [E, out, r], to be given to `lora_fx.adapter.fused.place` before
          keys are matched; `mutated` where the update is meant for
          `lora_fx.adapter.variant.residual` of the base weight.
        * Dense [out] for a bias of B, Rows for trained tokens, Full for biases and modules that
          were trained whole.

        metadata has dropout, the base model's name, the notes; "fan_in_fan_out": True where PEFT
        said that linear weights are stored [in, out] (it sets the flag by the last layer it saw,
        so shapes go first); "untouched_targets": names in target_modules without a tensor.

    Raises:
        LoraFxError: Anything that would change the result in silence: see `config.REFUSED`,
            half a pair, shapes that do not fit, empty or non-finite tensors, unknown names.
    """
    path = Path(path)
    weights = path / WEIGHTS if path.is_dir() else path
    tensors, header = read_tensors(weights)
    ours = json_object(header.get("lora_fx", "{}"), f"{weights}: metadata lora_fx")
    config, where = config_of(weights, ours)
    if config is None:
        raise LoraFxError(
            f"{weights}: no config in its metadata and no {CONFIG} beside it; expected one "
            "of the two: the scale of the updates is stored there",
            f"put the {CONFIG} of the adapter beside the file",
        )
    kind = config.get("peft_type")
    reader = KINDS.get(kind) if isinstance(kind, str) else None
    if names_variant(kind):
        expect_variant(str(kind).removeprefix(OWN), f"{where}: the adapter")
        reader = decode
    if reader is None:
        raise LoraFxError(
            f"{where}: peft_type is {kind!r}; expected {' or '.join(map(repr, KINDS))}",
            "merge it into its model with PEFT (merge_and_unload) and use the merged model",
        )
    source = PeftFile(str(weights), tensors=tensors, config=config, config_file=where)
    return reader(source, ours)


def names_variant(peft_type: object) -> bool:
    """True for a type that names a variant which PEFT does not have: lora_fx.NAME."""
    return isinstance(peft_type, str) and peft_type.startswith(OWN)


def config_of(file: Path, ours: JsonView) -> tuple[Json | None, str]:
    """The config inside our JSON or beside the file, None where there is neither; and its place."""
    beside = file.parent / CONFIG
    if isinstance(ours.get("config"), dict):
        where = f"{file}: config in metadata lora_fx"
        regexes.begin(where)
        return dict(ours["config"]), where
    regexes.begin(str(beside))
    return read_json(beside) if beside.is_file() else None, str(beside)


def write(adapter: Adapter, directory: str | Path) -> tuple[str, ...]:
    """Write a folder that PEFT loads; returns notes on what PEFT will not see.

    Args:
        adapter: Bound, or as read from a file of PEFT. metadata may hold dropout, task_type,
            base_model_name_or_path and revision for the config; all of it is kept for reading.
        directory: Created where it is missing; files of these names in it are replaced.

    Raises:
        LoraFxError: Both variants in one adapter, a variant that is neither lora nor rslora, DoRA
            on some updates only, an entry that is no LoRA at all, empty or non-finite tensors,
            metadata that is no JSON.
    """
    tensors, config, ours, notes = encode(adapter)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt", "lora_fx": metadata_text(ours)})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
    return notes


def write_file(adapter: Adapter, path: str | Path) -> tuple[str, ...]:
    """Write one .safetensors file with the config in its metadata; otherwise as `write`."""
    tensors, config, ours, notes = encode(adapter)
    write_tensors(
        Path(path), tensors, {"format": "pt", "lora_fx": metadata_text({**ours, "config": config})}
    )
    return notes


class Peft(Format):
    """A folder with adapter_config.json, or one safetensors file with the config in its header."""

    name = "peft"
    suffixes = (".safetensors",)
    folder_files = (WEIGHTS, CONFIG)
    pickles = (PICKLED,)
    one_model = True
    takes_empty = True
    keeps_variants = True

    def detect(self, seen: FileHead) -> bool:
        """Whether there is PEFT's prefix, or our own JSON."""
        return detect(seen)

    def resembles(self, seen: FileHead) -> bool:
        """Whether there is a config or a name of A or B, and no prefix."""
        return seen.config or any(".lora_A" in name or ".lora_B" in name for name in seen.names)

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read a folder or a file."""
        return read(path)

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """Write a folder that PEFT loads, or one file."""
        if path.suffix in self.suffixes:
            return write_file(adapter, path)
        return write(adapter, path)


PEFT = Peft()
