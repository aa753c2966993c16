"""The form in which PEFT can say an update, if any, and its tensors in that form.

linear, conv, embedding and stack (a parameter of target_parameters) are PEFT's, under
`base_model.model.`; own is ours, under `lora_fx.`, for what PEFT cannot say. Shapes and names are
those of `lora_fx.formats.peft.names`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import FileLayer
from lora_fx.adapter.updates import is_on_base, name_of
from lora_fx.adapter.variant import is_lora_or_dora
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft.names import OUT_PROJ, PREFIX, TAKEN, WRAPPER, unwrapped
from lora_fx.formats.peft.stacks import packed
from lora_fx.targets.target import split_use


def is_in_proj(form: PeftForm) -> bool:
    """True for the in_proj of an attention, whose bias of B PEFT does not apply."""
    return form.plain and form.kind == "linear" and not form.lead.endswith(OUT_PROJ)


# Of torch, and of ONNX: gemm, conv and the products with 4-bit weights.
_LINEAR_OPS = ("", "linear", "addmm", "matmul", "mm", "gemm", "matmul_nbits", "matmul_bnb4")


_CONV_OPS = ("", "conv1d", "conv2d", "conv3d", "conv")


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
        return unwrapped(self.lead.removesuffix(OUT_PROJ))

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
            first = lead.removesuffix(OUT_PROJ)
            one, two = (updates.get(leads.get(name, "")) for name in (first, f"{first}{OUT_PROJ}"))
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
