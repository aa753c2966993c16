"""The form in which PEFT can store an update, and the update's tensors in that form.

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

from lora_fx.adapter.lowrank import Factors, LowRank
from lora_fx.adapter.origin import FileLayer
from lora_fx.adapter.updates import is_on_base, name_of
from lora_fx.adapter.variant import is_lora_or_dora
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft.names import OUT_PROJ, PREFIX, TAKEN, WRAPPER, unwrapped
from lora_fx.formats.peft.stacks import packed
from lora_fx.ir.layout import Layout
from lora_fx.targets.keys import split_use

# Of torch, and of ONNX: gemm, conv and the products with 4-bit weights.
_LINEAR_OPS = ("", "linear", "addmm", "matmul", "mm", "gemm", "matmul_nbits", "matmul_bnb4")


_CONV_OPS = ("", "conv1d", "conv2d", "conv3d", "conv")


@dataclass(frozen=True)
class PeftForm:
    """The form of one update in a file.

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
        """The model's name for the layer."""
        return unwrapped(self.lead)

    @property
    def target(self) -> str:
        """The name that PEFT compares with target_modules and the patterns."""
        return unwrapped(self.lead.removesuffix(OUT_PROJ))

    @property
    def is_out_proj(self) -> bool:
        """Whether this is an attention's out_proj, whose update PEFT adds twice."""
        return self.plain and self.lead.endswith(OUT_PROJ)

    @property
    def is_in_proj(self) -> bool:
        """Whether this is an attention's in_proj, whose bias of B PEFT does not apply."""
        return self.plain and self.kind == "linear" and not self.lead.endswith(OUT_PROJ)

    @property
    def names(self) -> tuple[str, str]:
        """PEFT's tensor names of A and B."""
        lead = f"{PREFIX}{self.lead}.lora_"
        if self.kind == "embedding":
            return f"{lead}embedding_A", f"{lead}embedding_B"
        return f"{lead}A.weight", f"{lead}B.weight"


def forms_of(updates: Mapping[str, LowRank]) -> dict[str, PeftForm]:
    """Return the form of every update; some forms depend on the other updates."""
    layers = _LayersOfFile(updates)
    forms = {}
    for key, update in updates.items():
        forms[key] = layers.form(key, update) or form_of(key, update)
    return forms | _stacks(updates, forms)


class _LayersOfFile:
    """Updates that were read from nested PEFT wrappers and have not changed since.

    They go back to where they were, if everything that lay there goes with them:
    1. the parameters of a module, if the adapter has an update for each of its wrappers;
    2. the two halves of an attention, whose alphas tell that PEFT adds the second one twice.
    """

    def __init__(self, updates: Mapping[str, LowRank]) -> None:
        self.updates = updates
        self.keys = {
            update.origin.layer.lead: key
            for key, update in updates.items()
            if update.origin.layer and _is_as_read(update)
        }
        self.parameters = Counter(
            unwrapped(lead)
            for lead, key in self.keys.items()
            if updates[key].origin.op == "experts"
        )

    def form(self, key: str, update: LowRank) -> PeftForm | None:
        """Return the form that an update was read from; None if it cannot be written back."""
        origin = update.origin
        layer = origin.layer or FileLayer("")
        if self.keys.get(layer.lead) != key:
            return None
        if origin.kernel or origin.tied or update.mutated or update.magnitude is not None:
            return None
        if origin.op == "experts":
            if self.parameters[unwrapped(layer.lead)] != layer.of:
                return None
            return PeftForm("stack", layer.lead, plain=True)
        if not origin.op and self._has_both_halves(layer.lead):
            return PeftForm("linear", layer.lead, plain=True)
        return None

    def _has_both_halves(self, lead: str) -> bool:
        in_proj_lead = lead.removesuffix(OUT_PROJ)
        in_proj = self._update_at(in_proj_lead)
        out_proj = self._update_at(f"{in_proj_lead}{OUT_PROJ}")
        if in_proj is None or out_proj is None:
            return False
        return in_proj.rank == out_proj.rank and 2 * in_proj.alpha == out_proj.alpha

    def _update_at(self, lead: str) -> LowRank | None:
        return self.updates.get(self.keys.get(lead, ""))


def _stacks(updates: Mapping[str, LowRank], forms: Mapping[str, PeftForm]) -> dict[str, PeftForm]:
    """Return the forms of stacks that PEFT can store as parameters, and of layers in their modules.

    PEFT wraps the parameters of a module in the order in which it defines them, the first
    innermost. The updates of a model come in that order.
    """
    if any(update.magnitude is not None or update.mutated for update in updates.values()):
        return {}  # PEFT has no such start, and no DoRA, for parameters
    modules: dict[str, list[str]] = {}
    for key, update in updates.items():
        if forms[key].kind == "own" and _is_parameter_stack(key, update):
            modules.setdefault(key.rpartition(".")[0], []).append(key)

    changed: dict[str, PeftForm] = {}
    for module, keys in modules.items():
        # PEFT has one rank and alpha a name, be it a parameter's or a module's
        if any(form.module == module or form.target in keys for form in forms.values()):
            continue
        for depth, key in enumerate(reversed(keys)):
            lead = module + f".{WRAPPER}" * depth
            changed[key] = PeftForm("stack", lead, plain=not updates[key].layout)
        wrapped_module = module + f".{WRAPPER}" * len(keys)
        for key, form in forms.items():
            if form.lead.startswith(f"{module}."):
                inner = form.lead.removeprefix(module)
                changed[key] = replace(form, lead=wrapped_module + inner)
    if not changed:
        return {}
    return changed | _parameters_beside_stacks(forms, changed)


def _parameters_beside_stacks(
    forms: Mapping[str, PeftForm], changed: Mapping[str, PeftForm]
) -> dict[str, PeftForm]:
    """Return linear layers next to stacks that need target_parameters, as PEFT sees experts there.

    Args:
        forms: Of all updates.
        changed: Those of the stacks and of what lies inside their modules.
    """
    parameters = {}
    for key, form in forms.items():
        is_taken = key == f"{form.module}.weight" and key.split(".")[-2] in TAKEN
        if is_taken and form.kind == "linear" and not (form.transposed or form.swapped):
            parameters[key] = replace(changed.get(key, form), kind="stack")
    return parameters


_PARAMETER = re.compile(r"[^\[\]@]+\.[^\[\]@.]+")


def _is_parameter_stack(key: str, update: LowRank) -> bool:
    """Whether an update is for a stack of matrices that is a whole parameter of a module."""
    if update.use or not _PARAMETER.fullmatch(key):
        return False
    layout = update.layout
    if layout is None:
        origin = update.origin
        return origin.layer is None and origin.op == "experts" and update.a.ndim == 3
    is_stored_so = len(layout.stored) == 3 and layout.shape == layout.stored
    return is_stored_so and layout.batch == (0,)


def _is_as_read(update: LowRank) -> bool:
    """Whether an update is as a reader returned it, without a layout and a use."""
    return update.layout is None and not update.use


def form_of(key: str, update: LowRank) -> PeftForm:
    """Return PEFT's form for an update; kind "own", with the reason, if PEFT cannot store it."""
    origin = update.origin
    name = update.use or key
    module = name.removesuffix(".weight")
    is_shared = origin.tied and not update.use
    if update.use.startswith("op:"):
        return PeftForm("own", why=f"it acts on one use only ({update.use})")
    if split_use(key)[1].startswith("call:"):
        return PeftForm("own", why="it acts on one of several calls")
    if is_shared and not (origin.twins and _is_as_read(update)):
        return PeftForm("own", why=_SHARED)
    if key.endswith("]"):
        return PeftForm(
            "own", why="it covers a part of the tensor (convert --fuse --base joins parts)"
        )
    if not name.endswith(".weight"):
        return PeftForm("own", why="the parameter is not the weight of a module")
    if origin.op == "experts" and not update.layout and update.a.ndim == 3:
        return PeftForm("linear", module)  # as SGLang has them
    if update.a.ndim != 2:
        return PeftForm("own", why="it is a stack of matrices or a grouped convolution")
    if is_shared:
        return _of_tied_embedding(module, update)
    if update.layout is None:
        return _of_op(module, update)
    return _of_layout(module, update, update.layout)


_SHARED = "it acts on several modules that share the tensor"


def module_form(key: str, update: LowRank, refused: Callable[[str, str], LoraFxError]) -> PeftForm:
    """Return the form of an update for files that hold only module weights, stored out first.

    Most formats need only its `module`. A format that has the name already calls this for the
    errors.

    Args:
        key: The key of the update.
        update: The update.
        refused: Key and reason → the format's error.

    Raises:
        LoraFxError: An update of anything else: an embedding, a stack, a part, one use of a shared
            tensor, a weight stored [in, out].
    """
    if not is_on_base(update) or not is_lora_or_dora(update):
        raise refused(key, f"it is {name_of(update)}")
    form = form_of(key, update)
    if form.kind == "embedding":
        raise refused(key, "it is an update of an embedding")
    if not form.module:
        raise refused(key, form.why)
    if form.transposed:
        raise refused(key, "the weight is stored [in, out]")
    return form


def _of_tied_embedding(module: str, update: LowRank) -> PeftForm:
    """Return the form of an update of a tensor that an embedding and a head share."""
    origin = update.origin
    is_changed = origin.kernel or update.mutated or origin.layer or update.magnitude is not None
    if not origin.op or is_changed:
        return PeftForm("own", why=_SHARED)
    return PeftForm("embedding", module, plain=True)


def _of_op(module: str, update: LowRank) -> PeftForm:
    """Return the form of an update with unknown layout, from its op."""
    op = update.origin.op
    if op == "embedding":
        return PeftForm("embedding", module)
    if update.origin.kernel:
        return PeftForm("conv", module)
    if op in _LINEAR_OPS:
        return PeftForm("linear", module)
    return _no_such_layer(op)


def _of_layout(module: str, update: LowRank, layout: Layout) -> PeftForm:
    """Return the form of an update from its layout in the model."""
    op = update.origin.op
    if layout.batch or layout.shape != layout.stored:
        return _no_such_layer(op)
    if len(layout.stored) == 2:
        is_in_first = layout.out == (1,)
        if op == "embedding":
            if not is_in_first and update.magnitude is not None:
                return PeftForm("own", why="its magnitude belongs to the rows of the table")
            return PeftForm("embedding", module, swapped=not is_in_first)
        if op in _LINEAR_OPS:
            return PeftForm("linear", module, transposed=is_in_first)
        return _no_such_layer(op)

    # Axes of size 1 may stand anywhere in a layout; they do not change the order of elements.
    wide_axes = [axis for axis in layout.in_ if layout.shape[axis] != 1]
    is_convolution = 3 <= len(layout.stored) <= 5 and layout.out == (0,)
    if is_convolution and wide_axes == sorted(wide_axes) and op in _CONV_OPS:
        return PeftForm("conv", module)
    return _no_such_layer(op)


def _no_such_layer(op: str) -> PeftForm:
    return PeftForm("own", why=f"PEFT has no layer for it (op {op or 'unknown'})")


def to_tensors(form: PeftForm, update: LowRank) -> dict[str, Array]:
    """Return A, B and the magnitude by PEFT's names, in PEFT's shapes."""
    a_name, b_name = form.names
    a, b = _factors(form, update)
    tensors = {a_name: a, b_name: b}
    if update.magnitude is not None:
        name = f"{PREFIX}{form.lead}.lora_magnitude_vector"
        tensors[name] = update.magnitude.reshape(_shape_of_magnitude(form, a))
    if form.plain and form.kind == "embedding":
        for twin in update.origin.twins:
            lead = f"{PREFIX}{twin.removesuffix('.weight')}.lora_"
            tensors[f"{lead}A.weight"] = np.ascontiguousarray(b.T)
            tensors[f"{lead}B.weight"] = np.ascontiguousarray(a.T)
    return tensors


def _factors(form: PeftForm, update: LowRank) -> Factors:
    """Return A and B in PEFT's shapes."""
    if form.kind == "stack":
        return packed(update)
    if form.swapped:
        return update.b.T, update.a.T
    if form.kind != "conv":
        return update.a, update.b
    kernel = update.layout.stored[2:] if update.layout else update.origin.kernel
    a = update.a.reshape(update.rank, -1, *kernel)
    b = update.b.reshape(*update.b.shape, *(1 for _ in kernel))
    return a, b


def _shape_of_magnitude(form: PeftForm, a: Array) -> tuple[int, ...]:
    """Return the shape of the magnitude: [out], or [1, out, 1, …] for a convolution."""
    if form.kind != "conv":
        return (-1,)
    return (1, -1, *(1 for _ in range(a.ndim - 2)))
