"""Fused weights and their parts: which keys of an adapter are of one tensor, and which rows of it.

The base says it by its names, shapes and config, or a file does, in JSON of the ends of names:

    {"attn.qkv_proj": {"attn.q_proj": "0:64", "attn.k_proj": "64:96", "attn.v_proj": "96:128"}}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.fused import FUSED, QKV, parent, roles_of
from lora_fx.checkpoint.fused_part_rows import part_rows
from lora_fx.checkpoint.tensor_uses import CONV1D_NAMES
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.safetensors import Tensors
from lora_fx.targets.keys import base_name
from lora_fx.targets.names import ENDS, EXACT, Names
from lora_fx.text import JsonView

Roles = tuple[str, ...]
"""The role of a weight, or the roles of a fused weight's parts in order."""


Weights = Mapping[Roles, str]
"""Roles → the name of the weight in a module."""


Rows = Mapping[str, Mapping[str, str]]
"""Key of a whole → key of a part → its rows, as `part_rows` has them; empty where not known."""


_SPAN = re.compile(r"\d{1,6}:\d{1,6}(:[1-9]\d{0,5})?")


def known_rows(adapter: Adapter, base: Tensors, config: JsonView, *, apart: bool) -> Rows:
    """Find the fused weights that an adapter updates, whole or in parts, by its base.

    Args:
        adapter: Its keys may have a prefix more, or less, than the base's names.
        base: The base's tensors.
        config: Its config.json.
        apart: Those of which the adapter has the whole; else those of which it has parts.
    """
    base_weights = _by_module(name for name, info in base.items() if len(info.shape) == 2)
    base_modules = Names(base_weights, EXACT, ENDS)
    rows: dict[str, dict[str, str]] = {}
    for module, adapted in _by_module(map(base_name, adapter.entries)).items():
        hits = base_modules.find(module)
        stored = base_weights[hits[0]] if len(hits) == 1 else {}
        for roles in FUSED:
            if not _is_adapted(roles, adapted, apart=apart):
                continue
            rows_by_role = _rows_by_base(roles, adapted, stored, base, config)
            if rows_by_role is None:
                continue
            names = {**_usual_names(roles), **stored, **adapted}
            whole = _in_module(module, names[roles])
            rows[whole] = {
                _in_module(module, names[role,]): rows_by_role.get(role, "") for role in roles
            }
    return rows


def _is_adapted(roles: Roles, adapted: Weights, *, apart: bool) -> bool:
    """Whether a module's updates are of the whole of these roles, or of a part of it."""
    if apart:
        return roles in adapted
    return any((role,) in adapted for role in roles)


def _rows_by_base(
    roles: Roles, adapted: Weights, stored: Weights, base: Tensors, config: JsonView
) -> dict[str, str] | None:
    """Role → its rows in the fused weight; None if the base lacks it and one of its parts.

    Args:
        roles: Those of the parts.
        adapted: The adapter's names in the module.
        stored: The base's names in it.
        base: The base's tensors.
        config: Its config.json.
    """
    if roles in stored:
        name = stored[roles]
        out, in_ = base[name].shape
        if CONV1D_NAMES.search(name) and out < in_:  # q, k and v are more than in
            out, in_ = in_, out
        return part_rows(name, out, in_, config)

    if any((role,) not in stored for role in roles):
        return None
    if QKV in adapted.get(roles, ""):
        return {}
    rows: dict[str, str] = {}
    start = 0
    for role in roles:
        end = start + base[stored[role,]].shape[0]
        rows[role] = f"{start}:{end}"
        start = end
    return rows


def _usual_names(roles: Roles) -> dict[Roles, str]:
    """The names that most models have for a fused weight and its parts."""
    names: dict[Roles, str] = {(role,): f"{role}_proj.weight" for role in roles}
    if "q" in roles:
        names[roles] = "qkv_proj.weight"
    else:
        names[roles] = "gate_up_proj.weight"
    return names


def _in_module(module: str, name: str) -> str:
    """The last part of a weight's name, with `.weight` where it has that, in another module."""
    leaf = name[len(parent(name)) :].lstrip(".")
    return f"{module}.{leaf}" if module else leaf


def _by_module(names: Iterable[str]) -> dict[str, dict[Roles, str]]:
    """Module → roles of its weights → the first name that has them."""
    modules: dict[str, dict[Roles, str]] = {}
    for name in names:
        weights = modules.setdefault(parent(name), {})
        weights.setdefault(roles_of(name), name)
    return modules


def rows_of_map(adapter: Adapter, table: JsonView, where: str) -> Rows:
    """Find the fused weights that an adapter updates, whole or in parts, by a file's table.

    Args:
        adapter: Its keys.
        table: Whole → part → its rows; names, or their ends from a dot on, without `.weight`.
        where: The file, for messages.

    Raises:
        LoraFxError: It is no such table.
    """
    rows: dict[str, dict[str, str]] = {}
    for whole, parts in table.items():
        if not _is_division(parts):
            raise LoraFxError(
                f"{where}: {whole!r} is {one_line(repr(parts), 80)}; expected the rows of each "
                "part",
                'as {"attn.qkv": {"attn.q": "0:64", …}}; "0:64:192" means rows 0:64 of every 192',
            )
        for key in map(base_name, adapter.entries):
            module = key.removesuffix(".weight")
            suffix = key.removeprefix(module)
            for name in (whole, *parts):
                if f".{module}".endswith(f".{name}"):
                    prefix = module.removesuffix(name)
                    rows[f"{prefix}{whole}{suffix}"] = {
                        f"{prefix}{part}{suffix}": span for part, span in parts.items()
                    }
                    break
    return rows


def _is_division(parts: object) -> bool:
    """Whether a table's entry is parts with their rows."""
    if not isinstance(parts, dict) or not parts:
        return False
    return all(_SPAN.fullmatch(str(span)) for span in parts.values())
