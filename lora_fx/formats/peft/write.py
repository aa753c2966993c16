"""From an Adapter to the tensors and config of PEFT; see `lora_fx.formats.peft.file`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import FileLayer
from lora_fx.adapter.updates import Dense, ReplacedRows, is_on_base, is_plain, name_of, to_json
from lora_fx.adapter.variant import (
    is_lora_or_dora,
    named_variant,
    slots_of,
    variant_of,
)
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, stamp
from lora_fx.files.tensor_files import finite, is_float
from lora_fx.formats.peft.config import KASA, VERSION, build_config, conflicts
from lora_fx.formats.peft.names import DELTA, OWN, PREFIX, TAKEN, WRAPPER, packed, unwrapped
from lora_fx.targets.target import split_use
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
            elif not (form.plain and form.lead.endswith(OUT)):
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
        needed = {k for k, (_, f) in layers.items() if not _in_proj(f)}
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
        scale = low.scale / 2 if form.plain and form.lead.endswith(OUT) else low.scale
        return (
            entry.value.shape == (low.b.shape[-2],)
            and entry.scale == scale
            and entry.layout is None
            and not _in_proj(form)
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


def _in_proj(form: PeftForm) -> bool:
    """True for the in_proj of an attention, whose bias of B PEFT does not apply."""
    return form.plain and form.kind == "linear" and not form.lead.endswith(OUT)


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


# The form in which PEFT can say an update, if any, and its tensors in that form.
#
# linear, conv, embedding and stack (a parameter of target_parameters) are PEFT's, under
# `base_model.model.`; own is ours, under `lora_fx.`, for what PEFT cannot say. Shapes and names are
# those of `lora_fx.formats.peft.names`.


# Of torch, and of ONNX: gemm, conv and the products with 4-bit weights.
_LINEAR_OPS = ("", "linear", "addmm", "matmul", "mm", "gemm", "matmul_nbits", "matmul_bnb4")
_CONV_OPS = ("", "conv1d", "conv2d", "conv3d", "conv")
OUT = f".{WRAPPER}.out_proj"
"""Where PEFT keeps the out_proj of a MultiheadAttention, after the module's name."""


@dataclass(frozen=True)
class PeftForm:
    """How one update is written.

    Attributes:
        kind: linear, conv, embedding, stack or own.
        lead: Where PEFT's layer is, with its wrappers; empty for own.
        transposed: True for a weight stored [in, out] (HF Conv1D).
        swapped: True where A is bᵀ and B is aᵀ: the update of a lookup in a head's layout.
        plain: True where PEFT's names and config say all; no JSON of ours is needed.
        why: Why it is own.
    """

    kind: str
    lead: str = ""
    transposed: bool = False
    swapped: bool = False
    plain: bool = False
    why: str = ""

    @property
    def module(self) -> str:
        """The model's name of the layer."""
        return unwrapped(self.lead)

    @property
    def target(self) -> str:
        """The name that PEFT compares with target_modules and the patterns."""
        return unwrapped(self.lead.removesuffix(OUT))

    @property
    def names(self) -> tuple[str, str]:
        """Tensor names of A and B in PEFT's terms."""
        lead = f"{PREFIX}{self.lead}.lora_"
        if self.kind == "embedding":
            return f"{lead}embedding_A", f"{lead}embedding_B"
        return f"{lead}A.weight", f"{lead}B.weight"


def forms_of(updates: Mapping[str, LowRank]) -> dict[str, PeftForm]:
    """The form of every update; those that need a partner look for it among the others."""
    leads = {
        update.origin.layer.lead: key
        for key, update in updates.items()
        if update.origin.layer and _as_read(update)
    }
    levels = Counter(
        unwrapped(lead) for lead, key in leads.items() if updates[key].origin.op == "experts"
    )
    result = {}
    for key, low in updates.items():
        origin = low.origin
        layer = origin.layer or FileLayer("")
        lead = layer.lead
        more = origin.kernel or origin.tied or low.mutated or low.magnitude is not None
        if leads.get(lead) == key and origin.op == "experts":
            if levels[unwrapped(lead)] == layer.of and not more:
                result[key] = PeftForm("stack", lead, plain=True)
                continue
        elif leads.get(lead) == key and not origin.op and not more:
            first = lead.removesuffix(OUT)
            one, two = (updates.get(leads.get(name, "")) for name in (first, f"{first}{OUT}"))
            if one and two and one.rank == two.rank and 2 * one.alpha == two.alpha:
                result[key] = PeftForm("linear", lead, plain=True)
                continue
        result[key] = form_of(key, low)
    return result | _stacks(updates, result)


def _stacks(updates: Mapping[str, LowRank], forms: Mapping[str, PeftForm]) -> dict[str, PeftForm]:
    """Forms of the stacks that PEFT can have as parameters, and of what lies inside their modules.

    PEFT wraps the parameters of a module in the order in which it defines them, the first
    innermost. The updates of a model come in that order.
    """
    if any(low.magnitude is not None or low.mutated for low in updates.values()):
        return {}  # PEFT has no such start, and no DoRA, for parameters
    modules: dict[str, list[str]] = {}
    for key, low in updates.items():
        layout = low.layout
        three = layout and len(layout.stored) == 3 and layout.shape == layout.stored
        whole = layout and three and layout.batch == (0,)
        origin = low.origin
        loose = not (layout or origin.layer) and origin.op == "experts" and low.a.ndim == 3
        if forms[key].kind == "own" and (whole or loose) and _STACK.fullmatch(key) and not low.use:
            modules.setdefault(key.rpartition(".")[0], []).append(key)
    result = {}
    for module, keys in modules.items():
        # PEFT has one rank and alpha a name, be it a parameter's or a module's
        if any(f.module == module or f.target in keys for f in forms.values()):
            continue
        for depth, key in enumerate(reversed(keys)):
            lead = module + f".{WRAPPER}" * depth
            result[key] = PeftForm("stack", lead, plain=not updates[key].layout)
        for key, form in forms.items():
            if form.lead.startswith(f"{module}."):
                inner = form.lead.removeprefix(module)
                result[key] = replace(form, lead=module + f".{WRAPPER}" * len(keys) + inner)
    for key, form in forms.items() if result else ():
        named = key == f"{form.module}.weight" and key.split(".")[-2] in TAKEN
        if named and form.kind == "linear" and not (form.transposed or form.swapped):
            result[key] = replace(result.get(key, form), kind="stack")
    return result


_STACK = re.compile(r"[^\[\]@]+\.[^\[\]@.]+")


def _as_read(low: LowRank) -> bool:
    """True for an update as the reader gave it."""
    return low.layout is None and not low.use


def form_of(key: str, low: LowRank) -> PeftForm:
    """The form in which PEFT can say an update by itself, or own with the reason."""
    origin = low.origin
    name = low.use or key
    shared = origin.tied and not low.use
    if low.use.startswith("op:"):
        return PeftForm("own", why=f"it acts on one use only ({low.use})")
    if split_use(key)[1].startswith("call:"):
        return PeftForm("own", why="it acts on one call of several")
    if shared and not (origin.twins and _as_read(low)):
        return PeftForm("own", why="it acts on several modules that share the tensor")
    if key.endswith("]"):
        return PeftForm("own", why="it covers a part of the tensor (convert --fuse --base)")
    if not name.endswith(".weight"):
        return PeftForm("own", why="the parameter is not the weight of a module")
    if origin.op == "experts" and not low.layout and low.a.ndim == 3:
        return PeftForm("linear", name.removesuffix(".weight"))  # as SGLang has them
    if low.a.ndim != 2:
        return PeftForm("own", why="it is a stack of matrices or a grouped convolution")
    if shared:
        odd = origin.kernel or low.mutated or origin.layer or low.magnitude is not None
        if origin.op and not odd:
            return PeftForm("embedding", name.removesuffix(".weight"), plain=True)
        return PeftForm("own", why="it acts on several modules that share the tensor")
    return _of_layout(name.removesuffix(".weight"), low)


def module_form(key: str, low: LowRank, refused: Callable[[str, str], LoraFxError]) -> PeftForm:
    """The form of an update in a file of modules' weights alone, stored with out first."""
    if not is_on_base(low) or not is_lora_or_dora(low):
        raise refused(key, f"it is {name_of(low)}")
    form = form_of(key, low)
    if form.kind == "embedding":
        raise refused(key, "it is the update of an embedding")
    if not form.module:
        raise refused(key, form.why)
    if form.transposed:
        raise refused(key, "the weight is stored [in, out]")
    return form


def _of_layout(module: str, low: LowRank) -> PeftForm:
    op = low.origin.op
    layout = low.layout
    odd = PeftForm("own", why=f"PEFT has no such layer (op {op or 'unknown'})")
    if layout is None:
        if op == "embedding":
            return PeftForm("embedding", module)
        if low.origin.kernel:
            return PeftForm("conv", module)
        return PeftForm("linear", module) if op in _LINEAR_OPS else odd
    if layout.batch or layout.shape != layout.stored:
        return odd
    if len(layout.stored) == 2:
        transposed = layout.out == (1,)
        if op == "embedding":
            if not transposed and low.magnitude is not None:
                return PeftForm("own", why="its magnitude belongs to the rows of the table")
            return PeftForm("embedding", module, swapped=not transposed)
        return PeftForm("linear", module, transposed) if op in _LINEAR_OPS else odd
    # Axes of size 1 may stand anywhere in a layout; they do not change the order of elements.
    wide = [i for i in layout.in_ if layout.shape[i] != 1]
    if 3 <= len(layout.stored) <= 5 and layout.out == (0,) and wide == sorted(wide):
        return PeftForm("conv", module) if op in _CONV_OPS else odd
    return odd


def to_tensors(form: PeftForm, low: LowRank) -> dict[str, Array]:
    """A, B and the magnitude under their names and in the shapes of PEFT."""
    a_name, b_name = form.names
    if form.kind == "stack":
        a, b = packed(low)
    elif form.swapped:
        a, b = low.b.T, low.a.T
    elif form.kind == "conv":
        kernel = low.layout.stored[2:] if low.layout else low.origin.kernel
        a = low.a.reshape(low.rank, -1, *kernel)
        b = low.b.reshape(*low.b.shape, *(1 for _ in kernel))
    else:
        a, b = low.a, low.b
    result = {a_name: a, b_name: b}
    if low.magnitude is not None:
        shape = (1, -1, *(1 for _ in range(a.ndim - 2))) if form.kind == "conv" else (-1,)
        result[f"{PREFIX}{form.lead}.lora_magnitude_vector"] = low.magnitude.reshape(shape)
    for name in low.origin.twins if form.plain and form.kind == "embedding" else ():
        lead = f"{PREFIX}{name.removesuffix('.weight')}.lora_"
        result |= {f"{lead}A.weight": np.ascontiguousarray(b.T)}
        result |= {f"{lead}B.weight": np.ascontiguousarray(a.T)}
    return result


# What one config of PEFT can say of a whole adapter, and what not.


def split_full(full: Mapping[str, Full], modules: set[str]) -> tuple[list[str], dict[str, str]]:
    """Modules that PEFT can save whole, and {key: reason} of the tensors it cannot."""
    holders = {k: k.rpartition(".")[0] for k in full}
    weighty = {holders[k] for k in full if k.endswith(".weight")}
    odd: dict[str, str] = {}
    for key, holder in holders.items():
        clash = next((m for m in sorted(modules) if holder and conflicts(holder, m)), None)
        if clash:
            odd[key] = f"modules_to_save {holder!r} would take the update off {clash!r}"
        elif not holder or holder not in weighty:
            odd[key] = "it is not a module with its weight, and PEFT saves modules whole"
    chosen = sorted({h for k, h in holders.items() if k not in odd})
    # A module inside a saved one is saved with it; listing both makes PEFT wrap it twice.
    return [m for m in chosen if not any(m.startswith(f"{o}.") for o in chosen)], odd


def partly_held(whole: list[str], full: Mapping[str, Full]) -> Iterator[str]:
    """Notes on modules of which the adapter may hold only some tensors."""
    for module in whole:
        leaves = sorted(k.removeprefix(f"{module}.") for k in full if k.startswith(f"{module}."))
        if leaves != ["bias", "weight"]:
            yield (
                f"PEFT will load modules_to_save {module!r} only if the module has no other "
                f"tensors than {', '.join(leaves)}"
            )


def one_own_variant(updates: Mapping[str, LowRank]) -> str:
    """The one variant that PEFT does not have; empty where PEFT has those of all updates."""
    keys: dict[str, str] = {}
    for key, low in updates.items():
        variant = variant_of(low)
        if not variant.peft_type:
            keys.setdefault(variant.name, key)
    if len(keys) > 1:
        (one, first), (other, second), *_ = keys.items()
        raise LoraFxError(
            f"{first!r} is of variant {one!r} and {second!r} of variant {other!r}; expected one: a "
            "file says one for the whole adapter",
            "save them as two adapters",
        )
    return next(iter(keys), "")


def all_or_none(has: Mapping[str, bool], what: str = "DoRA") -> bool:
    """True where every update has it; raises where only some do."""
    if any(has.values()) and not all(has.values()):
        yes, no = (next(k for k, v in has.items() if v is want) for want in (True, False))
        raise LoraFxError(
            f"{yes!r} is {what} and {no!r} is not; expected one kind: PEFT has one flag for the "
            "whole adapter",
            "save them as two adapters",
        )
    return any(has.values())


def one_variant(updates: Mapping[str, LowRank]) -> str:
    """The one scale of all updates, lora or rslora; how an update learns is not in the file."""
    first: dict[str, str] = {}
    for key, low in updates.items():
        if not variant_of(low).peft_type:
            continue
        name = named_variant(low.variant).name
        if name == "dora":  # an update with a magnitude is DoRA's; its variant says the scale
            raise LoraFxError(
                f"the update of {key!r} is of variant 'dora'; expected lora or rslora, and a "
                "magnitude",
                "insert(variant='dora') makes both",
            )
        first.setdefault(name if name == "rslora" else "lora", key)
    if len(first) > 1:
        raise LoraFxError(
            f"{first['lora']!r} is lora and {first['rslora']!r} is rslora; expected one variant: "
            "PEFT has one flag for the whole adapter",
            "save them as two adapters",
        )
    return next(iter(first), "lora")
