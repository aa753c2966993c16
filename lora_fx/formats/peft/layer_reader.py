"""Read the low-rank updates of one PEFT file, layer by layer, with its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import FileLayer, Origin
from lora_fx.adapter.qalora import grouped
from lora_fx.adapter.updates import Dense, Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft.config import group_of, mutation, whole_factor
from lora_fx.formats.peft.names import (
    OUT_PROJ,
    WRAPPER,
    Group,
    from_tensors,
    groups,
    unwrapped,
)
from lora_fx.formats.peft.pattern import Pattern
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.formats.peft.stacks import candidates, read_stacks
from lora_fx.formats.peft.target_modules import targets
from lora_fx.formats.peft.whole_tensors import read_rest


@dataclass(frozen=True)
class _Vector:
    """A vector besides A and B that a field of the config requires.

    Attributes:
        name: What `Group.names` calls it.
        tensor: The end of the tensor's name.
        method: The method that it belongs to, for messages.
        field: The field of the config that turns the method on.
    """

    name: str
    tensor: str
    method: str
    field: str


_MAGNITUDE = _Vector("magnitude", "lora_magnitude_vector", "DoRA", "use_dora")
_DIAGONAL = _Vector("diagonal", "lora_diag", "KaSA", "kasa_config")


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
        self.source = source
        self.config = source.config
        self.file = source.name
        self.ranks = Pattern(self.config, "rank_pattern", "r", source.config_file)
        self.alphas = Pattern(self.config, "alpha_pattern", "lora_alpha", source.config_file)
        self.variant = "rslora" if self.config.get("use_rslora") else "lora"
        self.modules: list[str] = []
        self.taken: set[str] = set()

    def add_undescribed(self, tensors: Mapping[str, Array], entries: dict[str, Entry]) -> None:
        """Add everything that our JSON does not describe, as PEFT would apply it."""
        layers = groups(tensors, self.file)
        for lead, group in self._without_tied_heads(layers).items():
            if self._is_stacked(group.module):
                self._add_stacks(lead, group, layers, entries)
            else:
                self._add_layer(lead, group, layers, entries)

        names_in_layers = set[str]()
        for group in layers.values():
            names_in_layers.update(group.names.values())
        other_names = [name for name in tensors if name not in names_in_layers]
        read_rest(other_names, self.source, layers, entries)

    def _add_stacks(
        self, lead: str, group: Group, layers: Mapping[str, Group], entries: dict[str, Entry]
    ) -> None:
        """Add the updates of the parameters of one module, when its outermost wrapper comes."""
        if lead.endswith(f".{WRAPPER}"):
            if lead.removesuffix(f".{WRAPPER}") not in layers:
                raise self._nested(group)
            return  # the outermost wrapper brings this one

        levels = []
        level_lead = lead
        while level_lead in layers:
            levels.append(layers[level_lead])
            level_lead += f".{WRAPPER}"
        stacks = read_stacks(levels, self.source, self.ranks, self.alphas, self.variant)
        self.modules.append(group.module)
        for key, update in stacks.items():
            self.source.add(entries, key, update, group.names["a"])

    def _add_layer(
        self, lead: str, group: Group, layers: Mapping[str, Group], entries: dict[str, Entry]
    ) -> None:
        """Add the update of one layer, and the bias of B beside it."""
        self._check_place(group, layers)
        update = self.update(group, layers)
        is_attention = f"{lead}{OUT_PROJ}" in layers
        leaf = "in_proj_weight" if is_attention else "weight"
        self.source.add(entries, f"{group.module}.{leaf}", update, group.names["a"])
        self.add_bias(entries, update, group)

    def update(self, group: Group, layers: Mapping[str, Group]) -> LowRank:
        """The update of one layer in PEFT's shapes.

        Args:
            group: The tensors of the layer.
            layers: Those of all layers, among them the other half of an attention.

        Raises:
            LoraFxError: Shapes, or a rank, a vector or a target that the config contradicts.
        """
        a_name = group.names["a"]
        stored_a = self._factor(group, "a")
        stored_b = self._factor(group, "b")
        a, b, op, kernel = from_tensors(group.kind, stored_a, stored_b, f"{self.file}: {a_name!r}")

        attention_lead = group.lead.removesuffix(OUT_PROJ)
        is_of_attention = f"{attention_lead}{OUT_PROJ}" in layers
        compared_name = unwrapped(attention_lead)  # PEFT wraps out_proj inside
        self.modules.append(compared_name)
        self._check_targeted(group, compared_name)

        alpha = self._alpha(compared_name, a_name, rank=a.shape[-2])
        if is_of_attention and group.lead.endswith(OUT_PROJ):
            alpha *= 2  # PEFT adds this update twice, in training and in merging

        is_plain_layer = not (is_of_attention or kernel)
        mutated = self._mutated(group, plain=is_plain_layer)
        magnitude_name = self._vector_name(group, _MAGNITUDE, on=bool(self.config.get("use_dora")))
        diagonal_name = self._vector_name(group, _DIAGONAL, on=mutated == "kasa")
        if diagonal_name is not None:
            a = a * self.source.numbers(diagonal_name, len(a))[:, None]
        magnitude = None
        if magnitude_name is not None:
            magnitude = self.source.numbers(magnitude_name, len(b))

        file_layer = FileLayer(group.lead) if is_of_attention else None
        update = LowRank(
            a,
            b,
            alpha,
            None,
            self.variant,
            magnitude=magnitude,
            mutated=mutated,
            origin=Origin(op, kernel, bool(group.tied), tuple(group.tied), file_layer),
        )

        # PEFT pools the inputs of GPTQ's linear layers alone, and ignores the flag at all others
        if group.kind != "linear" or is_of_attention:
            return update
        group_size = group_of(self.config, update.a, f"{self.file}: {a_name!r}")
        return grouped(update, group_size) if group_size else update

    def _factor(self, group: Group, half: str) -> Array:
        """A or B as stored, with the blocks of BD-LoRA written out."""
        stored = self.source.factor(group.names[half])
        return whole_factor(self.config, group.module, half, stored, self.file)

    def _alpha(self, compared_name: str, a_name: str, *, rank: int) -> float:
        """The alpha of a layer; raises if the config has another rank than the tensors."""
        expected_rank = self.ranks.of(compared_name)
        alpha = self.alphas.of(compared_name)
        if expected_rank is not None and expected_rank != rank:
            raise LoraFxError(
                f"{self.file}: {a_name!r} has rank {rank}; expected {expected_rank:g}, as in "
                f"{self.source.config_file}; otherwise the scale is uncertain",
                "correct r or rank_pattern",
            )
        assert alpha is not None  # check_config saw lora_alpha
        return alpha

    def _check_targeted(self, group: Group, compared_name: str) -> None:
        """Raise for a layer of a module that target_modules leaves out."""
        if targets(self.config, group.module) or targets(self.config, compared_name):
            return
        raise LoraFxError(
            f"{self.file}: {group.names['a']!r} belongs to a module that target_modules does not "
            "name; PEFT would drop it",
            f"correct target_modules in {self.source.config_file}",
        )

    def _mutated(self, group: Group, *, plain: bool) -> str:
        """How PEFT changed the base of an update; raises for a layer that PEFT does not change."""
        changed = mutation(self.config)
        if not changed or group.kind == "embedding":
            return ""  # PEFT leaves embeddings as they are
        if not plain:
            raise LoraFxError(
                f"{self.file}: {group.names['a']!r} belongs to an attention module or a "
                "convolution; expected a linear layer, because the adapter was initialised with "
                f"{changed!r}",
                "correct the config to what the adapter was trained with",
            )
        return changed

    def _vector_name(self, group: Group, vector: _Vector, *, on: bool) -> str | None:
        """The name of a vector's tensor, where its method is on; None where it is off.

        Raises:
            LoraFxError: The config and the tensors contradict each other.
        """
        name = group.names.get(vector.name)
        if on and name is None:
            raise LoraFxError(
                f"{self.file}: {group.names['a']!r} has no {vector.tensor}; expected one, because "
                f"{vector.field} is on in {self.source.config_file}",
                f"PEFT would create a new one; correct {vector.field}, or save the adapter again",
            )
        if name is not None and not on:
            raise LoraFxError(
                f"{self.file}: {name!r} belongs to {vector.method}; expected none, because "
                f"{vector.field} is off in {self.source.config_file}; PEFT would drop it and "
                "change the result",
                f"turn {vector.field} on if the adapter was trained with it",
            )
        return name

    def add_bias(self, entries: dict[str, Entry], update: LowRank, group: Group) -> None:
        """Add the bias of B, which PEFT adds times the scale to the layer's own bias."""
        name = group.names.get("bias")
        self._check_bias(group, name)
        if name is None:
            return

        value = self.source.numbers(name, len(update.b))
        scale = update.scale
        if group.lead.endswith(OUT_PROJ):
            scale /= 2  # the update is added twice, its bias once
        elif update.origin.layer:
            self.source.notes.append(f"{self.file}: {name!r} is not read; PEFT does not apply it")
            return

        key = f"{group.module}.bias"
        trained = entries.get(key)
        if isinstance(trained, Full):  # PEFT adds the bias of B to the trained one
            entries[key] = replace(trained, value=trained.value + np.float32(scale) * value)
            return
        self.source.add(entries, key, Dense(value, scale), name)

    def _check_bias(self, group: Group, name: str | None) -> None:
        """Raise if lora_bias contradicts the tensors of a linear layer."""
        is_expected = bool(self.config.get("lora_bias"))
        if (name is not None) == is_expected or group.kind != "linear":
            return
        stored = repr(name) if name else f"{group.names['b']!r} without a bias"
        expected = "one" if is_expected else "no bias of B"
        raise LoraFxError(
            f"{self.file}: {stored}; expected {expected}, because lora_bias is "
            f"{str(is_expected).lower()} in {self.source.config_file}",
            "set lora_bias to what the adapter was trained with",
        )

    def _without_tied_heads(self, layers: dict[str, Group]) -> dict[str, Group]:
        """The layers, without heads that ensure_weight_tying keeps equal to an embedding.

        PEFT writes such a head as a pair of its own, A = Bᵀ and B = Aᵀ of the embedding. It is one
        update of one tensor, so the embedding's is kept and `twins` names the head. (In
        peft 0.21.2 merge_and_unload adds it twice, unlike its own forward.)
        """
        if not self.config.get("ensure_weight_tying"):
            return layers
        remaining = dict(layers)
        for lead, group in layers.items():
            if group.kind != "linear" or targets(self.config, group.module):
                continue
            embedding = self._embedding_of_head(group, layers)
            if embedding is not None:
                embedding.tied.append(f"{group.module}.weight")
                self.modules.append(group.module)
                del remaining[lead]
        return remaining

    def _embedding_of_head(self, head: Group, layers: Mapping[str, Group]) -> Group | None:
        """The embedding whose update a head repeats, transposed; None where there is none."""
        for group in layers.values():
            if group.kind == "embedding" and self._is_transposed(head, group):
                return group
        return None

    def _is_transposed(self, head: Group, embedding: Group) -> bool:
        """Whether A of the head is Bᵀ of the embedding, B is Aᵀ, and there are no other tensors."""
        head_a = self.source.tensors[head.names["a"]]
        head_b = self.source.tensors[head.names["b"]]
        embedding_a = self.source.tensors[embedding.names["a"]]
        embedding_b = self.source.tensors[embedding.names["b"]]
        return (
            set(head.names) == {"a", "b"}
            and np.array_equal(head_a.T, embedding_b)
            and np.array_equal(head_b.T, embedding_a)
        )

    def _is_stacked(self, module: str) -> bool:
        """True for a module whose parameters are targets; PEFT lets no module be one as well."""
        names_modules = self.config.get("target_modules") not in (None, "all-linear")
        if names_modules and targets(self.config, module):
            return False
        return bool(candidates(self.config, module))

    def _check_place(self, group: Group, layers: Mapping[str, Group]) -> None:
        """Raise for a layer inside a wrapper that is not a known one of PEFT.

        A wrapper is known where it holds parameters that are targets, or the out_proj of an
        attention; and where a module stands inside it.
        """
        path = group.lead.split(".")
        for position, name in enumerate(path):
            if name != WRAPPER:
                continue
            around = ".".join(path[:position])
            is_stack = self._is_stacked(unwrapped(around))
            is_attention = group.lead == f"{around}{OUT_PROJ}" and around in layers
            is_innermost = position == len(path) - 1
            if is_innermost or not (is_stack or is_attention):
                raise self._nested(group)

    def _nested(self, group: Group) -> LoraFxError:
        return LoraFxError(
            f"{self.file}: {group.names['a']!r} is nested in another PEFT layer; expected a "
            "nesting that target_parameters or a MultiheadAttention causes",
            f"correct target_parameters in {self.source.config_file}, or merge it into its model "
            "with PEFT (merge_and_unload)",
        )
