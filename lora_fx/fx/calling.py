"""The call of a captured model: binding by the original signature, and the checks at the door."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lora_fx.errors import LoraFxError

_EMPTY = inspect.Parameter.empty


class Signature:
    """The parameters of a forward, and how arguments given in any way are named.

    Its `bind` uses plain loops only, so that torch.compile can trace it.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.signature = inspect.signature(forward)
        kinds = inspect.Parameter
        params = self.signature.parameters.values()
        self.positional_only = [p.name for p in params if p.kind is kinds.POSITIONAL_ONLY]
        self.positional = [
            p.name for p in params if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ]
        self.keywords = {p.name for p in params if p.kind is kinds.KEYWORD_ONLY} | set(
            self.positional
        )
        self.rest = next((p.name for p in params if p.kind is kinds.VAR_POSITIONAL), "")
        self.open = any(p.kind is kinds.VAR_KEYWORD for p in params)
        self.order = {p.name: i for i, p in enumerate(params)}
        self.defaults = {p.name: p.default for p in params if p.default is not _EMPTY}
        self.required = [n for n in self.positional if n not in self.defaults] + [
            p.name for p in params if p.kind is kinds.KEYWORD_ONLY and p.default is _EMPTY
        ]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """{name: value} in the order of the signature, without None and defaults.

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
        return {k: named[k] for k in names if not self._idle(k, named[k])}

    def _idle(self, name: str, value: Any) -> bool:
        if value is None:
            return True
        default = self.defaults.get(name, _EMPTY)
        plain = isinstance(value, (bool, int, float, str)) and type(value) is type(default)
        return plain and bool(value == default)

    def call(self, forward: Callable[..., Any], named: Mapping[str, Any]) -> Any:
        """Call a forward of this signature with bound arguments."""
        named = dict(named)
        rest = named.pop(self.rest, ()) if self.rest else ()
        lead: list[Any] = []
        names = self.positional if rest else self.positional_only
        for n in names:
            lead.append(named.pop(n, self.defaults.get(n)))
        return forward(*lead, *rest, **named)


def apart(leaves: Sequence[Any]) -> list[Any]:
    """One tensor given for two inputs (labels=input_ids) is two, or the graph mixes them up."""
    seen: set[int] = set()
    result = []
    for x in leaves:
        result.append(x.clone() if isinstance(x, torch.Tensor) and id(x) in seen else x)
        seen.add(id(x))
    return result


def leaf_names(named: Mapping[str, Any]) -> list[str]:
    """Names of the flattened leaves: the argument's own, with `.i` for parts of a container."""
    result = []
    for path, _ in pytree.tree_flatten_with_path(dict(named))[0]:
        parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        result.append(".".join(parts))
    return result


_CACHE = re.compile(r"(past_key_values|present)\.\d+\.(key|value)")


def onnx_name(path: str) -> str:
    """The name of an input or output in an ONNX file: dots stay where runtimes look for them.

    >>> onnx_name("pair.0"), onnx_name("past_key_values.0.key")
    ('pair_0', 'past_key_values.0.key')
    """
    return path if _CACHE.fullmatch(path) else path.replace(".", "_")


def output_name(path: str, i: int) -> str:
    """A flat output's name: the field of a dict or output class, else output, output_1."""
    name = path.lstrip(".")
    if not name or name.split(".")[0].isdigit():
        return f"output_{name.replace('.', '_')}" if name and name != "0" else "output"
    return onnx_name(name)


def program_key(named: Mapping[str, Any], leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What decides which program a call needs: names, structure, constants, dtypes and ranks."""
    parts: list[Any] = []
    for k in named:
        v = named[k]
        parts.append(k)
        if not isinstance(v, torch.Tensor):
            parts.append(len(pytree.tree_leaves(v)))
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            parts.append((leaf.dtype, leaf.dim()))
        else:
            parts.append((type(leaf).__name__, leaf))
    return tuple(parts)


@dataclass(frozen=True)
class Door:
    """The sizes that a program takes.

    Attributes:
        names: Names of the leaves.
        sizes: Per tensor leaf, the fixed size of each dimension, or None for any.
        same: Pairs of (leaf, dim) that must agree.
        not_one: (leaf, dim) that took another path at size 1.
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[int | None, ...] | None, ...]
    same: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = ()
    not_one: tuple[tuple[int, int], ...] = ()

    def check(self, leaves: Sequence[Any]) -> None:
        """Raise ValueError naming the input whose size does not fit."""
        for name, want, leaf in zip(self.names, self.sizes, leaves, strict=True):
            if want is None:
                continue
            for i in range(len(want)):
                if want[i] is not None and leaf.shape[i] != want[i]:
                    raise ValueError(
                        f"{name}: captured for sizes {list(want)} (None = any), "
                        f"got {list(leaf.shape)}"
                    )
        for (i, d), (j, c) in self.same:
            if leaves[i].shape[d] != leaves[j].shape[c]:
                raise ValueError(
                    f"{self.names[i]}: dimension {d} is {leaves[i].shape[d]}, but "
                    f"{self.names[j]}: dimension {c} is {leaves[j].shape[c]}"
                )
        for i, d in self.not_one:
            if leaves[i].shape[d] == 1:
                raise ValueError(f"{self.names[i]}: dimension {d} of size 1 takes another path")


def as_module(model: Any) -> torch.nn.Module:
    """The module whose forward a capture traces: the model, or one that calls it.

    A bound method of a module becomes that module with this method as its forward. A function
    becomes a module that owns the modules and parameters its closure and globals name.
    """
    if isinstance(model, torch.nn.Module):
        return model
    if not callable(model):
        raise LoraFxError(
            f"a {type(model).__name__} is no model",
            "pass an nn.Module, or a function of tensors",
        )
    return Called(model)


class Called(torch.nn.Module):
    """A function as a module; the modules that it closes over are its children."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        bound = getattr(function, "__self__", None)
        if isinstance(bound, torch.nn.Module):
            for name, child in bound._modules.items():
                self.add_module(name, child)
            for name, p in bound._parameters.items():
                self.register_parameter(name, p)
            for name, b in bound._buffers.items():
                self.register_buffer(name, b)
            return
        inner = inspect.unwrap(function)
        if not inspect.isfunction(inner):
            return
        free = inspect.getclosurevars(inner)
        for name, v in {**free.globals, **free.nonlocals}.items():
            if isinstance(v, torch.nn.Module):
                self.add_module(name, v)
            elif isinstance(v, torch.nn.Parameter):
                self.register_parameter(name, v)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)
