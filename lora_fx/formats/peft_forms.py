"""The form in which PEFT can say an update, if any, and its tensors in that form.

linear, conv, embedding and stack (a parameter of target_parameters) are PEFT's, under
`base_model.model.`; own is ours, under `lora_fx.`, for what PEFT cannot say. Shapes and names are
those of `lora_fx.formats.peft_names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.dtypes import Array
from lora_fx.formats.peft_names import PREFIX, WRAPPER, unwrapped
from lora_fx.formats.peft_stack import packed
from lora_fx.targets.target import split_use

_LINEAR_OPS = frozenset(("", "linear", "addmm", "matmul", "mm"))
_CONV_OPS = frozenset(("", "conv1d", "conv2d", "conv3d"))
_STACK = frozenset(("op", "lead", "of", "module", "depth", "candidates"))
OUT = f".{WRAPPER}.out_proj"
"""Where PEFT keeps the out_proj of a MultiheadAttention, after the module's name."""


@dataclass(frozen=True)
class Form:
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


def forms_of(updates: Mapping[str, LowRank]) -> dict[str, Form]:
    """The form of every update; those that need a partner look for it among the others."""
    leads = {str(u.extra["lead"]): k for k, u in updates.items() if _as_read(u, "lead")}
    levels: dict[str, int] = {}
    for lead, key in leads.items():
        if updates[key].extra.get("op") == "experts":
            levels[unwrapped(lead)] = levels.get(unwrapped(lead), 0) + 1
    result = {}
    for key, low in updates.items():
        lead = str(low.extra.get("lead", ""))
        if leads.get(lead) == key and low.extra.get("op") == "experts":
            whole = levels[unwrapped(lead)] == low.extra.get("of")
            if whole and set(low.extra) <= _STACK and low.magnitude is None:
                result[key] = Form("stack", lead, plain=True)
                continue
        elif leads.get(lead) == key and set(low.extra) == {"lead"} and low.magnitude is None:
            first = lead.removesuffix(OUT)
            one, two = (updates.get(leads.get(name, "")) for name in (first, f"{first}{OUT}"))
            if one and two and one.rank == two.rank and 2 * one.alpha == two.alpha:
                result[key] = Form("linear", lead, plain=True)
                continue
        result[key] = form_of(key, low)
    return result


def _as_read(low: LowRank, field: str) -> bool:
    """True for an update as the reader gave it, with this field in `extra`."""
    return low.layout is None and not low.use and field in low.extra


def form_of(key: str, low: LowRank) -> Form:
    """The form in which PEFT can say an update by itself, or own with the reason."""
    name = key
    tied = low.extra.get("tied")
    if low.use.startswith("op:"):
        return Form("own", why=f"it acts on one use only ({low.use})")
    if split_use(key)[1].startswith("call:"):
        return Form("own", why="it acts on one call of several")
    if low.use:
        name = low.use
    elif tied and not (isinstance(tied, list) and _as_read(low, "tied")):
        return Form("own", why="it acts on several modules that share the tensor")
    if key.endswith("]"):
        return Form("own", why="it covers a part of the tensor")
    if not name.endswith(".weight"):
        return Form("own", why="the parameter is not the weight of a module")
    if low.a.ndim != 2:
        return Form("own", why="it is a stack of matrices or a grouped convolution")
    if tied and not low.use:
        if set(low.extra) == {"op", "tied"} and low.magnitude is None:
            return Form("embedding", name.removesuffix(".weight"), plain=True)
        return Form("own", why="it acts on several modules that share the tensor")
    return _of_layout(name.removesuffix(".weight"), low)


def _of_layout(module: str, low: LowRank) -> Form:
    op, layout = str(low.extra.get("op", "")), low.layout
    odd = Form("own", why=f"PEFT has no such layer (op {op or 'unknown'})")
    if layout is None:
        if op == "embedding":
            return Form("embedding", module)
        if low.extra.get("kernel"):
            return Form("conv", module)
        return Form("linear", module) if op in _LINEAR_OPS else odd
    if layout.batch or layout.shape != layout.stored:
        return odd
    if len(layout.stored) == 2:
        transposed = layout.out == (1,)
        if op == "embedding":
            if not transposed and low.magnitude is not None:
                return Form("own", why="its magnitude belongs to the rows of the table")
            return Form("embedding", module, swapped=not transposed)
        return Form("linear", module, transposed) if op in _LINEAR_OPS else odd
    # Axes of size 1 may stand anywhere in a layout; they do not change the order of elements.
    wide = [i for i in layout.in_ if layout.shape[i] != 1]
    if 3 <= len(layout.stored) <= 5 and layout.out == (0,) and wide == sorted(wide):
        return Form("conv", module) if op in _CONV_OPS else odd
    return odd


def to_tensors(form: Form, low: LowRank) -> dict[str, Array]:
    """A, B and the magnitude under their names and in the shapes of PEFT."""
    a_name, b_name = form.names
    if form.kind == "stack":
        a, b = packed(low)
    elif form.swapped:
        a, b = low.b.T, low.a.T
    elif form.kind == "conv":
        kernel = low.layout.stored[2:] if low.layout else tuple(low.extra["kernel"])
        a = low.a.reshape(low.rank, -1, *kernel)
        b = low.b.reshape(*low.b.shape, *(1 for _ in kernel))
    else:
        a, b = low.a, low.b
    result = {a_name: a, b_name: b}
    if low.magnitude is not None:
        shape = (1, -1, *(1 for _ in range(a.ndim - 2))) if form.kind == "conv" else (-1,)
        result[f"{PREFIX}{form.lead}.lora_magnitude_vector"] = low.magnitude.reshape(shape)
    for name in low.extra.get("tied", ()) if form.plain and form.kind == "embedding" else ():
        lead = f"{PREFIX}{str(name).removesuffix('.weight')}.lora_"
        result |= {f"{lead}A.weight": np.ascontiguousarray(b.T)}
        result |= {f"{lead}B.weight": np.ascontiguousarray(a.T)}
    return result
