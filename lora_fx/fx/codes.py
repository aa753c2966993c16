"""Weights of a tree that are stored as codes: their tensors, and the op that makes numbers of them.

The parameter keeps its name and holds the codes in bytes; buffers beside it, NAME_scale and
NAME_zero, hold a number a block, and NAME_order the places of columns that lie by their blocks.
Graphs read all of them by one op, `lora_fx::dequantise`; its result is never kept for backward: see
lora_fx.passes.reread.

========== ==================================== =================================================
format     codes                                scale and zero
========== ==================================== =================================================
int2 … 8   [rows, blocks, block·bits/8], the    [rows, blocks]; the zeros' codes lie in bytes, row
           first code in the lowest bits, as    by row, too, or are floats. Without them the middle
           ONNX Runtime's MatMulNBits has them  code is 0, such as 8 of 4 bits
nf4, fp4,  [(elements + 1) / 2], the first      [blocks] along the flattened weight; no zero
torchao's  code in the highest bits, as
nf4, OCP's bitsandbytes has them
fp4
fp8        [elements], float8_e4m3fn            the same
========== ==================================== =================================================

A row holds all that is multiplied with one x: [out, in], [experts · out, in], [out, in · kernel]. A
weight that is stored [in, out] has its rows transposed, and `turned` says so.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.quantised.floats import E2M1
from lora_fx.files.quantised.onnx import BITS, as_matmul_nbits
from lora_fx.fx.graph.nodes import dtype_of
from lora_fx.fx.tensors import from_numpy, named_tensors, owner, parameter_of, replace_parameter
from lora_fx.ir.bit_packing import packed
from lora_fx.ir.quantised import FP4, NF4, Quantised

PARTS = ("scale", "zero", "order")
HELD = "_quantised"
"""The attribute of a module that says what its parameters' codes stand for, by leaf."""
FP8 = "float8_e4m3fn"
LEVELS = {
    "nf4": NF4,
    "fp4": FP4,
    "torchao_nf4": np.round(NF4, 4),
    "ocp_fp4": E2M1,
    "fp8": np.arange(256, dtype=np.uint8).view(numpy_dtype(FP8)).astype(np.float32),
}
"""Formats whose codes are places of a table, in the order of the codes."""


@dataclass(frozen=True)
class Stored:
    """What the codes of one parameter stand for.

    Attributes:
        format: nf4, fp4, int4 …
        shape: Of the weight.
        block: How many elements share a scale.
        dtype: The dtype that the weight has for a model that reads it.
        turned: The weight is [..., in, out] and its rows are those of [..., out, in].
        parts: Which of PARTS there are.
    """

    format: str
    shape: tuple[int, ...]
    block: int
    dtype: torch.dtype
    turned: bool = False
    parts: tuple[str, ...] = PARTS[:1]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return bits_of(self.format)


def bits_of(kind: str) -> int:
    """Bits of one code of a format, which is the number at its end.

    >>> bits_of("int8"), bits_of("nf4")
    (8, 4)
    """
    return int(kind[-1])


@functools.cache
def _table(kind: str) -> torch.Tensor:
    """The values of the codes in every byte, [256, codes in a byte], in their order."""
    bits = bits_of(kind)
    shifts = torch.arange(0, 8, bits)
    flat = kind in LEVELS
    codes = (torch.arange(256)[:, None] >> (shifts.flip(0) if flat else shifts)) & (2**bits - 1)
    return torch.from_numpy(LEVELS[kind])[codes] if flat else codes.float()


def dequantised(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    order: torch.Tensor | None,
    *form: Any,
) -> torch.Tensor:
    """The weight, from plain ops; products are made in float32 and rounded once to its dtype.

    `form` is what `arguments` says.
    """
    shape, kind, block, turned, dtype = form
    values = _table(kind).to(codes.device).index_select(0, codes.reshape(-1).int())
    if kind in LEVELS:
        count = math.prod(shape)
        flat = F.pad(values.reshape(-1)[:count], (0, -count % block))
        flat = (flat.reshape(-1, block) * scale[:, None]).reshape(-1)[:count]
    else:
        rows, blocks = scale.shape
        offset: torch.Tensor | float = 2.0 ** (bits_of(kind) - 1)
        if zero is not None:
            offset = zero[..., None]
            if zero.dtype == torch.uint8:
                told = _table(kind).to(codes.device).index_select(0, zero.reshape(-1).int())
                offset = told.reshape(rows, -1)[:, :blocks, None]
        wide = (values.reshape(rows, blocks, block) - offset) * scale[..., None]
        flat = wide.reshape(rows, blocks * block)[:, : math.prod(shape) // rows]
        flat = flat if order is None else flat.index_copy(1, order.long(), flat)
    if turned:
        swapped = [*shape[:-2], shape[-1], shape[-2]]
        return flat.to(dtype).reshape(swapped).transpose(-1, -2)
    return flat.to(dtype).reshape(list(shape))


SCHEMA = (
    "(Tensor codes, Tensor scale, Tensor? zero, Tensor? order, int[] shape, str kind, int block, "
    "bool turned, ScalarType dtype) -> Tensor"
)
_op = torch.library.custom_op("lora_fx::dequantise", mutates_args=(), schema=SCHEMA)(dequantised)


@_op.register_fake
def _shaped(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    shape, _, _, turned, dtype = rest[3:]
    if not turned:
        return codes.new_empty(shape, dtype=dtype)
    return codes.new_empty([*shape[:-2], shape[-1], shape[-2]], dtype=dtype).transpose(-1, -2)


DEQUANTISE: Callable[..., torch.Tensor] = torch.ops.lora_fx.dequantise.default


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x·Wᵀ + bias as a kernel in the weight's dtype rounds it; x and what is given are of one."""
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


# one op, so that a branch beside it reads x before it is rounded, and is added behind
torch.library.define("lora_fx::linear_in", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("lora_fx::linear_in", "CompositeImplicitAutograd", product)
LINEAR_IN: Callable[..., torch.Tensor] = torch.ops.lora_fx.linear_in.default


# The tree.


def store(
    root: nn.Module, name: str, q: Quantised, dtype: torch.dtype, shape: Sequence[int], turned: bool
) -> None:
    """Put codes in the place of a parameter, under all its names.

    Args:
        root: The tree; its own classes read the weight as numbers from then on.
        name: The parameter's first name.
        q: The rows [rows, columns].
        dtype: The dtype that the weight has for the model.
        shape: That of the weight.
        turned: As in `Stored`.

    Raises:
        LoraFxError: Codes that no layout of the table above holds.
    """
    kind, block, arrays = arrays_of(name, q)
    if other := taken(root, name, arrays):
        raise LoraFxError(f"{name}: its module has a {other} already", "rename that")
    parts = tuple(p for p in PARTS if p in arrays)
    stored = Stored(kind, tuple(shape), block, dtype, turned, parts)
    old = parameter_of(root, name)
    tensors = {k: from_numpy(v) for k, v in arrays.items()}
    tensors |= {k: t.float() for k, t in tensors.items() if t.is_floating_point()}
    device = old.device if old.device.type != "meta" else torch.device("cpu")
    new = nn.Parameter(tensors.pop("codes").to(device), requires_grad=False)
    for module in root.modules():
        for leaf in [n for n, p in module._parameters.items() if p is old]:
            for part, t in tensors.items():
                module.register_buffer(f"{leaf}_{part}", t.to(device))
            module.__dict__.setdefault(HELD, {})[leaf] = stored
            module.__class__ = _reading(type(module), leaf)
    replace_parameter(root, old, new)


def taken(root: nn.Module, name: str, parts: Iterable[str] = ("scale",)) -> str:
    """The name beside a parameter that its scales or zeros would take from something else."""
    p = parameter_of(root, name)
    leaves = ((m, n) for m in root.modules() for n, own in m._parameters.items() if own is p)
    names = ((m, f"{n}_{part}") for m, n in leaves for part in parts)
    return next((n for m, n in names if hasattr(m, n)), "")


def arrays_of(name: str, q: Quantised) -> tuple[str, int, dict[str, Array]]:
    """Format, block, and the arrays as the table above has them."""
    if q.codes.dtype.name == FP8:
        q = dataclasses.replace(q, codes=q.codes.view(np.uint8), levels=LEVELS["fp8"])
    levels = q.levels
    if levels is not None:
        if not q.flat and len(q.block) == 2 and q.block[0] > 1:  # a scale of many rows
            scale = np.repeat(q.scale.reshape(-1, q.scale.shape[-1]), q.block[0], 0)[: len(q.codes)]
            q = dataclasses.replace(q, scale=scale, block=(1, q.block[1]))
        kinds = [k for k, t in LEVELS.items() if np.array_equal(t, levels, equal_nan=True)]
        goes_on = q.flat or (q.block[0] == 1 and q.shape[-1] % q.block[-1] == 0)
        if not kinds or not goes_on:
            raise LoraFxError(
                f"{name}: {len(levels)} levels in blocks of {list(q.block)} are no known format",
                f"expected {', '.join(LEVELS)}, in blocks along the flattened weight",
            )
        codes = packed(q.codes.reshape(-1), bits_of(kinds[0]), high=True)
        scale = q.scale.reshape(-1).astype(np.float32)
        return kinds[0], q.block[-1], {"codes": codes, "scale": scale}
    made = as_matmul_nbits(name, q, strict=False)
    arrays = {"codes": made.b, "scale": made.scales}
    if made.zero_points is not None:
        arrays["zero"] = made.zero_points
    if q.order is not None:
        arrays["order"] = q.order.astype(np.int32)
    return f"int{made.bits}", made.block_size, arrays


def _reading(cls: type[nn.Module], leaf: str) -> type[nn.Module]:
    """A class whose parameter reads as numbers: what runs is the user's own code."""
    read = property(functools.partial(numbers, name=leaf))
    own = getattr(cls, "_own_class", cls)
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "_own_class": own, leaf: read})


def arguments(stored: Stored, dtype: torch.dtype) -> tuple[Any, ...]:
    """What the op takes behind its tensors."""
    return list(stored.shape), stored.format, stored.block, stored.turned, dtype


def forms(root: nn.Module) -> dict[str, Stored]:
    """First name of a parameter that is stored as codes → what they stand for."""
    held = {p: m.__dict__[HELD] for p, m in root.named_modules() if m.__dict__.get(HELD)}
    names = named_tensors(root)[0] if held else {}
    found: dict[str, Stored] = {}
    for path, stored in held.items():
        for leaf, q in stored.items():
            if name := names.get(f"{path}.{leaf}".lstrip(".")):
                found.setdefault(name, q)
    return found


def stored_of(root: nn.Module, name: str) -> Stored | None:
    """What the codes of a parameter stand for; None where it holds numbers."""
    module, leaf = owner(root, name)
    found: Stored | None = (module.__dict__.get(HELD) or {}).get(leaf)
    return found


def numbers(root: nn.Module, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight that a parameter's codes stand for; the parameter where it holds numbers.

    Args:
        root: The tree.
        name: The parameter's name.
        dtype: In which the weight is made; without it, the one that it has for the model.
    """
    (module, leaf), held = owner(root, name), parameter_of(root, name)
    stored = stored_of(root, name)
    if stored is None or held.is_floating_point():
        return held
    parts = (module._buffers.get(f"{leaf}_{part}") for part in PARTS)
    return DEQUANTISE(held, *parts, *arguments(stored, dtype or stored.dtype))


def tensors_of(root: nn.Module, name: str) -> list[torch.Tensor]:
    """The codes of a parameter, and its PARTS."""
    module, leaf = owner(root, name)
    parts = (module._buffers.get(f"{leaf}_{part}") for part in PARTS)
    return [parameter_of(root, name), *(t for t in parts if t is not None)]


def forget(root: nn.Module) -> None:
    """Make a copy whose codes became numbers an ordinary tree again."""
    for module in root.modules():
        for leaf in module.__dict__.pop(HELD, {}):
            for part in PARTS:
                module._buffers.pop(f"{leaf}_{part}", None)
        module.__class__ = getattr(type(module), "_own_class", type(module))


def beside(model: nn.Module, purpose: str = "quantise it") -> nn.Module:
    """A second tree of a model's code, which shares its tensors and can hold others for some.

    Args:
        model: The model; it is not changed.
        purpose: What the copy is for, for the message.

    Raises:
        LoraFxError: The model cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as e:
        raise LoraFxError(
            f"{type(model).__name__} cannot be copied to {purpose}: {one_line(e)}",
            "make it deepcopy-able, or load it quantised"
            if purpose == "quantise it"
            else "make it deepcopy-able, or untie it before",
        ) from e


# The graph.


def read_codes(graph: fx.Graph, names: dict[str, str], held: dict[str, Stored]) -> bool:
    """Let a graph read, by the op, what the tree stores as codes; returns whether any was new.

    Every user has an op of its own, just before it and in its module, so that no more than one
    weight is there as numbers at a time.
    """
    new = False
    for node in graph.find_nodes(op="get_attr"):
        name = names.get(str(node.target), "")
        stored = held.get(name)
        if stored is None:
            continue
        rest = arguments(stored, dtype_of(node) or stored.dtype)
        for user in [u for u in node.users if u.target is not DEQUANTISE]:
            with graph.inserting_before(user):
                parts = {p: graph.get_attr(f"{name}_{p}") for p in stored.parts}
                made = graph.call_function(DEQUANTISE, (node, *map(parts.get, PARTS), *rest))
            made.meta["val"] = node.meta["val"]
            if "nn_module_stack" in user.meta:
                made.meta["nn_module_stack"] = user.meta["nn_module_stack"]
            user.replace_input_with(node, made)
            new = True
    return new


def learn(root: nn.Module, graph: fx.Graph, names: Mapping[str, str]) -> None:
    """Let a tree say what its codes stand for, as the ops of a program from a file do.

    Args:
        root: The tree of the file's tensors.
        graph: The program's.
        names: Placeholder → the tensor's name.

    Raises:
        LoraFxError: What an op says and what its tensors are differ, or what two ops say of them.
    """
    for node in graph.find_nodes(op="call_function", target=DEQUANTISE):
        codes, *beside, shape, kind, block, turned, dtype = node.args
        given = {p: names[n.name] for p, n in zip(PARTS, beside, strict=True) if n is not None}
        name, said = names[codes.name], (kind, shape, block, turned, dtype)
        sizes = tuple(shape) if isinstance(shape, Sequence) else ()
        stored = Stored(kind, sizes, block, dtype, turned, tuple(given))
        own = given == {p: f"{name}_{p}" for p in given}
        same = stored_of(root, name) in (None, stored)
        if not (own and same and _fits(stored, *tensors_of(root, name))):
            raise LoraFxError(
                f"{name}: its codes are not those of {said}", "the file is damaged: fetch it again"
            )
        declare(root, name, stored)


def _fits(stored: Stored, codes: torch.Tensor, *rest: torch.Tensor) -> bool:
    """Whether tensors are as the table at the top has them."""
    kinds = (*LEVELS, *(f"int{n}" for n in BITS))
    plain = all(type(n) is int and n > 0 for n in (*stored.shape, stored.block))
    dtype = isinstance(stored.dtype, torch.dtype) and stored.dtype.is_floating_point
    if not (plain and dtype and stored.format in kinds and len(stored.shape) > 1):
        return False
    count, bits = math.prod(stored.shape), stored.bits
    if stored.format in LEVELS:
        want: list[tuple[int, ...]] = [(-(-count * bits // 8),), (-(-count // stored.block),)]
    else:
        rows, blocks = codes.shape[0], -(-count // max(codes.shape[0], 1) // stored.block)
        width = blocks * bits
        want = [(rows, blocks, stored.block * bits // 8), (rows, blocks)]
        if "zero" in stored.parts:
            packed = rest[1].dtype == torch.uint8
            want.append((rows, -(-width // 8) if packed else blocks))
        if "order" in stored.parts:
            order, places = rest[-1], torch.arange(count // max(rows, 1))
            want.append(tuple(places.shape))
            if not order.is_meta and not torch.equal(order.long().sort()[0].cpu(), places):
                return False
    return [tuple(t.shape) for t in (codes, *rest)] == want


def put_zeros(root: nn.Module, name: str, zero: torch.Tensor) -> None:
    """Let a parameter's codes have other zeros, floats [rows, blocks].

    Another tree that shares the codes keeps its own.
    """
    codes = parameter_of(root, name)
    for module in root.modules():
        for leaf in [n for n, p in module._parameters.items() if p is codes]:
            held = module.__dict__[HELD]
            module.register_buffer(f"{leaf}_zero", zero.to(codes.device))
            stored = dataclasses.replace(held[leaf], parts=PARTS[:2])
            module.__dict__[HELD] = {**held, leaf: stored}


def declare(root: nn.Module, name: str, stored: Stored) -> None:
    """Let a tree say what a parameter's codes stand for, wherever these are."""
    module, leaf = owner(root, name)
    module.__dict__.setdefault(HELD, {})[leaf] = stored
