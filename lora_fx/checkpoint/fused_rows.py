"""Fused weights and their parts: which keys of an adapter are of one tensor, and which rows of it.

The base says it by its names, shapes and config, or a file does, in JSON of the ends of names:

    {"attn.qkv_proj": {"attn.q_proj": "0:64", "attn.k_proj": "64:96", "attn.v_proj": "96:128"}}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.fused import FUSED, QKV, parent, roles_of
from lora_fx.checkpoint.fused_part_rows import part_rows
from lora_fx.checkpoint.tensor_uses import CONV1D_NAMES
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.safetensors import Tensors
from lora_fx.targets.names import ENDS, EXACT, Names
from lora_fx.targets.target import base_name
from lora_fx.text import JsonView

Roles = tuple[str, ...]
"""The role of a weight; of a fused one those of its parts, in their order."""


Weights = Mapping[Roles, str]
"""Roles → the name of the weight in a module."""


Rows = Mapping[str, Mapping[str, str]]
"""Key of a whole → key of a part → its rows, as `part_rows` has them; empty where not known."""


_SPAN = re.compile(r"\d{1,6}:\d{1,6}(:[1-9]\d{0,5})?")


def known_rows(adapter: Adapter, base: Tensors, config: JsonView, *, apart: bool) -> Rows:
    """The wholes and parts of an adapter by its base, which has either of them.

    Args:
        adapter: Its keys may have a prefix more, or less, than the base's names.
        base: The base's tensors.
        config: Its config.json.
        apart: Those of which the adapter has the whole; else those of which it has parts.
    """
    stored = _by_module(name for name, info in base.items() if len(info.shape) == 2)
    modules = Names(stored, EXACT, ENDS)
    result: dict[str, dict[str, str]] = {}
    for module, ours in _by_module(map(base_name, adapter.entries)).items():
        hits = modules.find(module)
        theirs = stored[hits[0]] if len(hits) == 1 else {}
        for roles in FUSED:
            asked = roles in ours if apart else any((role,) in ours for role in roles)
            rows = _rows_by_base(roles, ours, theirs, base, config) if asked else None
            if rows is None:
                continue
            names = {**_usual_names(roles), **theirs, **ours}
            whole = _in_module(module, names[roles])
            parts = {role: _in_module(module, names[role,]) for role in roles}
            result[whole] = {parts[role]: rows.get(role, "") for role in roles}
    return result


def _rows_by_base(
    roles: Roles, ours: Weights, theirs: Weights, base: Tensors, config: JsonView
) -> dict[str, str] | None:
    """Role → its rows in the whole; None where the base has neither that nor all of its parts.

    Args:
        roles: Those of the parts.
        ours: The adapter's names in the module.
        theirs: The base's names in it.
        base: The base's tensors.
        config: Its config.json.
    """
    if roles in theirs:
        name = theirs[roles]
        out, in_ = base[name].shape
        if CONV1D_NAMES.search(name) and out < in_:  # q, k and v are more than in
            out, in_ = in_, out
        return part_rows(name, out, in_, config)
    if any((role,) not in theirs for role in roles):
        return None
    if QKV in ours.get(roles, ""):
        return {}
    ends = [0, *accumulate(base[theirs[role,]].shape[0] for role in roles)]
    return {role: f"{ends[i]}:{ends[i + 1]}" for i, role in enumerate(roles)}


def _usual_names(roles: Roles) -> dict[Roles, str]:
    """What most models call a fused weight and its parts."""
    names: dict[Roles, str] = {(role,): f"{role}_proj.weight" for role in roles}
    names[roles] = "qkv_proj.weight" if "q" in roles else "gate_up_proj.weight"
    return names


def _in_module(module: str, name: str) -> str:
    """The last part of a weight's name, with `.weight` where it has that, in another module."""
    leaf = name[len(parent(name)) :].lstrip(".")
    return f"{module}.{leaf}" if module else leaf


def _by_module(names: Iterable[str]) -> dict[str, dict[Roles, str]]:
    """Module → roles of its weights → the first name that has them."""
    result: dict[str, dict[Roles, str]] = {}
    for name in names:
        result.setdefault(parent(name), {}).setdefault(roles_of(name), name)
    return result


def told_rows(adapter: Adapter, told: JsonView, where: str) -> Rows:
    """The same from a file, by names, or their ends from a dot on, without `.weight`.

    Raises:
        LoraFxError: It is no such table.
    """
    result: dict[str, dict[str, str]] = {}
    for whole, parts in told.items():
        good = isinstance(parts, dict) and parts
        if not good or not all(_SPAN.fullmatch(str(v)) for v in parts.values()):
            raise LoraFxError(
                f"{where}: {whole!r} is {one_line(repr(parts), 80)}; expected its parts' rows",
                'as {"attn.qkv": {"attn.q": "0:64", …}}; "0:64:192" are such rows of every 192',
            )
        for key in map(base_name, adapter.entries):
            module = key.removesuffix(".weight")
            name = next((n for n in (whole, *parts) if f".{module}".endswith(f".{n}")), None)
            if name is not None:
                lead, end = module.removesuffix(name), key.removeprefix(module)
                result[f"{lead}{whole}{end}"] = {f"{lead}{p}{end}": v for p, v in parts.items()}
    return result
