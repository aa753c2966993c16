"""The call of a captured model: arguments are bound by its signature, sizes checked at the door."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_fx.fx.trees import register_dataclass, tree_flatten_with_path, tree_leaves, tree_map_only
from lora_fx.inputs import Named

_EMPTY = inspect.Parameter.empty


class Signature:
    """The parameters of a forward, and how arguments given in any way are named.

    Its `bind` uses plain loops only, so that torch.compile can trace it.
    """

    def __init__(self, forward: Callable[..., Any] | inspect.Signature) -> None:
        self.signature = inspect.signature(forward) if callable(forward) else forward
        kinds = inspect.Parameter
        params = self.signature.parameters.values()

        def of(kind: object) -> list[str]:
            return [p.name for p in params if p.kind is kind]

        self.positional_only = of(kinds.POSITIONAL_ONLY)
        self.positional = self.positional_only + of(kinds.POSITIONAL_OR_KEYWORD)
        named = self.positional + of(kinds.KEYWORD_ONLY)
        self.keywords = set(named)
        self.rest = next(iter(of(kinds.VAR_POSITIONAL)), "")
        self.open = bool(of(kinds.VAR_KEYWORD))
        self.order = {p.name: i for i, p in enumerate(params)}
        self.defaults = {p.name: p.default for p in params if p.default is not _EMPTY}
        self.required = [n for n in named if n not in self.defaults]

    def bind(self, args: Sequence[Any], kwargs: Named) -> dict[str, Any]:
        """The arguments by name, in the order of the signature, without those at their defaults.

        Raises:
            TypeError: As the original would: an unknown, repeated or missing argument.
        """
        named: dict[str, Any] = {}
        for i, v in enumerate(args):
            if i < len(self.positional):
                named[self.positional[i]] = v
            elif self.rest:
                named[self.rest] = tuple(args[i:])
                break
            else:
                raise TypeError(
                    f"takes {len(self.positional)} positional arguments, got {len(args)}"
                )
        for k, v in kwargs.items():
            if k in named:
                raise TypeError(f"got multiple values for argument {k!r}")
            if k not in self.keywords and not self.open:
                raise TypeError(f"got an unexpected keyword argument {k!r}")
            named[k] = v
        for k in self.required:
            if k not in named:
                raise TypeError(f"missing a required argument: {k!r}")
        last = len(self.order)
        names = sorted(named, key=lambda k: (self.order.get(k, last), k))
        return {k: named[k] for k in names if not self._is_default(k, named[k])}

    def _is_default(self, name: str, value: object) -> bool:
        """Whether an argument is the plain value that the forward has without it."""
        default = self.defaults.get(name, _EMPTY)
        if value is None:
            return default is None
        plain = isinstance(value, (bool, int, float, str)) and type(value) is type(default)
        return plain and bool(value == default)

    def call(self, forward: Callable[..., Any], named: Named) -> Any:
        """Call a forward of this signature with bound arguments."""
        named = dict(named)
        rest = named.pop(self.rest, ()) if self.rest else ()
        names = self.positional if rest else self.positional_only
        lead = [named.pop(n, self.defaults.get(n)) for n in names]
        return forward(*lead, *rest, **named)


def without_cache(out: object, left_out: list[str] | None = None) -> object:
    """A model's outputs without key-value caches of transformers, which are no tensors.

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
    held = dict(enumerate(out)) if type(out) is tuple else out if isinstance(out, dict) else {}
    caches = [k for k, v in held.items() if is_cache(v)]
    if not caches:
        return out
    if left_out is not None:
        left_out += [str(k) for k in caches]
    kept = {str(k): v for k, v in held.items() if k not in caches}
    return tuple(kept.values()) if type(out) is tuple else type(out)(**kept)


def is_cache(value: object) -> bool:
    """Whether this is a key-value cache of transformers, or of a model of it that has its own."""
    kinds = type(value).__mro__
    return any(
        k.__module__.startswith("transformers.") and k.__name__.endswith("Cache") for k in kinds
    )


def apart(leaves: Sequence[Any]) -> list[Any]:
    """The leaves, with a copy where one tensor is given for two inputs, or is cut from a larger.

    torch.export would take the two (labels=input_ids) for one input, and the graph would mix them
    up. The steps of a cut, `ids[:, :16]`, would be sizes of their own, which other calls have not.
    """
    seen: set[int] = set()
    result = []
    for x in leaves:
        given = x
        if isinstance(x, torch.Tensor) and x.layout is torch.strided and x.numel():
            steps = zip(x.shape, x.stride(), strict=True)
            if x.numel() != 1 + sum((n - 1) * step for n, step in steps):  # cut, or expanded
                x = x.contiguous()
        result.append(x.clone() if isinstance(x, torch.Tensor) and id(given) in seen else x)
        seen.add(id(given))
    return result


def leaves_of(named: Named) -> list[tuple[str, Any]]:
    """Names and leaves, flattened: the argument's name, with `.i` for parts of a container."""
    result = []
    for path, leaf in tree_flatten_with_path(dict(named))[0]:
        parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        result.append((".".join(parts), leaf))
    return result


def leaf_names(named: Named) -> list[str]:
    """The names of the flattened leaves."""
    return [name for name, _ in leaves_of(named)]


def program_key(named: Named, leaves: Sequence[Any]) -> tuple[object, ...]:
    """What decides which program a call needs: names, structure, constants, dtypes and ranks."""
    parts: list[object] = []
    for k, v in named.items():
        parts.append(k)
        if not isinstance(v, torch.Tensor):
            parts.append(len(tree_leaves(v)))
    for leaf in leaves:
        is_tensor = isinstance(leaf, torch.Tensor)
        parts.append((leaf.dtype, leaf.dim()) if is_tensor else (type(leaf).__name__, leaf))
    return tuple(parts)


def copied(named: Named) -> dict[str, Any]:
    """The arguments with a copy of every tensor."""
    return dict(tree_map_only(torch.Tensor, torch.clone, dict(named)))
