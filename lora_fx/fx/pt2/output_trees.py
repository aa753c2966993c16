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
        raise LoraFxError(
            f"{where}: trees of version {version!r}; expected 1",
            "write the file again with a torch of the version that reads it",
        )
    return json.dumps([1, _plain(tree, fields, where)])


def _plain(tree: JsonView, fields: Mapping[str, list[str]], where: str) -> Any:
    kind = tree["type"]
    context = tree["context"]
    children = [_plain(child, fields, where) for child in tree["children_spec"]]
    if kind is None:
        return LEAF
    if kind in ("builtins.tuple", "builtins.list"):
        return {"type": kind, "context": "null", "children_spec": children}
    container = named_children(_child_names(kind, context, fields), children)
    if container is None:
        raise LoraFxError(
            f"{where}: unknown structure {str(kind)[:80]!r}",
            "export a model that takes and returns tensors, tuples, lists and dicts",
        )
    return container


def _child_names(kind: str, context: Any, fields: Mapping[str, list[str]]) -> Any:
    """The names that a container has for its children, in whatever form its type keeps them.

    Args:
        kind: The container's type.
        context: What the type keeps: names as JSON, or the name of a class.
        fields: Name of a class → names of its fields.
    """
    names: Any = None
    if isinstance(context, str):
        names = json.loads(context)
    elif kind in ("builtins.dict", "collections.OrderedDict"):
        names = context
    if kind == "collections.namedtuple" or names is None or isinstance(names, str):
        class_name = names if isinstance(names, str) else context
        names = fields.get(str(class_name), names)
    return names


def named_children(names: Any, children: Sequence[Json]) -> Json | None:
    """A container as a dict of its children; None if its type stores no names of children."""
    if isinstance(names, (list, tuple)) and len(names) == 2 and isinstance(names[0], list):
        names = names[0]  # a dataclass: its fields, and those that are None
    if not isinstance(names, (list, tuple)) or len(names) != len(children):
        return None
    if not all(isinstance(name, (str, int)) for name in names):
        return None
    return {"type": "builtins.dict", "context": json.dumps(list(names)), "children_spec": children}


def plain_spec(spec: Any) -> Json:
    """A tree of outputs as torch writes it, of dicts, lists and tuples only."""
    if spec.is_leaf():
        return LEAF
    children = [plain_spec(child) for child in spec.children()]
    if spec.type not in (tuple, list):
        names: Any = spec.context
        if isinstance(names, type) and hasattr(names, "_fields"):  # a named tuple
            names = list(names._fields)
        container = named_children(names, children)
        if container is not None:
            return container
    kind = "builtins.list" if spec.type is list else "builtins.tuple"
    return {"type": kind, "context": "null", "children_spec": children}
