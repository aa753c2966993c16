"""The role of a weight: q k v o gate up down head embedding router.

A lookup is an embedding. A matmul is a head when its weight is tied to an embedding table, or
has such a table's shape. The rest is read from the module's name, by the names that the
published architectures use. Names of any layer are roles only where the data flow agrees: `wv` is
a value where attention reads it. Names that say their role in full (`v_proj`) stand by themselves,
in an attention without softmax, too. Of a file's tensors, and in an .onnx graph, the flow is not
followed for this, and the name decides.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from lora_fx.ir.graph import Site
from lora_fx.ir.layout import Layout

_NAMES = (
    ("router", r"router|(mlp|moe|block_sparse_moe|feed_forward)\.gate"),
    ("q", r"q_proj|query|query_proj|to_q|q_lin|wq|q|linear_q"),
    ("k", r"k_proj|key|key_proj|to_k|k_lin|wk|k|linear_k"),
    ("v", r"v_proj|value|value_proj|to_v|v_lin|wv|v|linear_v"),
    (
        "o",
        r"o_proj|out_proj|to_out(\.0)?|out_lin|wo|o|(attention|attn|self)\.(output\.)?(dense|c_proj|proj)",
    ),
    ("gate", r"gate_proj|w1|wi_0|gate"),
    ("up", r"up_proj|w3|wi_1|wi|fc1|c_fc|intermediate\.dense|lin1|linear1"),
    ("down", r"down_proj|w2|wo|fc2|output\.dense|lin2|linear2|mlp\.c_proj"),
)


ROLES = tuple(role for role, _ in _NAMES)
_IN_FULL = re.compile(r"(^|\.)(([qkvo]|query|key|value|gate|up|down)_proj|router)$")
"""Names that nobody gives to a layer of another role."""
_PATTERNS = tuple((role, re.compile(rf"(^|\.)({names})$")) for role, names in _NAMES)


def role_of(
    names: Sequence[str], sites: Sequence[Site], layout: Layout, tables: Sequence[tuple[int, int]]
) -> str:
    """Return the role of a target, or an empty text.

    Args:
        names: All names of the target, without `.weight`.
        sites: Its uses.
        layout: How it lies in its parameter.
        tables: (rows, width) of every lookup table of the model.
    """
    ops = {site.op for site in sites}
    if ops == {"embedding"}:
        return "embedding"
    if "embedding" in ops:
        return "head"
    if not layout.batch_shape and (layout.out_size, layout.in_size) in tables:
        return "head"
    agreed = frozenset(ROLES).intersection(
        *(site.roles for site in sites if site.roles is not None)
    )
    for name in names:
        role = role_by_name(name, ROLES if _IN_FULL.search(name) else agreed)
        if role:
            return role
    return ""


def role_by_name(name: str, roles: Collection[str] = ROLES) -> str:
    """Return the first of some roles that a name (without `.weight`) implies, or an empty text.

    >>> role_by_name("h.0.attn.q_proj"), role_by_name("h.0.attn.qkv")
    ('q', '')
    >>> role_by_name("mlp.gate"), role_by_name("mlp.gate", ("gate", "up"))
    ('router', 'gate')
    """
    for role, pattern in _PATTERNS:
        if role in roles and pattern.search(name):
            return role
    return ""
