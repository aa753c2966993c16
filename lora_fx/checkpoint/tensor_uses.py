"""What the tensors of a checkpoint are for, by names, shapes and config.json: no graph is read.

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

from lora_fx.adapter.fused import IN_OUT_EXPERTS
from lora_fx.files.checkpoint import model_config, says_tied, text_config
from lora_fx.files.safetensors import Tensors
from lora_fx.ir.layout import Layout, plain_layout
from lora_fx.targets.target import Found
from lora_fx.text import JsonView

CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))
"""model_type of models whose linear layers store [in, out]."""


CONV1D_NAMES = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
"""What such layers are called."""


_STACK = re.compile(r"(^|\.)\w*(experts|moe)(\.|$)")


_POSITION = re.compile(r"(^|\.)(wpe|\w*position\w*)\.")


_LANGUAGE = re.compile(r"LMHead|ForCausalLM|ForMaskedLM|ForConditionalGeneration")


@dataclass(frozen=True)
class TensorUse:
    """How one tensor is read as matrices.

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
        """How many leading axes count matrices."""
        return len(self.layout.batch) if self.layout else 0

    @property
    def swapped(self) -> bool:
        """True where the rows of the stored matrix are in."""
        return self.layout is not None and self.layout.out == (self.lead + 1,)


def config_of(path: str | Path) -> JsonView:
    """The config.json of a folder, or beside a file; empty where there is none."""
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    return model_config(file) if file.is_file() else {}


def uses(
    tensors: Tensors, found: Found, config: JsonView, fan_in_fan_out: bool | None, table: str | None
) -> dict[str, TensorUse]:
    """How every tensor is read.

    Args:
        tensors: The checkpoint's tensors.
        found: Its targets, whose roles are taken.
        config: Its config.json, or empty.
        fan_in_fan_out: True: two-dimensional weights are [in, out], except embeddings and heads;
            False: none is; None: config.json says.
        table: The one that is the output head too; empty: there is none; None: roles say.
    """
    roles = {t.key: t.role for t in found.targets}
    kinds = {config.get("model_type"), text_config(config).get("model_type")}
    one_table = _tied(roles, config) if table is None else bool(table)
    result = {}
    for name, info in tensors.items():
        shape, role = info.shape, roles.get(name)
        if role is None or name.endswith("bias"):
            use = TensorUse(None)
        elif len(shape) == 3 and _STACK.search(name):
            out, in_ = ((2,), (1,)) if kinds & IN_OUT_EXPERTS else ((1,), (2,))
            use = TensorUse(Layout(shape, (0,), out, in_, shape), "bmm")
        elif role == "embedding" and len(shape) == 2:
            tied = one_table and not _POSITION.search(name) and table in (None, name)
            layout = plain_layout(shape) if tied else Layout(shape, (), (1,), (0,), shape)
            use = TensorUse(layout, "linear" if tied else "embedding", tied)
        elif len(shape) == 2:
            turned = fan_in_fan_out and role != "head"
            if fan_in_fan_out is None:
                turned = bool(kinds & CONV1D_MODELS and CONV1D_NAMES.search(name))
            layout = Layout(shape, (), (1,), (0,), shape) if turned else plain_layout(shape)
            use = TensorUse(layout, "addmm" if turned else "linear")
        else:
            use = TensorUse(plain_layout(shape), f"conv{len(shape) - 2}d")
        flat = use.layout is not None and use.layout.max_rank == 1
        result[name] = TensorUse(None) if flat else use
    return result


def _tied(roles: Mapping[str, str], config: JsonView) -> bool:
    """True when the file has no head of its own and the config says that there is one."""
    if "head" in roles.values():
        return False
    names = config.get("architectures") or ()
    return says_tied(config) is not False and any(_LANGUAGE.search(str(n)) for n in names)
