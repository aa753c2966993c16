"""How an update lies in PEFT's tensors: which form it takes, its tensor names and shapes.

==========  =============================  ==========================================
form        names                          shapes
==========  =============================  ==========================================
linear      X.lora_A.weight, X.lora_B…     A [r, in], B [out, r]; HF Conv1D the same
conv        X.lora_A.weight, X.lora_B…     A [r, C_in, *kernel], B [C_out, r, 1, …]
embedding   X.lora_embedding_A, …_B        A [r, rows], B [dim, r]
own         lora_fx.KEY.lora_A, …_B        a and b as they are, [*batch, r, in] …
==========  =============================  ==========================================

The first three stand under `base_model.model.`; the last is ours, for what PEFT cannot say.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from lora_fx.errors import LoraFxError
from lora_fx.formats.peft_config import MERGE
from lora_fx.formats.tensorfile import Array
from lora_fx.lowrank import LowRank

PREFIX = "base_model.model."
OWN = "lora_fx."
_LINEAR_OPS = frozenset(("", "linear", "addmm", "matmul", "mm"))
_CONV_OPS = frozenset(("", "conv1d", "conv2d", "conv3d"))
_REFUSED = {
    "lora_magnitude_vector": "a DoRA magnitude; without it the result differs",
    "lora_B.bias": "a bias of B (lora_bias)",
    "lora_diag": "the diagonal of KaSA",
    "lora_E": "the singular values of AdaLoRA",
    "trainable_tokens_delta": "rows of an embedding (trainable_token_indices)",
    "base_layer.bias": "a trained bias of the base model",
}
_PAIR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)")


@dataclass(frozen=True)
class Form:
    """How one update is written.

    Attributes:
        kind: linear, conv, embedding, or own.
        module: PEFT's module; empty for own.
        transposed: True for a weight stored [in, out] (HF Conv1D).
        swapped: True where A is bᵀ and B is aᵀ: the update of a lookup in a head's layout.
        why: Why it is own.
    """

    kind: str
    module: str = ""
    transposed: bool = False
    swapped: bool = False
    why: str = ""

    @property
    def names(self) -> tuple[str, str]:
        """Tensor names of A and B in PEFT's terms."""
        lead = f"{PREFIX}{self.module}.lora_"
        if self.kind == "embedding":
            return f"{lead}embedding_A", f"{lead}embedding_B"
        return f"{lead}A.weight", f"{lead}B.weight"


def form_of(key: str, low: LowRank) -> Form:
    """The form in which PEFT can say an update, or own with the reason."""
    name = key
    if low.use.startswith("op:"):
        return Form("own", why=f"it acts on one use only ({low.use})")
    if low.use:
        name = low.use
    elif low.extra.get("tied"):
        return Form("own", why="it acts on several modules that share the tensor")
    if key.endswith("]"):
        return Form("own", why="it covers a part of the tensor")
    if not name.endswith(".weight"):
        return Form("own", why="the parameter is not the weight of a module")
    if low.a.ndim != 2:
        return Form("own", why="it is a stack of matrices or a grouped convolution")
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
            return Form("embedding", module, swapped=not transposed)
        return Form("linear", module, transposed) if op in _LINEAR_OPS else odd
    # Axes of size 1 may stand anywhere in a layout; they do not change the order of elements.
    wide = [i for i in layout.in_ if layout.shape[i] != 1]
    if 3 <= len(layout.stored) <= 5 and layout.out == (0,) and wide == sorted(wide):
        return Form("conv", module) if op in _CONV_OPS else odd
    return odd


def to_tensors(form: Form, low: LowRank) -> tuple[Array, Array]:
    """A and B in the shapes of PEFT."""
    if form.swapped:
        return low.b.T, low.a.T
    if form.kind != "conv":
        return low.a, low.b
    kernel = low.layout.stored[2:] if low.layout else tuple(low.extra["kernel"])
    a = low.a.reshape(low.rank, -1, *kernel)
    return a, low.b.reshape(*low.b.shape, *(1 for _ in kernel))


def split_name(name: str) -> tuple[str, str, str] | None:
    """(module, kind, half) of a tensor name without prefix; None where it is no such half.

    >>> split_name("h.0.fc.lora_A.weight"), split_name("wte.lora_embedding_B")
    (('h.0.fc', 'linear', 'A'), ('wte', 'embedding', 'B'))
    """
    match = _PAIR.fullmatch(name)
    return match and (match[1], "embedding" if match[2] else "linear", match[3])


def from_tensors(
    kind: str, a: Array, b: Array, where: str
) -> tuple[Array, Array, dict[str, object]]:
    """A [r, in], b [out, r] and what `extra` keeps of a pair in PEFT's shapes.

    Raises:
        LoraFxError: The two do not fit each other.
    """
    shapes = f"A is {list(a.shape)} and B is {list(b.shape)}"
    if a.ndim != b.ndim or (kind == "embedding" and a.ndim != 2) or a.ndim > 5:
        raise LoraFxError(
            f"{where}: {shapes}; expected A [r, in, *kernel] and B [out, r, 1, …]",
            "is the file complete?",
        )
    if a.shape[0] != b.shape[1] or any(n != 1 for n in b.shape[2:]):
        grouped = a.ndim > 2 and a.shape[0] % b.shape[1] == 0
        raise LoraFxError(
            f"{where}: {shapes}; expected the rank as first size of A and second size of B",
            "PEFT's update of a grouped convolution mixes the groups, so no weight can hold it"
            if grouped
            else "do A and B come from the same file?",
        )
    extra: dict[str, object] = {"op": "embedding"} if kind == "embedding" else {}
    if a.ndim > 2:
        extra = {"op": f"conv{a.ndim - 2}d", "kernel": list(a.shape[2:])}
    flat = np.ascontiguousarray(a.reshape(a.shape[0], -1))
    return flat, np.ascontiguousarray(b.reshape(b.shape[:2])), extra


def refuse_tensor(name: str, where: str) -> None:
    """Raise for a tensor of an update that is more than s·B·A."""
    for ending, what in _REFUSED.items():
        if name.endswith(ending):
            raise LoraFxError(f"{where}: {name!r} is {what}: not supported", MERGE)


def parameter_of(module: str, names: Container[str], where: str) -> str:
    """The parameter that the update on PEFT's module adapts.

    PEFT puts the update of a MultiheadAttention's in_proj_weight on the module itself, and that
    of its out_proj inside the wrapper.

    Args:
        module: As in the tensor's name.
        names: All tensor names of the file.
        where: The file, for messages.
    """
    outer, wrapped, inner = module.partition(".base_layer.")
    if wrapped and inner == "out_proj":
        return f"{outer}.out_proj.weight"
    if ".base_layer" in module:
        raise LoraFxError(
            f"{where}: the tensors of {module!r} are nested in another adapter's "
            "(target_parameters); which parameter they belong to is not told",
            MERGE,
        )
    if f"{PREFIX}{module}.base_layer.out_proj.lora_A.weight" in names:
        return f"{module}.in_proj_weight"
    return f"{module}.weight"
