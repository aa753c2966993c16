"""The low-rank updates of one PEFT file, layer by layer, as its config says them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import FileLayer, Origin
from lora_fx.adapter.qalora import grouped
from lora_fx.adapter.updates import Dense, Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft.config import group_of, mutation, whole_factor
from lora_fx.formats.peft.names import WRAPPER, Group, from_tensors, groups, unwrapped
from lora_fx.formats.peft.pattern import Pattern
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.formats.peft.stacks import candidates, read_stacks
from lora_fx.formats.peft.target_modules import targets
from lora_fx.formats.peft.whole_tensors import read_rest

_OUT = f".{WRAPPER}.out_proj"


_BESIDE = {
    "magnitude": ("lora_magnitude_vector", "DoRA", "use_dora"),
    "diagonal": ("lora_diag", "KaSA", "kasa_config"),
}
"""Parts of a layer: the tensor's name, what it is of, and the field that calls for it."""


class LayerReader:
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
        self.ranks = Pattern(config, "rank_pattern", "r", source.config_file)
        self.alphas = Pattern(config, "alpha_pattern", "lora_alpha", source.config_file)
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
        a, b = (whole_factor(self.config, group.module, *half, self.file) for half in halves)
        a, b, op, kernel = from_tensors(group.kind, a, b, f"{self.file}: {a_name!r}")
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
        size = group_of(self.config, low.a, f"{self.file}: {group.names['a']!r}")
        return grouped(low, size) if size else low

    def _mutated(self, group: Group, *, plain: bool) -> str:
        """How PEFT changed the base of an update; raises where it changes none of that kind."""
        changed = mutation(self.config)
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
            head = group.kind == "linear" and not targets(self.config, group.module)
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
        own = listed and targets(self.config, module)
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
