"""From an Adapter to the tensors and config of PEFT; see `lora_fx.formats.peft.file`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, ReplacedRows, is_plain, name_of, to_json
from lora_fx.adapter.variant import slots_of, variant_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, stamp
from lora_fx.files.safetensors import finite, is_float
from lora_fx.formats.peft.build_config import build_config
from lora_fx.formats.peft.config import KASA, VERSION
from lora_fx.formats.peft.form import PeftForm, forms_of, is_in_proj, to_tensors
from lora_fx.formats.peft.modules_to_save import partly_held, split_full
from lora_fx.formats.peft.names import DELTA, OUT_PROJ, OWN, PREFIX, WRAPPER
from lora_fx.formats.peft.one_variant import all_or_none, one_own_variant, one_variant
from lora_fx.text import Json

_DERIVED = ("notes", "untouched_targets", "fan_in_fan_out", "peft")
"""Metadata that reading takes from the config and the tensors."""
Encoded = tuple[dict[str, Array], Json, Json, tuple[str, ...]]


def encode(adapter: Adapter) -> Encoded:
    """The tensors, the config, the JSON of our own, and the notes of an adapter."""
    for key, entry in adapter.entries.items():
        if not isinstance(entry, (LowRank, Full, Dense, ReplacedRows)):
            raise LoraFxError(
                f"{key!r} is {name_of(entry)}; peft_type LORA has no such update",
                "--as lora --rank R makes LoRA of it; kohya files hold LoHa and LoKr",
            )
    return _Writer(adapter).run()


class _Writer:
    """The state of one writing."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.tensors: dict[str, Array] = {}
        self.described: Json = {}
        self.notes: list[str] = []
        self.updates = adapter.lowrank
        self.forms = forms_of(self.updates)
        self.variant = one_own_variant(self.updates)
        for key, low in self.updates.items():
            if not variant_of(low).peft_type:
                self.forms[key] = PeftForm("own", why=f"PEFT has no variant {self.variant!r}")
        self.told = {k: f for k, f in self.forms.items() if f.kind != "own"}
        self.stacks = any(f.kind == "stack" for f in self.told.values())
        self.fields: Json = {"peft_type": f"{OWN}{self.variant}"} if self.variant else {}
        self.group = self._groups()

    def run(self) -> Encoded:
        """Everything, in the order of the file."""
        _one_each(self.told)
        self._flags(one_variant(self.updates))
        for key, low in self.updates.items():
            self._update(key, low)
        biases = self._biases()
        named = {f.target for f in self.told.values()}
        modules = named - {f.target for f in self.told.values() if f.kind == "stack"}
        full = {k: v for k, v in self.adapter.full.items() if k not in biases}
        # PEFT saves a tensor of several modules with each of them, a bias that it trains too
        tied = {twin: v for v in self.adapter.full.values() for twin in v.twins if twin not in full}
        full |= tied
        twins = {*tied, *(twin for v in full.values() for twin in v.twins)}
        whole, odd = split_full(full, named)
        for key, value in full.items():
            if key in twins and key in odd:
                continue
            name = f"{OWN}{key}.full" if key in odd else PREFIX + key
            self._put(key, name, value.value)
            if key in twins:
                continue
            written = [twin for twin in value.twins if twin not in odd]
            self.described[key] = {"full": name, "tied": written or value.tied}
            if key in odd:
                self.notes.append(f"PEFT will not see the whole tensor {key!r}: {odd[key]}")
        self.notes += partly_held(whole, full)
        self._rows(named | set(whole))
        if not self.told:
            self.notes.append("PEFT will not load this adapter: it has no update that it can apply")
        metadata = {k: v for k, v in self.adapter.metadata.items() if k not in _DERIVED}
        config = build_config(self._numbers(), modules, whole, metadata, self.fields)
        ours = {**stamp(), "entries": self.described, "metadata": metadata}
        return self.tensors, config, ours, tuple(self.notes)

    def _flags(self, variant: str) -> None:
        """The config's flags; each is one for the whole adapter."""
        told = {k: self.updates[k] for k in self.told}
        linear = {k: f for k, f in self.told.items() if f.kind == "linear"}
        fan = bool(self.adapter.metadata.get("fan_in_fan_out"))
        turned = [fan if told[k].layout is None else f.transposed for k, f in linear.items()]
        self.fields |= {
            "use_rslora": variant == "rslora",
            "fan_in_fan_out": bool(turned) and all(turned) and not self.stacks,
            "use_dora": all_or_none({k: low.magnitude is not None for k, low in told.items()}),
        }
        if self.group:
            self.fields |= {"use_qalora": True, "qalora_group_size": self.group}
        changed = {k: told[k].mutated for k, f in self.told.items() if f.kind != "embedding"}
        first = next((v for v in changed.values() if v), "")
        all_or_none({k: v == first for k, v in changed.items()} if first else {}, first)
        if first == "kasa":
            self.fields["kasa_config"] = KASA
        elif first:
            self.fields["init_lora_weights"] = first
        if any(u.origin.tied for k, u in told.items() if self.told[k].plain):
            self.fields["ensure_weight_tying"] = True

    def _update(self, key: str, low: LowRank) -> None:
        form = self.forms[key]
        if form.kind == "own":
            names, values = self._own_tensors(key, low)
            self.notes.append(f"PEFT will not see the update of {key!r}: {form.why}")
        else:
            names = dict(zip("ab", form.names, strict=True))
            a = variant_of(low).tensors(low)["a"] if self.group else low.a
            values = to_tensors(form, replace(low, a=a))
            if low.mutated == "kasa":  # a holds the diagonal already
                values[f"{PREFIX}{form.lead}.lora_diag"] = np.ones(low.rank, np.float32)
        for name, value in values.items():
            self._put(key, name, value)
        if not form.plain:
            # PEFT's forms take the numbers from the config, which people edit
            numbers = ("rank", "alpha", "variant") if form.kind == "own" else ()
            row = names | to_json(low, "layout", "use", "extra", *numbers)
            self.described[key] = {**row, "swapped": True} if form.swapped else row

    def _own_tensors(self, key: str, low: LowRank) -> tuple[dict[str, str], dict[str, Array]]:
        """Field → name, and name → tensor, of an update under names that PEFT passes over."""
        lead = f"{OWN}{key}"
        if not variant_of(low).peft_type:
            return self._variant_tensors(key, low)
        names = {"a": f"{lead}.lora_A", "b": f"{lead}.lora_B"}
        values = {names["a"]: low.a, names["b"]: low.b}
        if low.magnitude is not None:
            names["magnitude"] = f"{lead}.magnitude"
            values[names["magnitude"]] = low.magnitude.reshape(-1)
        return names, values

    def _variant_tensors(self, key: str, low: LowRank) -> tuple[dict[str, str], dict[str, Array]]:
        """The same of a variant that PEFT does not have.

        A tensor that does not train may be that of many updates. It is stored once.
        """
        names: dict[str, str] = {}
        values: dict[str, Array] = {}
        for slot in slots_of(key, low):
            stored = None if slot.trained else self._stored_as(slot.value)
            names[slot.field] = stored or f"{OWN}{key}.{slot.field}"
            values[names[slot.field]] = slot.value
        return names, values

    def _stored_as(self, value: Array) -> str | None:
        """The name under which a tensor of these numbers is stored already."""
        for name, other in self.tensors.items():
            if name.startswith(OWN) and np.array_equal(other, value):
                return name
        return None

    def _numbers(self) -> dict[str, tuple[int, float]]:
        """(rank, alpha) by the names that PEFT compares; target_parameters on the way."""
        result: dict[str, tuple[int, float]] = {}
        parameters: set[str] = set()
        for key, form in self.told.items():
            low = self.updates[key]
            alpha = variant_of(low).alpha(low) if self.group else low.alpha
            if form.kind == "stack":
                maybe = {f"{form.target}.{k}": v for k, v in low.origin.candidates.items()}
                told = maybe or {key: (low.rank, alpha)}
                parameters |= set(told)
                result |= told
            elif not (form.plain and form.lead.endswith(OUT_PROJ)):
                twins = low.origin.twins if form.plain and form.kind == "embedding" else ()
                for name in (form.target, *(t.removesuffix(".weight") for t in twins)):
                    result[name] = (low.rank, alpha)
        if parameters:
            self.fields["target_parameters"] = sorted(parameters)
            self.fields[VERSION] = self.adapter.metadata.get("peft", {}).get(VERSION)
            layouts = [self.updates[k].layout for k in parameters & set(self.told)]
            if any(layout and layout.out == (2,) for layout in layouts):
                self.notes.append(
                    "PEFT takes stacks [E, in, out] so where their module says is_transposed, as "
                    "gpt-oss does; else lora-fx convert --format peft --model-type TYPE turns them"
                )
            if self.adapter.metadata.get("dropout"):
                self.fields["lora_dropout"] = 0.0
                self.notes.append("lora_dropout is 0 in the config: PEFT has none for parameters")
        return result

    def _groups(self) -> int:
        """The size of QA-LoRA's groups, one for the whole adapter; 0 for plain LoRA."""
        sizes = {
            variant_of(u).constant_over if form.kind == "linear" and is_plain(u) else 0
            for form, u in ((form, self.updates[k]) for k, form in self.told.items())
        }
        if len(sizes) > 1:
            self.notes.append("QA-LoRA of one group size is not all: plain LoRA says the same")
        return sizes.pop() if len(sizes) == 1 else 0

    def _biases(self) -> set[str]:
        """Write what acts on biases: of B (lora_bias), or the trained ones of the base."""
        layers = {
            f"{f.module}.bias": (k, f) for k, f in self.told.items() if f.kind in ("linear", "conv")
        }
        full = {k for k, v in self.adapter.full.items() if k in layers and is_float(v.value)}
        dense = {k: v for k, v in self.adapter.entries.items() if isinstance(v, Dense)}
        fits = {k for k, v in dense.items() if k in layers and self._is_bias_of(v, *layers[k])}
        needed = {k for k, (_, f) in layers.items() if not is_in_proj(f)}
        starts = {"init_lora_weights", "kasa_config"} & set(self.fields)
        odd = self.fields["use_dora"] or starts or self.stacks  # PEFT refuses these
        say = bool(fits) and needed <= fits | full and not odd
        if say:
            self.fields["lora_bias"] = True
            for key, (owner, form) in layers.items():
                size = self.updates[owner].b.shape[-2]
                value = dense[key].value if key in fits else np.zeros(size, np.float32)
                self._put(key, f"{PREFIX}{form.lead}.lora_B.bias", value)
        for key, entry in dense.items():
            if say and key in fits:
                continue
            name = f"{OWN}{key}.dense"
            self._put(key, name, entry.value)
            self.described[key] = {"dense": name, **to_json(entry, "scale", "layout", "extra")}
            self.notes.append(f"PEFT will not see the change of {key!r}: it is a whole ΔW")
        whole = {k.rpartition(".")[0] for k in self.adapter.full if k.endswith(".weight")}
        for key, bias in self.adapter.full.items():
            module, _, leaf = key.rpartition(".")
            if key in full:
                name = f"{PREFIX}{layers[key][1].lead}.{WRAPPER}.bias"
                self.fields.setdefault("bias", "lora_only")
            elif leaf == "bias" and module and module not in whole and is_float(bias.value):
                name = PREFIX + key
                self.fields["bias"] = "all"
                full.add(key)
            else:
                continue
            self._put(key, name, bias.value)
            tied = list(bias.twins) or bias.tied
            self.described[key] = {"full": name, "tied": tied}  # PEFT takes it for all names
        return full

    def _is_bias_of(self, entry: Dense, owner: str, form: PeftForm) -> bool:
        """True where lora_bias says just this entry."""
        low = self.updates[owner]
        scale = low.scale / 2 if form.plain and form.lead.endswith(OUT_PROJ) else low.scale
        return (
            entry.value.shape == (low.b.shape[-2],)
            and entry.scale == scale
            and entry.layout is None
            and not is_in_proj(form)
        )

    def _rows(self, busy: set[str]) -> None:
        """Trained rows of embeddings."""
        said = {}
        for key, entry in self.adapter.entries.items():
            if not isinstance(entry, ReplacedRows):
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
            raise LoraFxError(
                f"{key!r} has an empty tensor, shape {list(array.shape)}", "leave it out"
            )
        if is_float(array) and not finite(array):
            raise LoraFxError(f"{key!r} has NaN or infinite values", "training may have diverged")
        self.tensors[name] = array


def _one_each(told: Mapping[str, PeftForm]) -> None:
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
