"""The trees of a program's arguments and outputs, of dicts, lists and tuples only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_fx.errors import LoraFxError
from lora_fx.text import Json, JsonView

LEAF: Json = {"type": None, "context": None, "children_spec": []}


def plain_tree(text: str, fields: Mapping[str, list[str]], where: str) -> str:
    """A tree of arguments or outputs with classes replaced by dicts and tuples.

    A class whose names are known (an output class of transformers, a named tuple) becomes a dict
    of them, so nothing needs to be imported to call the program.
    """
    version, tree = json.loads(text)
    if version != 1:
        raise LoraFxError(f"{where}: trees of version {version!r}, not 1", "another torch wrote it")
    return json.dumps([1, _plain(tree, fields, where)])


def _plain(tree: JsonView, fields: Mapping[str, list[str]], where: str) -> Any:
    kind, context = tree["type"], tree["context"]
    children = [_plain(c, fields, where) for c in tree["children_spec"]]
    if kind is None:
        return LEAF
    if kind in ("builtins.tuple", "builtins.list"):
        return {"type": kind, "context": "null", "children_spec": children}
    names: Any = None
    if kind in ("builtins.dict", "collections.OrderedDict") or isinstance(context, str):
        names = json.loads(context) if isinstance(context, str) else context
    if kind == "collections.namedtuple" or names is None or isinstance(names, str):
        names = fields.get(str(names if isinstance(names, str) else context), names)
    found = named_children(names, children)
    if found is None:
        raise LoraFxError(
            f"{where}: the structure {str(kind)[:80]!r} is not known",
            "export a model that takes and returns tensors, tuples, lists and dicts",
        )
    return found


def named_children(names: Any, children: Sequence[Json]) -> Json | None:
    """A container as a dict of its children; None where what its type keeps is no names of them."""
    if isinstance(names, (list, tuple)) and len(names) == 2 and isinstance(names[0], list):
        names = names[0]  # a dataclass: its fields, and those that are None
    fit = isinstance(names, (list, tuple)) and len(names) == len(children)
    if not fit or not all(isinstance(n, (str, int)) for n in names):
        return None
    return {"type": "builtins.dict", "context": json.dumps(list(names)), "children_spec": children}


def plain_spec(spec: Any) -> Json:
    """A tree of outputs as torch writes it, of dicts, lists and tuples only."""
    if spec.is_leaf():
        return LEAF
    children = [plain_spec(c) for c in spec.children()]
    names: Any = spec.context
    if isinstance(names, type) and hasattr(names, "_fields"):
        names = list(names._fields)
    found = None if spec.type in (tuple, list) else named_children(names, children)
    kind = f"builtins.{'list' if spec.type is list else 'tuple'}"
    return found or {"type": kind, "context": "null", "children_spec": children}
