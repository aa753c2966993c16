"""Guess how a model reads the tensors of a checkpoint, from names, shapes and config.json.

==========  ========================================  =======================================
linear      [out, in]                                 the rule for two dimensions
conv1d      [in, out]                                 Conv1D of the GPT-2 family
embedding   [rows, width], a lookup                   out is the width
conv        [out, in, *kernel]                        three dimensions and more
stack       [experts, out, in], or [experts, in, out] of some models
whole       biases, norms and other vectors           no low-rank update
==========  ========================================  =======================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_fx.adapter.expert_families import IN_OUT_EXPERTS
from lora_fx.files.checkpoint import model_config, says_tied, text_config
from lora_fx.files.safetensors import Tensors
from lora_fx.ir.layout import Layout, plain_layout
from lora_fx.targets.found import Found
from lora_fx.text import JsonView

CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))
"""model_type of models whose linear layers store [in, out]."""


CONV1D_NAMES = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
"""Names of such layers."""


_STACK = re.compile(r"(^|\.)\w*(experts|moe)(\.|$)")


_POSITION = re.compile(r"(^|\.)(wpe|\w*position\w*)\.")


_LANGUAGE = re.compile(r"LMHead|ForCausalLM|ForMaskedLM|ForConditionalGeneration")


@dataclass(frozen=True)
class TensorUse:
    """The way in which a model reads one tensor as matrices.

    Attributes:
        layout: None for a tensor that has no low-rank update.
        op: As an update names it.
        tied: The tensor is an embedding table and the output head.
    """

    layout: Layout | None
    op: str = ""
    tied: bool = False

    @property
    def lead(self) -> int:
        """The number of leading axes that count matrices."""
        return 0 if self.layout is None else len(self.layout.batch)

    @property
    def swapped(self) -> bool:
        """True where the rows of the stored matrix are in."""
        return self.layout is not None and self.layout.out == (self.lead + 1,)


def config_of(path: str | Path) -> JsonView:
    """The config.json of a folder, or next to a file; empty if there is none."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    return model_config(file) if file.is_file() else {}


def uses(
    tensors: Tensors, found: Found, config: JsonView, fan_in_fan_out: bool | None, table: str | None
) -> dict[str, TensorUse]:
    """The use of every tensor by its name.

    Args:
        tensors: The checkpoint's tensors.
        found: Its targets, whose roles are taken.
        config: Its config.json, or empty.
        fan_in_fan_out: True: two-dimensional weights are [in, out], except embeddings and heads;
            False: none is; None: config.json says.
        table: The one that is the output head too; empty: there is none; None: roles say.
    """
    roles = {target.key: target.role for target in found.targets}
    model_types = {config.get("model_type"), text_config(config).get("model_type")}
    has_tied_table = _is_tied(roles, config) if table is None else bool(table)
    tensor_uses: dict[str, TensorUse] = {}
    for name, info in tensors.items():
        role = roles.get(name)
        shape = info.shape
        if role is None or name.endswith("bias"):
            use = TensorUse(None)
        elif len(shape) == 3 and _STACK.search(name):
            use = _stack_use(shape, in_out=bool(model_types & IN_OUT_EXPERTS))
        elif len(shape) != 2:
            use = TensorUse(plain_layout(shape), f"conv{len(shape) - 2}d")
        elif role == "embedding":
            is_tied = has_tied_table and not _POSITION.search(name) and table in (None, name)
            use = _table_use(shape, is_tied=is_tied)
        else:
            if fan_in_fan_out is None:
                in_out = bool(model_types & CONV1D_MODELS and CONV1D_NAMES.search(name))
            else:
                in_out = fan_in_fan_out and role != "head"
            use = _linear_use(shape, in_out=in_out)
        if use.layout is not None and use.layout.max_rank == 1:
            use = TensorUse(None)  # a low-rank update of a vector is no smaller than the vector
        tensor_uses[name] = use
    return tensor_uses


def _stack_use(shape: tuple[int, ...], *, in_out: bool) -> TensorUse:
    """A stack of experts, [experts, out, in] or [experts, in, out]."""
    if in_out:
        return TensorUse(Layout(shape, (0,), (2,), (1,), shape), "bmm")
    return TensorUse(Layout(shape, (0,), (1,), (2,), shape), "bmm")


def _table_use(shape: tuple[int, ...], *, is_tied: bool) -> TensorUse:
    """An embedding table; one that is the output head too is read as a linear layer."""
    if is_tied:
        return TensorUse(plain_layout(shape), "linear", tied=True)
    return TensorUse(Layout(shape, (), (1,), (0,), shape), "embedding")


def _linear_use(shape: tuple[int, ...], *, in_out: bool) -> TensorUse:
    """A linear layer [out, in], or Conv1D's [in, out]."""
    if in_out:
        return TensorUse(Layout(shape, (), (1,), (0,), shape), "addmm")
    return TensorUse(plain_layout(shape), "linear")


def _is_tied(roles: Mapping[str, str], config: JsonView) -> bool:
    """True when the file has no head of its own and the config says that there is one."""
    if "head" in roles.values() or says_tied(config) is False:
        return False
    classes = config.get("architectures") or ()
    return any(_LANGUAGE.search(str(name)) for name in classes)
