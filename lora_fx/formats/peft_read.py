"""From the tensors and config of a PEFT adapter to an Adapter; see `lora_fx.formats.peft`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_fx.adapter import Adapter
from lora_fx.errors import LoraFxError, one_line
from lora_fx.formats.peft_config import (
    Pattern,
    check_config,
    listed_whole,
    saved_whole,
    targets,
)
from lora_fx.formats.peft_names import (
    OWN,
    PREFIX,
    from_tensors,
    parameter_of,
    refuse_tensor,
    split_name,
)
from lora_fx.formats.tensorfile import Array, is_float
from lora_fx.lowrank import Full, Layout, LowRank

VERSION = 1
"""Of the JSON under lora_fx in the header."""


def decode(
    tensors: Mapping[str, Array],
    ours: Mapping[str, Any],
    config: Mapping[str, Any],
    file: str,
    config_file: str,
) -> Adapter:
    """The adapter of one file.

    Args:
        tensors: All of the file's.
        ours: The JSON under `lora_fx` in its header; empty for files of PEFT.
        config: adapter_config.json.
        file: Name of the tensor file, for messages.
        config_file: Name of the config, for messages.
    """
    notes = check_config(config, config_file)
    reader = _Reader(tensors, config, file, config_file, notes)
    described, metadata = reader.described(ours)
    entries: dict[str, LowRank | Full] = {}
    taken: set[str] = set()
    for key, entry in described.items():
        entries[key] = reader.ours(key, entry, taken)
    for name in tensors:
        if name not in taken:
            reader.theirs(name, entries, taken)
    for pattern in (reader.ranks, reader.alphas):
        pattern.check_matched()
    whole = [key for key, entry in entries.items() if isinstance(entry, Full)]
    if not entries:
        raise LoraFxError(f"{file}: no update in it", "was the adapter saved before training?")
    for module in listed_whole(config):
        if not any(saved_whole({"modules_to_save": [module]}, k.rpartition(".")[0]) for k in whole):
            notes.append(f"{file}: modules_to_save {module!r} has no tensor in the file")
    for field in ("task_type", "base_model_name_or_path", "revision"):
        if config.get(field):
            metadata[field] = config[field]
    metadata["dropout"] = float(config.get("lora_dropout") or 0.0)
    metadata["notes"] = notes
    return Adapter(entries, metadata)


def finite(array: Array) -> bool:
    """True when every element is a number; exact in any float dtype."""
    wide = array.astype(np.float32) if array.dtype.itemsize < 4 else array
    return bool(np.isfinite(wide).all())


def _fits(layout: Layout, low: LowRank) -> bool:
    """True when a layout is sound and has the sizes of an update."""
    axes = sorted(layout.batch + layout.out + layout.in_)
    sound = axes == list(range(len(layout.shape)))
    return (
        sound
        and math.prod(layout.shape) == math.prod(layout.stored)
        and low.a.shape == (*layout.batch_shape, low.rank, layout.in_size)
        and low.b.shape == (*layout.batch_shape, layout.out_size, low.rank)
    )


class _Reader:
    """The state of one reading: what messages need, and the two patterns."""

    def __init__(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        file: str,
        config_file: str,
        notes: list[str],
    ) -> None:
        self.tensors, self.config, self.file, self.notes = tensors, config, file, notes
        self.config_file = config_file
        self.ranks = Pattern(config, "rank_pattern", "r", config_file)
        self.alphas = Pattern(config, "alpha_pattern", "lora_alpha", config_file)
        self.variant = "rslora" if config.get("use_rslora") else "lora"

    def described(self, ours: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The entries and the metadata of our own JSON."""
        if not ours:
            return {}, {}
        entries, metadata = ours.get("entries"), ours.get("metadata")
        version = ours.get("version")
        if version != VERSION:
            raise LoraFxError(
                f"{self.file}: metadata lora_fx has version {version!r}; expected {VERSION}",
                "update lora-fx",
            )
        if not isinstance(entries, dict) or not isinstance(metadata, dict):
            raise LoraFxError(f"{self.file}: metadata lora_fx is damaged")
        return entries, dict(metadata)

    def ours(self, key: str, entry: Any, taken: set[str]) -> LowRank | Full:
        """One update as our JSON describes it."""
        try:
            if "full" in entry:
                taken.add(entry["full"])
                return self.full(entry["full"], self.tensors[entry["full"]])
            names = (str(entry["a"]), str(entry["b"]))
            module, kind = self._place(names[0])
            taken.update(names)
            low = self.pair(module, kind, names)
            a, b = low.a, low.b
            if entry.get("swapped"):
                a, b = np.ascontiguousarray(low.b.T), np.ascontiguousarray(low.a.T)
            layout = Layout.from_json(entry["layout"]) if entry["layout"] else None
            alpha, variant = low.alpha, low.variant
            if not module:
                alpha, variant = float(entry["alpha"]), str(entry["variant"])
            result = LowRank(a, b, alpha, layout, variant, str(entry["use"]), dict(entry["extra"]))
            fits = layout is None or _fits(layout, result)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise LoraFxError(
                f"{self.file}: metadata lora_fx does not fit the tensors at {key!r}: "
                f"{type(error).__name__} {one_line(error)}",
                "the file was edited; save the adapter again",
            ) from error
        if not fits:
            raise LoraFxError(
                f"{self.file}: {key!r} has A {list(a.shape)} and B {list(b.shape)}; expected those "
                f"of its layout {entry['layout']}",
                "the file was edited; save the adapter again",
            )
        return result

    def theirs(self, name: str, entries: dict[str, LowRank | Full], taken: set[str]) -> None:
        """One tensor that our JSON does not describe: its pair, or a whole tensor."""
        short = name.removeprefix(PREFIX)
        taken.add(name)
        refuse_tensor(name, self.file)
        split = split_name(short)
        if split is not None and not name.startswith(OWN):
            module, kind, half = split
            lead = name[: -len("A" if kind == "embedding" else "A.weight")]
            tail = "" if kind == "embedding" else ".weight"
            other = f"{lead}{'B' if half == 'A' else 'A'}{tail}"
            if other not in self.tensors:
                raise LoraFxError(
                    f"{self.file}: {name!r} has no partner; expected {other!r} beside it",
                    "the file is incomplete; save or fetch it again",
                )
            taken.add(other)
            low = self.pair(module, kind, (f"{lead}A{tail}", f"{lead}B{tail}"))
            self._add(entries, parameter_of(module, self.tensors, self.file), low, name)
        elif self._is_whole(name, short):
            # PEFT asked to save embeddings writes a trained one twice, under its wrapper as well.
            key = short.replace(".modules_to_save.", ".")
            full, old = self.full(name, self.tensors[name]), entries.get(key)
            if not isinstance(old, Full) or not np.array_equal(old.value, full.value):
                self._add(entries, key, full, name)

    def pair(self, module: str, kind: str, names: tuple[str, str]) -> LowRank:
        """The update of two tensors in PEFT's shapes, or in ours where `module` is empty."""
        a, b = (self._factor(name) for name in names)
        if not module:
            if a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
                raise LoraFxError(
                    f"{self.file}: {names[0]!r} is {list(a.shape)} and {names[1]!r} is "
                    f"{list(b.shape)}; expected [*batch, r, in] and [*batch, out, r]"
                )
            return LowRank(a, b, 1.0)
        flat_a, flat_b, extra = from_tensors(kind, a, b, f"{self.file}: {names[0]!r}")
        seen = module.partition(".base_layer.")[0]  # PEFT wraps out_proj of an attention inside
        if not (targets(self.config, module) or targets(self.config, seen)):
            raise LoraFxError(
                f"{self.file}: {names[0]!r} is of a module that target_modules leaves out; PEFT "
                "would drop it",
                f"correct target_modules in {self.config_file}",
            )
        rank, alpha = self.ranks.of(seen), self.alphas.of(seen)
        if rank is not None and rank != len(flat_a):
            raise LoraFxError(
                f"{self.file}: {names[0]!r} has rank {len(flat_a)}; expected {rank:g}, as "
                f"{self.config_file} says: the scale would be in doubt",
                "correct r or rank_pattern",
            )
        assert alpha is not None  # check_config saw lora_alpha
        return LowRank(flat_a, flat_b, alpha, None, self.variant, "", extra)

    def full(self, name: str, value: Array) -> Full:
        """A whole tensor; narrow floats become fp32, other dtypes stay."""
        if is_float(value):
            self._check_finite(name, value)
            if value.dtype.itemsize < 4:
                value = value.astype(np.float32)
        return Full(value)

    def _factor(self, name: str) -> Array:
        """A or B as an fp32 master."""
        array = self.tensors[name]
        if array.size == 0 or array.ndim < 2:
            raise LoraFxError(
                f"{self.file}: {name!r} has shape {list(array.shape)}; expected two sizes or more, "
                "none of them 0",
                "saved under ZeRO-3 or FSDP without gathering the shards; gather, then save again",
            )
        if not is_float(array):
            raise LoraFxError(
                f"{self.file}: {name!r} has dtype {array.dtype}; expected a float dtype",
                "save the adapter in fp32, fp16 or bf16",
            )
        self._check_finite(name, array)
        master = np.ascontiguousarray(array, np.float32)
        if array.dtype == np.float64 and not np.array_equal(master, array):
            self.notes.append(f"{self.file}: {name!r} was rounded from fp64 to fp32")
        return master

    def _check_finite(self, name: str, array: Array) -> None:
        if not finite(array):
            raise LoraFxError(
                f"{self.file}: {name!r} has NaN or infinite values; expected finite ones",
                "training may have diverged; use an earlier checkpoint",
            )

    def _place(self, a_name: str) -> tuple[str, str]:
        """(module, kind) of the name of an A; no module for a name of our own."""
        if a_name.startswith(OWN):
            return "", "own"
        split = split_name(a_name.removeprefix(PREFIX))
        if split is None:
            raise ValueError(f"{a_name!r} is no name of an A")
        return split[0], split[1]

    def _is_whole(self, name: str, short: str) -> bool:
        """True for a whole tensor to keep, False for one that is noted; raises for others."""
        module = short.rpartition(".")[0]
        value = self.tensors[name]
        lead = name.removesuffix(".base_layer.weight")
        frozen = lead != name and any(n.startswith(f"{lead}.lora_") for n in self.tensors)
        if frozen or ".original_module." in short:
            # PEFT stores the frozen embedding again when the embedding is a target.
            self.notes.append(f"{self.file}: {name!r} is a copy of the base weight; not read")
            return False
        if not name.startswith(OWN) and ".lora_" not in short and module:
            if saved_whole(self.config, module):
                return True
            if name.startswith(PREFIX) and value.ndim == 2 and short.endswith(".weight"):
                # PEFT stores resized embeddings and heads so, without listing them.
                self.notes.append(f"{self.file}: {name!r} replaces a whole tensor of the model")
                return True
        raise LoraFxError(
            f"{self.file}: {name!r} is not a name that PEFT gives; expected X.lora_A.weight, "
            "X.lora_B.weight, X.lora_embedding_A, X.lora_embedding_B or a module of "
            "modules_to_save",
            "was the file saved with save_pretrained?",
        )

    def _add(
        self, entries: dict[str, LowRank | Full], key: str, value: LowRank | Full, name: str
    ) -> None:
        if key in entries:
            raise LoraFxError(
                f"{self.file}: {name!r} is a second entry for {key!r}; expected one",
                "the file was edited; save the adapter again",
            )
        entries[key] = value
