"""From the tensors and config of a PEFT adapter to an Adapter; see `lora_fx.formats.peft`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats import peft_own, peft_rest
from lora_fx.formats.peft_config import (
    Pattern,
    check_config,
    listed_whole,
    mutation,
    saved_whole,
    targets,
    untouched,
)
from lora_fx.formats.peft_names import (
    WRAPPER,
    Group,
    from_tensors,
    groups,
    unwrapped,
    wrappers,
)
from lora_fx.formats.peft_source import Source
from lora_fx.formats.peft_stack import candidates, read_stacks
from lora_fx.formats.peft_targets import facts

_OUT = f".{WRAPPER}.out_proj"


def decode(source: Source, ours: Mapping[str, Any]) -> Adapter:
    """The adapter of one file with peft_type LORA.

    Args:
        source: The file; its notes become the adapter's.
        ours: The JSON under `lora_fx` in its header; empty for files of PEFT.
    """
    tensors, config, file, notes = source.tensors, source.config, source.file, source.notes
    notes += check_config(config, source.config_file)
    reader = Reader(source)
    described, metadata = peft_own.described(ours, file)
    taken: set[str] = set()
    found = groups(tensors, file)
    entries = peft_own.entries(described, reader, found, taken)
    left = {name: value for name, value in tensors.items() if name not in taken}
    reader.theirs(left, entries)
    for pattern in (reader.ranks, reader.alphas):
        notes += pattern.notes()
    whole = [key for key, entry in entries.items() if isinstance(entry, Full)]
    if not entries:
        raise LoraFxError(f"{file}: no update in it", "was the adapter saved before training?")
    for module in listed_whole(config):
        if not any(saved_whole({"modules_to_save": [module]}, k.rpartition(".")[0]) for k in whole):
            notes.append(f"{file}: modules_to_save {module!r} has no tensor in the file")
    unused = untouched(config, reader.modules)
    if unused:
        metadata["untouched_targets"] = unused
        names = ", ".join(map(repr, unused))
        notes.append(f"{file}: the config targets {names}, of which the file has no tensor")
    for field in ("task_type", "base_model_name_or_path", "revision"):
        if config.get(field):
            metadata[field] = config[field]
    if config.get("fan_in_fan_out"):
        metadata["fan_in_fan_out"] = True
    metadata["dropout"] = float(config.get("lora_dropout") or 0.0)
    if not ours:  # which names each update, and the config names modules in full
        metadata["peft"] = facts(config)
    metadata["notes"] = notes
    return Adapter(entries, metadata)


class Reader:
    """Reads the updates of one file.

    Attributes:
        source: The file.
        ranks: r and rank_pattern.
        alphas: lora_alpha and alpha_pattern.
        variant: lora or rslora.
        modules: Names of the modules with low-rank tensors, as PEFT compares them.
    """

    def __init__(self, source: Source) -> None:
        """Compile the patterns."""
        config = source.config
        self.source, self.config, self.file = source, config, source.file
        self.ranks = Pattern(config, "rank_pattern", "r", source.config_file)
        self.alphas = Pattern(config, "alpha_pattern", "lora_alpha", source.config_file)
        self.variant = "rslora" if config.get("use_rslora") else "lora"
        self.modules: list[str] = []

    def theirs(self, tensors: Mapping[str, Array], entries: dict[str, Entry]) -> None:
        """Everything that our JSON does not describe, as PEFT would apply it."""
        found = groups(tensors, self.file)
        for lead, group in self._twins(found).items():
            outer = unwrapped(lead)
            if self._is_stacked(outer):
                if wrappers(lead) == 0:
                    levels = self._levels(lead, found)
                    stacks = read_stacks(levels, self.source, self.ranks, self.alphas, self.variant)
                    self.modules.append(outer)
                    for key, low in stacks.items():
                        self.source.add(entries, key, low, group.names["a"])
                elif f"{lead.removesuffix(f'.{WRAPPER}')}" not in found:
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
        peft_rest.read_rest(rest, self.source, found, entries)

    def update(self, group: Group, found: Mapping[str, Group]) -> LowRank:
        """The update of one layer in PEFT's shapes."""
        a_name = group.names["a"]
        a, b = self.source.factor(a_name), self.source.factor(group.names["b"])
        a, b, extra = from_tensors(group.kind, a, b, f"{self.file}: {a_name!r}")
        seen = unwrapped(group.lead.removesuffix(_OUT))  # PEFT wraps out_proj inside
        attention = f"{group.lead.removesuffix(_OUT)}{_OUT}" in found
        self.modules.append(seen)
        if not (targets(self.config, group.module) or targets(self.config, seen)):
            raise LoraFxError(
                f"{self.file}: {a_name!r} is of a module that target_modules leaves out; PEFT "
                "would drop it",
                f"correct target_modules in {self.source.config_file}",
            )
        rank, alpha = self.ranks.of(seen), self.alphas.of(seen)
        if rank is not None and rank != len(a):
            raise LoraFxError(
                f"{self.file}: {a_name!r} has rank {len(a)}; expected {rank:g}, as "
                f"{self.source.config_file} says: the scale would be in doubt",
                "correct r or rank_pattern",
            )
        assert alpha is not None  # check_config saw lora_alpha
        if attention:
            extra["lead"] = group.lead
            if group.lead.endswith(_OUT):
                alpha *= 2  # PEFT adds this update twice, in training and in merging
        self._check_kind(group, attention, extra)
        if group.tied:
            extra["tied"] = list(group.tied)
        magnitude = self._magnitude(group, len(b))
        return LowRank(a, b, alpha, None, self.variant, "", extra, magnitude)

    def _check_kind(self, group: Group, attention: bool, extra: dict[str, Any]) -> None:
        """Mark an update whose base PEFT changed; raise where PEFT changes none."""
        changed = mutation(self.config)
        if not changed or group.kind == "embedding":
            return  # PEFT leaves embeddings as they are
        if attention or "kernel" in extra:
            raise LoraFxError(
                f"{self.file}: {group.names['a']!r} is of an attention module or a convolution; "
                f"expected a linear layer, as init_lora_weights is {changed!r}",
                "correct init_lora_weights to what the adapter was trained with",
            )
        extra["mutated"] = changed

    def _magnitude(self, group: Group, out: int) -> Array | None:
        name = group.names.get("magnitude")
        if self.config.get("use_dora"):
            if name is None:
                raise LoraFxError(
                    f"{self.file}: {group.names['a']!r} has no lora_magnitude_vector beside it; "
                    f"expected one, as use_dora is true in {self.source.config_file}",
                    "PEFT would start a magnitude of its own; correct use_dora or save again",
                )
            return self.source.vector(name, out)
        if name is not None:
            raise LoraFxError(
                f"{self.file}: {name!r} is a DoRA magnitude; expected none, as use_dora is off in "
                f"{self.source.config_file}: PEFT would drop it and the result would differ",
                "set use_dora to true if the adapter was trained with DoRA",
            )
        return None

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
        value, scale = self.source.vector(name, len(low.b)), low.scale
        if group.lead.endswith(_OUT):
            scale /= 2  # the update is added twice, its bias once
        elif "lead" in low.extra:
            self.source.notes.append(f"{self.file}: {name!r} is not read; PEFT does not apply it")
            return
        self.source.add(entries, f"{group.module}.bias", Dense(value, scale), name)

    def _twins(self, found: dict[str, Group]) -> dict[str, Group]:
        """The layers, without heads that ensure_weight_tying keeps equal to an embedding.

        PEFT writes such a head as a pair of its own, A = Bᵀ and B = Aᵀ of the embedding. It is one
        update of one tensor, so the embedding's is kept and `extra["tied"]` names the head. (In
        peft 0.21.2 merge_and_unload adds it twice, unlike its own forward.)
        """
        if not self.config.get("ensure_weight_tying"):
            return found
        result = dict(found)
        for lead, group in found.items():
            if group.kind != "linear" or targets(self.config, group.module):
                continue
            for other in found.values():
                if other.kind == "embedding" and self._turned(group, other):
                    other.tied.append(f"{group.module}.weight")
                    self.modules.append(group.module)
                    del result[lead]
                    break
        return result

    def _turned(self, head: Group, table: Group) -> bool:
        a, b = (self.source.tensors[head.names[half]] for half in "ab")
        c, d = (self.source.tensors[table.names[half]] for half in "ab")
        return set(head.names) == {"a", "b"} and np.array_equal(a.T, d) and np.array_equal(b.T, c)

    def _is_stacked(self, module: str) -> bool:
        """True for a module whose parameters are targets; PEFT lets no module be one as well."""
        listed = self.config.get("target_modules") not in (None, "all-linear")
        own = listed and targets(self.config, module)
        return not own and bool(candidates(self.config, module))

    def _levels(self, lead: str, found: Mapping[str, Group]) -> list[Group]:
        """The wrappers of a module's parameters, outermost first."""
        levels = []
        while lead in found:
            levels.append(found[lead])
            lead = f"{lead}.{WRAPPER}"
        return levels

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
