"""The call of a captured model: arguments are bound by its signature, sizes checked at the door."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import fx, nn

from lora_fx.conditions import Condition, Size, SizeError
from lora_fx.errors import LoraFxError
from lora_fx.fx.graph.nodes import aten_ops, dtype_name, dtype_of, reached, shape_of
from lora_fx.fx.graph.views import VIEWS
from lora_fx.fx.tensors import from_numpy, has_values
from lora_fx.fx.trees import (
    register_dataclass,
    tree_flatten_with_path,
    tree_leaves,
    tree_structure,
    tree_unflatten,
)
from lora_fx.inputs import Extents, Input, Inputs, Named

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


def onnx_conditions(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    """Conditions over the inputs' names in an ONNX file."""
    return tuple(
        replace(c, sizes=tuple((s, onnx_name(n), d) for s, n, d in c.sizes)) for c in conditions
    )


_CACHE = re.compile(r"(past_key_values|present)\.\d+\.(key|value)")


def onnx_name(path: str) -> str:
    """The name of an input or output in an ONNX file: dots stay where runtimes look for them.

    >>> onnx_name("pair.0"), onnx_name("past_key_values.0.key")
    ('pair_0', 'past_key_values.0.key')
    """
    return path if _CACHE.fullmatch(path) else path.replace(".", "_")


def symbols_of(free: Mapping[str, Mapping[int, str]]) -> dict[tuple[str, int], str]:
    """(ONNX input, dimension) → the name of one that stays free, as a Door gives them."""
    return {(onnx_name(name), d): s for name, dims in free.items() for d, s in dims.items()}


def output_name(path: str) -> str:
    """The name of a flat output: its field in a dict or output class, else output, output_1."""
    name = path.lstrip(".")
    if not name or name.split(".")[0].isdigit():
        return f"output_{name.replace('.', '_')}" if name and name != "0" else "output"
    return onnx_name(name)


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


Requested = Mapping[str, Mapping[int, str]]
"""What should be dynamic: leaf name → {dimension: symbol name}."""


@dataclass(frozen=True)
class Door:
    """The sizes that a program takes.

    Attributes:
        names: Names of the leaves.
        sizes: For each tensor leaf, the fixed size of each dimension, or None for any.
        conditions: What the free sizes have to satisfy.
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[int | None, ...] | None, ...]
    conditions: tuple[Condition, ...] = ()

    def refused(self, leaves: Sequence[Any]) -> SizeError | None:
        """The error that names the input whose size does not fit; None where all do.

        In plain loops, which torch.compile traces.
        """
        for name, want, leaf in zip(self.names, self.sizes, leaves, strict=True):
            for i, n in enumerate(want or ()):
                if n is not None and leaf.shape[i] != n:
                    return SizeError(
                        f"{name}: captured for sizes {list(want or ())} (None = any), "
                        f"got {list(leaf.shape)}",
                        "give such sizes, or capture with this dimension dynamic",
                    )
        for condition in self.conditions:
            given = self.given(condition, leaves)
            if not condition.holds(given):
                return condition.refusal(given)
        return None

    def free(self, requested: Requested) -> dict[str, dict[int, str]]:
        """Name of a tensor leaf → {dimension: symbol} of what should be dynamic and is."""
        return {
            name: {d: s for d, s in requested.get(name, {}).items() if fixed[d] is None}
            for name, fixed in zip(self.names, self.sizes, strict=True)
            if fixed is not None
        }

    def fixed(self, requested: Requested) -> dict[Size, int]:
        """The sizes that should be dynamic and are not."""
        held = ((n, fixed) for n, fixed in zip(self.names, self.sizes, strict=True) if fixed)
        pairs = ((n, d, fixed) for n, fixed in held for d in requested.get(n, {}) if d < len(fixed))
        return {(n, d): size for n, d, fixed in pairs if (size := fixed[d]) is not None}

    def check(self, leaves: Sequence[Any]) -> None:
        """Raise what refused gives."""
        error = self.refused(leaves)
        if error is not None:
            raise error

    def admits(self, leaves: Sequence[Any]) -> bool:
        """Whether all sizes fit."""
        return self.refused(leaves) is None

    def given(self, condition: Condition, leaves: Sequence[Any]) -> dict[Size, int]:
        """The sizes that a condition speaks of."""
        return {(n, d): leaves[self.names.index(n)].shape[d] for _, n, d in condition.sizes}


WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module",
            "DataParallel": "module"}  # fmt: skip
"""Classes of torch whose modules call another one, by the name that they hold it under."""


def wrappers(model: object) -> Iterator[Any]:
    """A model and what it wraps, the innermost last: of a plain one itself alone.

    A wrapper puts `_orig_mod.` or `module.` before every name, which is none of the model's.
    """
    yield model
    if isinstance(model, nn.Module) and type(model).__module__.startswith("torch."):
        inner = model._modules.get(WRAPPERS.get(type(model).__name__, ""))
        if inner is not None:
            yield from wrappers(inner)


def unwrapped(model: object) -> Any:
    """The module that torch.compile or a parallel wrapper was given; anything else as it is."""
    return [*wrappers(model)][-1]


def as_module(model: object) -> nn.Module:
    """The module whose forward a capture traces: the model, or one that calls it.

    A bound method of a module becomes that module with this method as its forward. A function
    becomes a module that owns the modules and parameters its closure and globals name.
    """
    model = unwrapped(model)
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        hint = "pass an nn.Module, or a function of tensors"
        if isinstance(model, (str, PathLike)):
            hint = "load_model(path).module has one; export, merge and verify take a path to .onnx"
        raise LoraFxError(f"a {type(model).__name__} is no model", hint)
    return Called(model)


class OverTree(nn.Module):
    """Another forward over the tensors and modules of a source, under their names.

    Args:
        source: Whose tree it is, and whose mode; None for a tree of its own.
    """

    def __init__(self, source: nn.Module | None) -> None:
        super().__init__()
        if source is not None:
            for part in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
                self.__dict__[part] = getattr(source, part)
            self.training = source.training


class Called(OverTree):
    """A function as a module; the modules that it closes over are its children."""

    def __init__(self, function: Callable[..., Any]) -> None:
        bound = getattr(function, "__self__", None)
        source = bound if isinstance(bound, nn.Module) else None
        super().__init__(source)
        self.function = function
        inner = inspect.unwrap(function)
        if source is not None or not inspect.isfunction(inner):
            return
        free = inspect.getclosurevars(inner)
        for name, v in {**free.globals, **free.nonlocals}.items():
            if isinstance(v, nn.Module):
                self.add_module(name, v)
            elif isinstance(v, nn.Parameter):
                self.register_parameter(name, v)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)


# The signature of example tensors, and what a graph says of the sizes and integers that it takes.


aten = torch.ops.aten
_PASS = {*VIEWS} | aten_ops(
    "add.Tensor add_.Tensor sub.Tensor masked_fill.Scalar masked_fill_.Scalar where.self cat "
    "new_zeros copy_ clamp"
)


def describe(named: Named) -> Inputs:
    """The signature of an example; integers take their limit from the example for now."""
    specs = []
    for name, x in leaves_of(named):
        if not isinstance(x, torch.Tensor):
            continue
        whole = not x.dtype.is_floating_point and not x.dtype.is_complex
        real = whole and x.numel() and has_values(x)
        high = int(x.max()) + 1 if real and x.dtype != torch.bool else None
        # torch's padding masks are True where a token is left out, those of transformers where not
        fill = int(x.double().mean() >= 0.5) if real else None
        specs.append(Input(name, dtype_name(x.dtype), tuple(x.shape), high=high, fill=fill))
    return Inputs(tuple(specs))


def limits(inputs: Inputs, graph: fx.Graph, door: Door) -> tuple[Input, ...]:
    """The inputs with their limits.

    Integers stay below the rows of the tables that they index, sizes where the graph is true.
    """
    places = zip(door.names, graph.find_nodes(op="placeholder"), strict=True)
    rows = {name: _rows_reached(place) for name, place in places}
    free = door.free({s.name: s.dims for s in inputs.specs})
    return tuple(
        replace(s, high=min(rows.get(s.name, ()), default=s.high), dims=free.get(s.name, s.dims))
        for s in inputs.specs
    )


def _rows_reached(place: fx.Node) -> list[int]:
    """Rows of every lookup table whose ids come from an integer input through id-like ops."""
    if not _is_whole(place):
        return []
    ids = reached([place], lambda n: [u for u in n.users if u.target in _PASS and _is_whole(u)])
    readers = ((u, n) for n in ids for u in n.users if u.target is aten.embedding.default)
    tables = (u.args[0] for u, n in readers if u.args[1] is n)
    return [int(n) for table in tables for n in (shape_of(table) or ())[:1]]


def _is_whole(node: fx.Node) -> bool:
    """True for a tensor of whole numbers or truths."""
    dtype = dtype_of(node)
    return dtype is not None and not dtype.is_floating_point


def sample_call(
    inputs: Inputs,
    named: Named,
    size: Extents,
    seed: int = 0,
    arrays: Named | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Named arguments of one size: the example's structure and constants, sampled tensors.

    Args:
        inputs: The signature, with the sizes and limits to draw from.
        named: The example, which has the structure and the constants.
        size: What the symbols become: see lora_fx.inputs.
        seed: Draws the numbers.
        arrays: Overrides by input name, from a user's .npz.
        device: Where the tensors go; without it they stay on the CPU.
    """
    drawn = dict(inputs.sample(size, seed))
    spelled = {onnx_name(name): name for name in drawn} | {name: name for name in drawn}
    for k, v in (arrays or {}).items():
        if k not in spelled:
            raise LoraFxError(f"no input is named {k!r}", f"the inputs are {', '.join(drawn)}")
        drawn[spelled[k]] = v
    return filled(named, drawn, device)


def filled(named: Named, arrays: Named, device: torch.device | None = None) -> dict[str, Any]:
    """Named arguments again, their tensors from arrays by the names of the leaves."""
    new = [
        from_numpy(arrays[n]).to(device, x.dtype) if isinstance(x, torch.Tensor) else x
        for n, x in leaves_of(named)
    ]
    return dict(tree_unflatten(new, tree_structure(dict(named))))
