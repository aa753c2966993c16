"""The call of a captured model: arguments by name, as flat leaves, and outputs without caches."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lora_fx.fx.trees import (
    has_unnamed_parts,
    register_dataclass,
    tree_flatten_with_path,
    tree_leaves,
    tree_map_only,
)
from lora_fx.inputs import Named

_EMPTY = inspect.Parameter.empty


class Signature:
    """The parameters of a forward; `bind` names the arguments of a call.

    `bind` uses plain loops only, so that torch.compile can trace it.
    """

    def __init__(self, forward: Callable[..., Any] | inspect.Signature) -> None:
        if callable(forward):
            self.signature = inspect.signature(forward)
        else:
            self.signature = forward
        kinds = inspect.Parameter
        parameters = self.signature.parameters.values()

        def names_of(kind: object) -> list[str]:
            return [parameter.name for parameter in parameters if parameter.kind is kind]

        self.positional_only = names_of(kinds.POSITIONAL_ONLY)
        self.positional = self.positional_only + names_of(kinds.POSITIONAL_OR_KEYWORD)
        named = self.positional + names_of(kinds.KEYWORD_ONLY)
        self.keywords = set(named)
        self.rest = next(iter(names_of(kinds.VAR_POSITIONAL)), "")
        self.open = bool(names_of(kinds.VAR_KEYWORD))
        self.order = {parameter.name: i for i, parameter in enumerate(parameters)}
        self.defaults = {
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.default is not _EMPTY
        }
        self.required = [name for name in named if name not in self.defaults]

    def bind(self, args: Sequence[Any], kwargs: Named) -> dict[str, Any]:
        """Return the arguments by name, in the signature's order, without those that are defaults.

        Raises:
            TypeError: As the original would: an unknown, repeated or missing argument.
        """
        named: dict[str, Any] = {}
        for i, argument in enumerate(args):
            if i < len(self.positional):
                named[self.positional[i]] = argument
            elif self.rest:
                named[self.rest] = tuple(args[i:])
                break
            else:
                raise TypeError(
                    f"takes {len(self.positional)} positional arguments, got {len(args)}"
                )
        for name, argument in kwargs.items():
            if name in named:
                raise TypeError(f"got multiple values for argument {name!r}")
            if name not in self.keywords and not self.open:
                raise TypeError(f"got an unexpected keyword argument {name!r}")
            named[name] = argument
        for name in self.required:
            if name not in named:
                raise TypeError(f"missing a required argument: {name!r}")
        last = len(self.order)
        names = sorted(named, key=lambda name: (self.order.get(name, last), name))
        return {name: named[name] for name in names if not self._is_default(name, named[name])}

    def _is_default(self, name: str, value: object) -> bool:
        """Whether an argument is the plain value that the forward uses by default."""
        default = self.defaults.get(name, _EMPTY)
        if value is None:
            return default is None
        is_plain = isinstance(value, (bool, int, float, str)) and type(value) is type(default)
        return is_plain and bool(value == default)

    def call(self, forward: Callable[..., Any], named: Named) -> Any:
        """Call a forward of this signature with bound arguments."""
        keywords = dict(named)
        var_positional = keywords.pop(self.rest, ()) if self.rest else ()
        # what comes before *args has to be positional too
        names = self.positional if var_positional else self.positional_only
        positional = [keywords.pop(name, self.defaults.get(name)) for name in names]
        return forward(*positional, *var_positional, **keywords)


def without_cache(out: object, left_out: list[str] | None = None) -> object:
    """Return a model's outputs without transformers' key-value caches, which are not tensors.

    Decoders return one with their default configuration, whether it is asked for or not. A plain
    dataclass is made known to torch, to which its tensors would be none.

    Args:
        out: An output class, dict or tuple of a model, or anything else, which comes back.
        left_out: Gets the names of what is left out.
    """
    for leaf in tree_leaves(out):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            register_dataclass(type(leaf))
            return without_cache(out, left_out)

    if type(out) is tuple:
        outputs: dict[Any, Any] = dict(enumerate(out))
    elif isinstance(out, dict):
        outputs = out
    else:
        return out
    cache_keys = [key for key, output in outputs.items() if is_cache(output)]
    if not cache_keys:
        return out
    if left_out is not None:
        left_out += [str(key) for key in cache_keys]
    remaining = {str(key): output for key, output in outputs.items() if key not in cache_keys}
    if type(out) is tuple:
        return tuple(remaining.values())
    return type(out)(**remaining)


def is_cache(value: object) -> bool:
    """Whether a value is a key-value cache of transformers or of one of its models."""
    for kind in type(value).__mro__:
        if kind.__module__.startswith("transformers.") and kind.__name__.endswith("Cache"):
            return True
    return False


def in_separate_memory(leaves: Sequence[Any]) -> list[Any]:
    """Copy tensors that are given for two inputs, or that are cut from a larger tensor.

    torch.export would take the two (labels=input_ids) for one input, and the graph would mix them
    up. The steps of a cut, `ids[:, :16]`, would be sizes of their own, which other calls have not.
    """
    seen_ids: set[int] = set()
    result: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            result.append(leaf)
            continue
        tensor = leaf.contiguous() if _is_cut_or_expanded(leaf) else leaf
        result.append(tensor.clone() if id(leaf) in seen_ids else tensor)
        seen_ids.add(id(leaf))
    return result


def _is_cut_or_expanded(tensor: torch.Tensor) -> bool:
    """Whether a tensor does not fill its span of memory with each element once."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return False
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * step for size, step in steps)
    return tensor.numel() != span


def leaves_of(named: Named) -> list[tuple[str, Any]]:
    """Return (name, leaf) of all leaves: an argument's name, with `.i` for parts of a container."""
    leaves: list[tuple[str, Any]] = []
    nodes, _ = tree_flatten_with_path(dict(named), is_leaf=has_unnamed_parts)
    for path, node in nodes:
        name = ".".join(map(_key_text, path))
        if has_unnamed_parts(node):
            leaves += [(f"{name}.{part}", leaf) for part, leaf in leaves_of(_parts_of(node))]
        else:
            leaves.append((name, node))
    return leaves


def _parts_of(node: object) -> Named:
    """Return the parts of a node by name: the keys of a mapping, or else numbers."""
    if isinstance(node, Mapping):
        return node
    parts = tree_leaves(node, is_leaf=lambda value: value is not node)
    return {str(i): part for i, part in enumerate(parts)}


def _key_text(key: object) -> str:
    """Return a step of a path into a tree as text: a key, an index or a field's name."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def leaf_names(named: Named) -> list[str]:
    """Return the names of the flattened leaves."""
    return [name for name, _ in leaves_of(named)]


def program_key(named: Named, leaves: Sequence[Any]) -> tuple[object, ...]:
    """Return the key of a call's program: names, structure, constants, dtypes and ranks."""
    key: list[object] = []
    for name, argument in named.items():
        key.append(name)
        if not isinstance(argument, torch.Tensor):
            key.append(len(tree_leaves(argument)))
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            key.append((leaf.dtype, leaf.dim()))
        else:
            key.append((type(leaf).__name__, leaf))
    return tuple(key)


def copied(named: Named) -> dict[str, Any]:
    """Return the arguments with a copy of every tensor."""
    return dict(tree_map_only(torch.Tensor, torch.clone, dict(named)))
