"""Conversion of an Adapter to the tensors and config of PEFT; see `lora_fx.formats.peft.file`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lora_fx.adapter.adapter import INVOCATION, Adapter
from lora_fx.adapter.entry_json import to_json
from lora_fx.adapter.factor_tensors import slots_of
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, ReplacedRows, is_plain, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, stamp
from lora_fx.files.tensor_files import finite, is_float
from lora_fx.formats.peft import hada_tensors, vera_vectors
from lora_fx.formats.peft.build_config import build_config
from lora_fx.formats.peft.config import ALORA, KASA, VERSION
from lora_fx.formats.peft.form import PeftForm, forms_of, to_tensors
from lora_fx.formats.peft.modules_to_save import partly_held, split_full
from lora_fx.formats.peft.names import DELTA, OWN, PREFIX, WRAPPER
from lora_fx.formats.peft.one_variant import all_or_none, one_own_variant, one_variant
from lora_fx.formats.unsupported import way_to_keep
from lora_fx.probe.carried import FIELD
from lora_fx.text import Json

_DERIVED = ("notes", "untouched_targets", "fan_in_fan_out", "peft", FIELD, INVOCATION)
"""Metadata fields that reading derives from the config, the tensors, and other files."""
Encoded = tuple[dict[str, Array], Json, Json, tuple[str, ...]]


def encode(adapter: Adapter) -> Encoded:
    """Return the tensors, the config, lora-fx's JSON, and the notes of an adapter."""
    for key, entry in adapter.entries.items():
        if not isinstance(entry, (LowRank, Full, Dense, ReplacedRows)):
            raise LoraFxError(
                f"{key!r} is {name_of(entry)}, which peft_type LORA cannot store",
                way_to_keep(entry),
            )
    return _of_own_type(adapter) or _Writer(adapter).run()


def _of_own_type(adapter: Adapter) -> Encoded | None:
    """Return an adapter as PEFT's type LOHA or VERA; None where that cannot hold all of it."""
    metadata = _kept(adapter)
    entries = adapter.entries.items()
    if not adapter.lowrank:
        return None
    if not any(hada_tensors.refusal(key, entry) for key, entry in entries):
        return (*hada_tensors.encode(adapter, metadata), ())
    if any(
        vera_vectors.refusal(key, entry) for key, entry in entries
    ) or vera_vectors.refusal_of_all(adapter):
        return None
    return (*vera_vectors.encode(adapter, metadata), ())


def _why_own(adapter: Adapter, key: str) -> str:
    """Return why PEFT cannot read an update of a variant that is not of its type LORA."""
    update = adapter.lowrank[key]
    refusals = {"loha": hada_tensors.refusal, "vera": vera_vectors.refusal}
    variant = variant_of(update).name
    if variant not in refusals:
        return f"PEFT has no variant {variant!r}"
    why = refusals[variant](key, update)
    if not why and variant == "vera":
        why = vera_vectors.refusal_of_all(adapter)
    return why or f"PEFT's type {variant.upper()} cannot hold all of this adapter"


def _kept(adapter: Adapter) -> Json:
    """Return the metadata that a file keeps."""
    return {name: value for name, value in adapter.metadata.items() if name not in _DERIVED}


class _Writer:
    """The writer of one adapter.

    Attributes:
        tensors: What the file holds, by name.
        rows: Our own JSON, one object a key.
        notes: What PEFT will not see.
        fields: Fields of the config beside those that every config has.
        forms: How each update is written.
        peft_forms: Those of the updates that PEFT can apply.
        group_size: The inputs that QA-LoRA reads as one; 0 for plain LoRA.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.tensors: dict[str, Array] = {}
        self.rows: Json = {}
        self.notes: list[str] = []
        self.fields: Json = {}
        self.updates = adapter.lowrank
        self.forms = forms_of(self.updates)
        variant = one_own_variant(self.updates)
        if variant:
            self.fields["peft_type"] = f"{OWN}{variant}"
        for key, update in self.updates.items():
            if not variant_of(update).peft_type:
                self.forms[key] = PeftForm("own", why=_why_own(adapter, key))
        self.peft_forms = {key: form for key, form in self.forms.items() if form.kind != "own"}
        self.has_stacks = any(form.kind == "stack" for form in self.peft_forms.values())
        self.group_size = self._one_group_size()

    def run(self) -> Encoded:
        """Write everything, in the order of the file."""
        _check_one_update_a_layer(self.peft_forms)
        self._set_flags(one_variant(self.updates))
        for key, update in self.updates.items():
            self._write_update(key, update)
        written_biases = self._write_changes_of_biases()
        names_of_peft = {form.target for form in self.peft_forms.values()}
        saved_modules = self._write_full(written_biases, names_of_peft)
        self._write_rows(names_of_peft | set(saved_modules))
        if not self.peft_forms:
            self.notes.append("PEFT will not load this adapter: PEFT can apply none of its updates")

        metadata = _kept(self.adapter)
        stacks = {form.target for form in self.peft_forms.values() if form.kind == "stack"}
        config = build_config(
            self._numbers(), names_of_peft - stacks, saved_modules, metadata, self.fields
        )
        ours = {**stamp(), "entries": self.rows, "metadata": metadata}
        return self.tensors, config, ours, tuple(self.notes)

    def _one_group_size(self) -> int:
        """Return QA-LoRA's group size, one for the whole adapter; 0 for plain LoRA."""
        sizes = set[int]()
        for key, form in self.peft_forms.items():
            update = self.updates[key]
            size = 0
            if form.kind == "linear" and is_plain(update):
                size = variant_of(update).constant_over
            sizes.add(size)
        if len(sizes) > 1:
            self.notes.append(
                "the updates have several QA-LoRA group sizes, so they are written as plain LoRA "
                "with the same ΔW"
            )
            return 0
        return max(sizes, default=0)

    def _set_flags(self, scale_variant: str) -> None:
        """Set the config's flags, each of which applies to the whole adapter."""
        updates = {key: self.updates[key] for key in self.peft_forms}
        has_magnitude = {key: update.magnitude is not None for key, update in updates.items()}
        self.fields["use_rslora"] = scale_variant == "rslora"
        self.fields["fan_in_fan_out"] = self._are_all_stored_in_out() and not self.has_stacks
        self.fields["use_dora"] = all_or_none(has_magnitude)
        if self.group_size:
            self.fields["use_qalora"] = True
            self.fields["qalora_group_size"] = self.group_size
        self._set_start()
        if self.adapter.invocation:
            self._set_invocation()
        if any(updates[key].origin.tied for key, form in self.peft_forms.items() if form.plain):
            self.fields["ensure_weight_tying"] = True

    def _set_invocation(self) -> None:
        """Set the invocation tokens; note what PEFT will not load beside them."""
        self.fields[ALORA] = list(self.adapter.invocation)
        self.fields["task_type"] = "CAUSAL_LM"
        others = [key for key, form in self.peft_forms.items() if form.kind != "linear"]
        if others or self.group_size or self.fields["use_dora"]:
            self.notes.append(
                "PEFT will not load this adapter: its aLoRA is for linear layers, as plain LoRA"
            )

    def _are_all_stored_in_out(self) -> bool:
        """Whether the weights of all linear layers are stored [in, out]; False without any."""
        as_read = bool(self.adapter.metadata.get("fan_in_fan_out"))
        in_out = [
            as_read if self.updates[key].layout is None else form.transposed
            for key, form in self.peft_forms.items()
            if form.kind == "linear"
        ]
        return bool(in_out) and all(in_out)

    def _set_start(self) -> None:
        """Set the config's init if it changed the base of linear layers; skip embeddings."""
        starts = {
            key: self.updates[key].mutated
            for key, form in self.peft_forms.items()
            if form.kind != "embedding"
        }
        start = next((name for name in starts.values() if name), "")
        if not start:
            return
        all_or_none({key: name == start for key, name in starts.items()}, start)
        if start == "kasa":
            self.fields["kasa_config"] = KASA
        else:
            self.fields["init_lora_weights"] = start

    def _write_update(self, key: str, update: LowRank) -> None:
        """Write the tensors of a low-rank update, and a JSON row if PEFT's names do not suffice."""
        form = self.forms[key]
        if form.kind == "own":
            names, tensors = self._own_tensors(key, update)
            self.notes.append(f"PEFT will not load the update of {key!r}: {form.why}")
        else:
            names, tensors = self._peft_tensors(form, update)
        for name, tensor in tensors.items():
            self._put(key, name, tensor)
        if form.plain:
            return

        # PEFT's forms take the numbers from the config, which people edit
        numbers = ("rank", "alpha", "variant") if form.kind == "own" else ()
        row: Json = {**names, **to_json(update, "layout", "use", "extra", *numbers)}
        if form.swapped:
            row["swapped"] = True
        self.rows[key] = row

    def _peft_tensors(
        self, form: PeftForm, update: LowRank
    ) -> tuple[dict[str, str], dict[str, Array]]:
        """Return field → name, and name → tensor, of an update under PEFT's names."""
        a_name, b_name = form.names
        a = variant_of(update).tensors(update)["a"] if self.group_size else update.a
        tensors = to_tensors(form, replace(update, a=a))
        if update.mutated == "kasa":  # a holds the diagonal already
            tensors[f"{PREFIX}{form.lead}.lora_diag"] = np.ones(update.rank, np.float32)
        return {"a": a_name, "b": b_name}, tensors

    def _own_tensors(self, key: str, update: LowRank) -> tuple[dict[str, str], dict[str, Array]]:
        """Return field → name, and name → tensor, of an update under names that PEFT ignores."""
        lead = f"{OWN}{key}"
        if not variant_of(update).peft_type:
            return self._variant_tensors(key, update)
        names = {"a": f"{lead}.lora_A", "b": f"{lead}.lora_B"}
        tensors = {names["a"]: update.a, names["b"]: update.b}
        if update.magnitude is not None:
            names["magnitude"] = f"{lead}.magnitude"
            tensors[names["magnitude"]] = update.magnitude.reshape(-1)
        return names, tensors

    def _variant_tensors(
        self, key: str, update: LowRank
    ) -> tuple[dict[str, str], dict[str, Array]]:
        """Return field → name, and name → tensor, of an update whose variant PEFT lacks.

        A tensor that does not train may be that of many updates. It is stored once.
        """
        names: dict[str, str] = {}
        tensors: dict[str, Array] = {}
        for slot in slots_of(key, update):
            stored_name = None if slot.trained else self._stored_as(slot.value)
            name = stored_name or f"{OWN}{key}.{slot.field}"
            names[slot.field] = name
            tensors[name] = slot.value
        return names, tensors

    def _stored_as(self, value: Array) -> str | None:
        """Return the name of an already stored tensor with these values; None without one."""
        for name, stored in self.tensors.items():
            if name.startswith(OWN) and np.array_equal(stored, value):
                return name
        return None

    def _numbers(self) -> dict[str, tuple[int, float]]:
        """Return (rank, alpha) by the names that PEFT compares; set target_parameters too."""
        numbers: dict[str, tuple[int, float]] = {}
        parameters: set[str] = set()
        for key, form in self.peft_forms.items():
            update = self.updates[key]
            alpha = variant_of(update).alpha(update) if self.group_size else update.alpha
            if form.kind == "stack":
                candidates = update.origin.candidates
                of_stack = {f"{form.target}.{leaf}": pair for leaf, pair in candidates.items()}
                of_stack = of_stack or {key: (update.rank, alpha)}
                parameters |= set(of_stack)
                numbers |= of_stack
            elif not form.is_out_proj:
                for name in _names_of_module(form, update):
                    numbers[name] = (update.rank, alpha)
        if parameters:
            self._set_parameters(parameters)
        return numbers

    def _set_parameters(self, parameters: set[str]) -> None:
        """Set target_parameters, and the other fields that PEFT then needs."""
        self.fields["target_parameters"] = sorted(parameters)
        self.fields[VERSION] = self.adapter.metadata.get("peft", {}).get(VERSION)
        layouts = [self.updates[key].layout for key in parameters & set(self.peft_forms)]
        if any(layout and layout.out == (2,) for layout in layouts):
            self.notes.append(
                "PEFT reads stacks [E, in, out] only if their module sets is_transposed, as "
                "gpt-oss does; otherwise convert them with lora-fx convert --format peft "
                "--model-type TYPE"
            )
        if self.adapter.metadata.get("dropout"):
            self.fields["lora_dropout"] = 0.0
            self.notes.append(
                "lora_dropout is 0 in the config, because PEFT has no dropout for parameters"
            )

    def _write_changes_of_biases(self) -> set[str]:
        """Write the updates of biases, and every other full ΔW.

        Returns:
            The keys of the trained biases that are written.
        """
        layers = {
            f"{form.module}.bias": (key, form)
            for key, form in self.peft_forms.items()
            if form.kind in ("linear", "conv")
        }
        trained = {
            key for key, full in self.adapter.full.items() if key in layers and is_float(full.value)
        }
        changes = {
            key: entry for key, entry in self.adapter.entries.items() if isinstance(entry, Dense)
        }
        biases_of_b = {
            key: change
            for key, change in changes.items()
            if key in layers and self._is_bias_of_b(change, *layers[key])
        }
        if self._has_lora_bias(layers, trained, biases_of_b):
            self._write_biases_of_b(layers, biases_of_b)
            changes = {key: change for key, change in changes.items() if key not in biases_of_b}
        self._write_changes(changes)
        return self._write_trained_biases(layers, trained)

    def _has_lora_bias(
        self,
        layers: Mapping[str, tuple[str, PeftForm]],
        trained: set[str],
        biases_of_b: Mapping[str, Dense],
    ) -> bool:
        """Whether lora_bias can express the biases of B, and the config can contain it."""
        if not biases_of_b:
            return False
        needed = {key for key, (_, form) in layers.items() if not form.is_in_proj}
        if not needed <= biases_of_b.keys() | trained:
            return False
        # PEFT refuses lora_bias beside these
        has_start = {"init_lora_weights", "kasa_config"} & set(self.fields)
        return not (self.fields["use_dora"] or has_start or self.has_stacks)

    def _is_bias_of_b(self, change: Dense, owner: str, form: PeftForm) -> bool:
        """Whether lora_bias expresses exactly this change."""
        if form.is_in_proj or change.layout is not None:
            return False
        update = self.updates[owner]
        scale = update.scale / 2 if form.is_out_proj else update.scale
        return change.value.shape == (update.b.shape[-2],) and change.scale == scale

    def _write_biases_of_b(
        self, layers: Mapping[str, tuple[str, PeftForm]], biases_of_b: Mapping[str, Dense]
    ) -> None:
        """Write a bias of B for every layer, because PEFT has one flag for all layers."""
        self.fields["lora_bias"] = True
        for key, (owner, form) in layers.items():
            if key in biases_of_b:
                value = biases_of_b[key].value
            else:
                value = np.zeros(self.updates[owner].b.shape[-2], np.float32)
            self._put(key, f"{PREFIX}{form.lead}.lora_B.bias", value)

    def _write_changes(self, changes: Mapping[str, Dense]) -> None:
        """Write full ΔWs under names of lora-fx."""
        for key, change in changes.items():
            name = f"{OWN}{key}.dense"
            self._put(key, name, change.value)
            self.rows[key] = {"dense": name, **to_json(change, "scale", "layout", "extra")}
            self.notes.append(f"PEFT will not load the change of {key!r}: it is a whole ΔW")

    def _write_trained_biases(
        self, layers: Mapping[str, tuple[str, PeftForm]], trained: set[str]
    ) -> set[str]:
        """Write the trained biases of the base, and return their keys.

        Args:
            layers: By the key of the bias: the key of the update, and its form.
            trained: Keys of the biases of such layers.
        """
        modules_with_weight = {
            key.rpartition(".")[0] for key in self.adapter.full if key.endswith(".weight")
        }
        written = set(trained)
        for key, bias in self.adapter.full.items():
            module = key.rpartition(".")[0]
            if key in trained:
                _, form = layers[key]
                name = f"{PREFIX}{form.lead}.{WRAPPER}.bias"
                self.fields.setdefault("bias", "lora_only")
            elif module not in modules_with_weight and _is_bias_of_module(key, bias):
                name = PREFIX + key
                self.fields["bias"] = "all"
                written.add(key)
            else:
                continue
            self._put(key, name, bias.value)
            tied = list(bias.twins) or bias.tied
            self.rows[key] = {"full": name, "tied": tied}  # PEFT takes it for all names
        return written

    def _write_full(self, written_biases: set[str], names_of_peft: set[str]) -> list[str]:
        """Write the other trained tensors, and return the modules that PEFT saves whole."""
        full = {key: value for key, value in self.adapter.full.items() if key not in written_biases}
        # PEFT saves a tensor of several modules with each of them, a bias that it trains too
        tied: dict[str, Full] = {}
        for value in self.adapter.full.values():
            tied |= {twin: value for twin in value.twins if twin not in full}
        full |= tied
        twins = set(tied)
        for value in full.values():
            twins.update(value.twins)

        saved_modules, unsaved = split_full(full, names_of_peft)
        for key, value in full.items():
            if key in twins and key in unsaved:
                continue
            name = f"{OWN}{key}.full" if key in unsaved else PREFIX + key
            self._put(key, name, value.value)
            if key in twins:
                continue
            saved_twins = [twin for twin in value.twins if twin not in unsaved]
            self.rows[key] = {"full": name, "tied": saved_twins or value.tied}
            if key in unsaved:
                self.notes.append(f"PEFT will not load the whole tensor {key!r}: {unsaved[key]}")
        self.notes += partly_held(saved_modules, full)
        return saved_modules

    def _write_rows(self, used_modules: set[str]) -> None:
        """Write the trained rows of embeddings.

        Args:
            used_modules: Modules that have an update already, or are saved whole.
        """
        token_indices = {}
        for key, entry in self.adapter.entries.items():
            if not isinstance(entry, ReplacedRows):
                continue
            module, _, leaf = key.rpartition(".")
            is_free_module = leaf == "weight" and module and module not in used_modules
            if is_free_module and _are_different(entry.index):
                name = f"{PREFIX}{module}{DELTA}"
                token_indices[module] = list(entry.index)
            else:
                name = f"{OWN}{key}.rows"
                self.notes.append(
                    f"PEFT will not load the rows of {key!r}: they need a module without another "
                    "update"
                )
            self._put(key, name, entry.value)
            self.rows[key] = {"rows": name, "index": list(entry.index)}
        if token_indices:
            self.fields["trainable_token_indices"] = token_indices

    def _put(self, key: str, name: str, array: Array) -> None:
        """Add a tensor to the file; raise for an empty tensor, and for NaN."""
        if array.size == 0:
            raise LoraFxError(
                f"{key!r} has an empty tensor, shape {list(array.shape)}", "leave it out"
            )
        if is_float(array) and not finite(array):
            raise LoraFxError(
                f"{key!r} has NaN or infinite values",
                "training may have diverged; use an earlier checkpoint",
            )
        self.tensors[name] = array


def _names_of_module(form: PeftForm, update: LowRank) -> Iterator[str]:
    """Yield the names of a module; for an embedding, also the names of its tied heads."""
    yield form.target
    if form.plain and form.kind == "embedding":
        for twin in update.origin.twins:
            yield twin.removesuffix(".weight")


def _is_bias_of_module(key: str, full: Full) -> bool:
    """Whether a trained tensor is a float bias of a named module."""
    module, _, leaf = key.rpartition(".")
    return leaf == "bias" and module != "" and is_float(full.value)


def _are_different(index: Sequence[int]) -> bool:
    """Whether these row numbers are unique and not negative."""
    return len(set(index)) == len(index) and min(index, default=0) >= 0


def _check_one_update_a_layer(forms: Mapping[str, PeftForm]) -> None:
    """Raise for two updates of one layer."""
    keys: dict[str, str] = {}
    for key, form in forms.items():
        if form.lead in keys:
            raise LoraFxError(
                f"the updates of {keys[form.lead]!r} and {key!r} both act on the module "
                f"{form.module!r}; expected one",
                "merge the two updates first",
            )
        keys[form.lead] = key
