"""From an Adapter to the tensors and config of PEFT; see `lora_fx.formats.peft`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, Rows, name_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import finite, is_float
from lora_fx.formats.peft_build import build_config
from lora_fx.formats.peft_can import all_or_none, one_variant, partial, split_full
from lora_fx.formats.peft_forms import OUT, Form, forms_of, to_tensors
from lora_fx.formats.peft_names import DELTA, OWN, PREFIX, WRAPPER
from lora_fx.formats.peft_own import VERSION

_DERIVED = ("notes", "untouched_targets", "fan_in_fan_out", "peft")
"""Metadata that reading takes from the config and the tensors."""
Encoded = tuple[dict[str, Array], dict[str, Any], dict[str, Any], tuple[str, ...]]


def encode(adapter: Adapter) -> Encoded:
    """The tensors, the config, the JSON of our own, and the notes of an adapter."""
    for key, entry in adapter.entries.items():
        if not isinstance(entry, (LowRank, Full, Dense, Rows)):
            raise LoraFxError(
                f"{key!r} is {name_of(entry)}; peft_type LORA has no such update",
                "write another format, or merge it",
            )
    return _Writer(adapter).run()


class _Writer:
    """The state of one writing."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.tensors: dict[str, Array] = {}
        self.described: dict[str, Any] = {}
        self.notes: list[str] = []
        self.forms = forms_of(adapter.lowrank)
        self.told = {k: f for k, f in self.forms.items() if f.kind != "own"}
        self.fields: dict[str, Any] = {}

    def run(self) -> Encoded:
        """Everything, in the order of the file."""
        _one_each(self.told)
        updates = self.adapter.lowrank
        variant = one_variant(updates)
        self._flags(variant)
        for key, low in updates.items():
            self._update(key, low)
        biases = self._biases()
        modules = {f.target for f in self.told.values()} - {
            f.target for f in self.told.values() if f.kind == "stack"
        }
        named = modules | {f.target for f in self.told.values()}
        full = {k: v for k, v in self.adapter.full.items() if k not in biases}
        whole, odd = split_full(full, named)
        for key, value in full.items():
            name = f"{OWN}{key}.full" if key in odd else PREFIX + key
            self._put(key, name, value.value)
            self.described[key] = {"full": name}
            if key in odd:
                self.notes.append(f"PEFT will not see the whole tensor {key!r}: {odd[key]}")
        self.notes += partial(whole, full)
        self._rows(named | set(whole))
        if not self.told:
            self.notes.append("PEFT will not load this adapter: it has no update that it can apply")
        metadata = {k: v for k, v in self.adapter.metadata.items() if k not in _DERIVED}
        config = build_config(self._numbers(), modules, whole, metadata, self.fields)
        ours = {"version": VERSION, "entries": self.described, "metadata": metadata}
        return self.tensors, config, ours, tuple(self.notes)

    def _flags(self, variant: str) -> None:
        """The config's flags; each is one for the whole adapter."""
        updates = self.adapter.lowrank
        told = {k: updates[k] for k in self.told}
        linear = {k: f for k, f in self.told.items() if f.kind == "linear"}
        fan = bool(self.adapter.metadata.get("fan_in_fan_out"))
        turned = [fan if updates[k].layout is None else f.transposed for k, f in linear.items()]
        stacks = any(f.kind == "stack" for f in self.told.values())
        self.fields |= {
            "use_rslora": variant == "rslora",
            "fan_in_fan_out": bool(turned) and all(turned) and not stacks,
            "use_dora": all_or_none({k: low.magnitude is not None for k, low in told.items()}),
        }
        others = [k for k, f in self.told.items() if f.kind != "embedding"]
        changed = {k: str(updates[k].extra.get("mutated", "")) for k in others}
        first = next((v for v in changed.values() if v), "")
        all_or_none({k: v == first for k, v in changed.items()} if first else {}, first)
        if first:
            self.fields["init_lora_weights"] = first
        if any(u.extra.get("tied") for k, u in told.items() if self.told[k].plain):
            self.fields["ensure_weight_tying"] = True

    def _update(self, key: str, low: LowRank) -> None:
        form = self.forms[key]
        if form.kind == "own":
            lead = f"{OWN}{key}"
            names = {"a": f"{lead}.lora_A", "b": f"{lead}.lora_B"}
            values = {names["a"]: low.a, names["b"]: low.b}
            if low.magnitude is not None:
                names["magnitude"] = f"{lead}.magnitude"
                values[names["magnitude"]] = low.magnitude.reshape(-1)
            self.notes.append(f"PEFT will not see the update of {key!r}: {form.why}")
        else:
            names = dict(zip("ab", form.names, strict=True))
            values = to_tensors(form, low)
        for name, value in values.items():
            self._put(key, name, value)
        if not form.plain:
            self.described[key] = names | _describe(low, form)

    def _numbers(self) -> dict[str, tuple[int, float]]:
        """(rank, alpha) by the names that PEFT compares; target_parameters on the way."""
        result: dict[str, tuple[int, float]] = {}
        parameters: set[str] = set()
        for key, form in self.told.items():
            low = self.adapter.lowrank[key]
            if form.kind == "stack":
                maybe = low.extra.get("candidates")
                told = (
                    {f"{form.target}.{k}": (int(r), float(s)) for k, (r, s) in maybe.items()}
                    if maybe
                    else {key: (low.rank, low.alpha)}
                )
                parameters |= set(told)
                result |= told
            elif not (form.plain and form.lead.endswith(OUT)):
                tied = low.extra.get("tied", ()) if form.plain and form.kind == "embedding" else ()
                for name in (form.target, *(str(t).removesuffix(".weight") for t in tied)):
                    result[name] = (low.rank, low.alpha)
        if parameters:
            self.fields["target_parameters"] = sorted(parameters)
        return result

    def _biases(self) -> set[str]:
        """Write what acts on biases: of B (lora_bias), or the trained ones of the base."""
        layers = {
            f"{f.module}.bias": (k, f) for k, f in self.told.items() if f.kind in ("linear", "conv")
        }
        full = {k for k, v in self.adapter.full.items() if k in layers and is_float(v.value)}
        dense = {k: v for k, v in self.adapter.entries.items() if isinstance(v, Dense)}
        fits = {k for k, v in dense.items() if k in layers and self._is_bias_of(v, *layers[k])}
        needed = {k for k, (_, f) in layers.items() if not _in_proj(f)}
        odd = self.fields["use_dora"] or "init_lora_weights" in self.fields  # PEFT refuses both
        say = bool(fits) and needed <= fits | full and not odd
        if say:
            self.fields["lora_bias"] = True
            for key, (owner, form) in layers.items():
                size = self.adapter.lowrank[owner].b.shape[-2]
                value = dense[key].value if key in fits else np.zeros(size, np.float32)
                self._put(key, f"{PREFIX}{form.lead}.lora_B.bias", value)
        for key, entry in dense.items():
            if say and key in fits:
                continue
            name = f"{OWN}{key}.dense"
            self._put(key, name, entry.value)
            layout = entry.layout.to_json() if entry.layout else None
            self.described[key] = {
                "dense": name,
                "scale": float(entry.scale),
                "layout": layout,
                "extra": entry.extra,
            }
            self.notes.append(f"PEFT will not see the change of {key!r}: it is a whole ΔW")
        whole = {k.rpartition(".")[0] for k in self.adapter.full if k.endswith(".weight")}
        for key, bias in self.adapter.full.items():
            module, _, leaf = key.rpartition(".")
            if key in full:
                self._put(key, f"{PREFIX}{layers[key][1].lead}.{WRAPPER}.bias", bias.value)
                self.fields.setdefault("bias", "lora_only")
            elif leaf == "bias" and module and module not in whole and is_float(bias.value):
                self._put(key, PREFIX + key, bias.value)
                self.fields["bias"] = "all"
                full.add(key)
        return full

    def _is_bias_of(self, entry: Dense, owner: str, form: Form) -> bool:
        """True where lora_bias says just this entry."""
        low = self.adapter.lowrank[owner]
        scale = low.scale / 2 if form.plain and form.lead.endswith(OUT) else low.scale
        return (
            entry.value.shape == (low.b.shape[-2],)
            and entry.scale == scale
            and entry.layout is None
            and not entry.extra
            and not _in_proj(form)
        )

    def _rows(self, busy: set[str]) -> None:
        """Trained rows of embeddings."""
        said = {}
        for key, entry in self.adapter.entries.items():
            if not isinstance(entry, Rows):
                continue
            module, _, leaf = key.rpartition(".")
            good = len(set(entry.index)) == len(entry.index) and min(entry.index, default=0) >= 0
            if leaf == "weight" and module and good and module not in busy:
                name = f"{PREFIX}{module}{DELTA}"
                said[module] = list(entry.index)
            else:
                name = f"{OWN}{key}.rows"
                self.notes.append(f"PEFT will not see the rows of {key!r}: no module of its own")
            self._put(key, name, entry.value)
            self.described[key] = {"rows": name, "index": list(entry.index)}
        if said:
            self.fields["trainable_token_indices"] = said

    def _put(self, key: str, name: str, array: Array) -> None:
        if array.size == 0:
            raise LoraFxError(f"{key!r} has an empty tensor, shape {list(array.shape)}")
        if is_float(array) and not finite(array):
            raise LoraFxError(f"{key!r} has NaN or infinite values", "training may have diverged")
        self.tensors[name] = array


def _in_proj(form: Form) -> bool:
    """True for the in_proj of an attention, whose bias of B PEFT does not apply."""
    return form.plain and form.kind == "linear" and not form.lead.endswith(OUT)


def _one_each(told: Mapping[str, Form]) -> None:
    """Raise for two updates of one layer."""
    layers: dict[str, str] = {}
    for key, form in told.items():
        if form.lead in layers:
            raise LoraFxError(
                f"the updates of {layers[form.lead]!r} and {key!r} both act on the module "
                f"{form.module!r}; expected one",
                "one tensor has one update; merge the two first",
            )
        layers[form.lead] = key


def _describe(low: LowRank, form: Form) -> dict[str, Any]:
    """What the config does not say of one update, to read it back exactly."""
    entry: dict[str, Any] = {
        "layout": low.layout.to_json() if low.layout else None,
        "use": low.use,
        "extra": low.extra,
    }
    if form.swapped:
        entry["swapped"] = True
    if form.kind == "own":  # PEFT's forms take these from the config, which people edit
        entry |= {"rank": low.rank, "alpha": float(low.alpha), "variant": low.variant}
    return entry
