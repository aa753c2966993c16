"""What the text of a drawn ONNX graph calls: nodes, weights and bodies, as plain or with W + ΔW.

A `Weight` is two names, of what products read and of what everything else reads. They are one
tensor in the model itself; in the model by hand the first has the update in it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array

Array = np.ndarray[Any, Any]
Dims = Sequence[int | str | None]
MS = "com.microsoft"
LOCAL = "local"


@dataclass(frozen=True)
class Weight:
    """A stored tensor, or a view of one."""

    name: str
    new: str
    old: str


Operand = str | Weight


def dtype_of(name: str) -> int:
    """The ONNX dtype of a numpy name."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(name))


@dataclass
class Text:
    """The main graph, a body or a function.

    Attributes:
        opset: Of the model.
        seed: Of the values of weights.
        changed: Weight → its value with the update, in the model by hand.
        weights: Weight → its value.
        layouts: Weight → its axes, in stored order: b, o or i, each with its size where that is a
            part of an axis, and with a letter where the order of several is not the stored one.
        used: Weights that a product of the op table reads.
        read: Weights that something else reads.
        symbols: Input → its dimensions, named.
        highs: Input → integers lie below this.
        style: How weights are called.
        domain: Of the standard's own ops.
        infer: Write the shapes of all values into the file.
        external: Keep the weights in a file beside it.
        cuts: Numbers on both sides of which sizes have to be tried.
        gate: How far rounding may move an output.
        exact: Changed weights behind a cast are not rounded to the dtype that they are stored in: a
            branch that stands apart is not.
    """

    opset: int = 17
    seed: int = 0
    changed: Mapping[str, Array] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    cuts: list[int] = field(default_factory=list)
    gate: list[float] = field(default_factory=lambda: [1e-4])
    count: list[int] = field(default_factory=lambda: [0])
    nodes: list[NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    stored: list[TensorProto] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    symbols: dict[str, Dims] = field(default_factory=dict)
    highs: dict[str, int] = field(default_factory=dict)
    style: str = "{}"
    domain: str = ""
    infer: bool = False
    external: bool = False
    exact: bool = False

    def body(self) -> Text:
        """Another graph of the same model."""
        return Text(
            self.opset, self.seed, self.changed, self.weights, self.layouts, self.used, self.read,
            self.cuts, self.gate, self.count, style=self.style,
            exact=self.exact,
        )  # fmt: skip

    def fresh(self, stem: str = "v") -> str:
        """A new name."""
        self.count[0] += 1
        return f"{stem}{self.count[0]}"

    # --- what is stored ---------------------------------------------------------------------------

    def _value(self, name: str, shape: Sequence[int], scale: float) -> Array:
        rng = np.random.default_rng(zlib.crc32(f"{self.seed}:{name}".encode()))
        return rng.standard_normal(tuple(shape)) * scale

    def weight(
        self,
        name: str,
        shape: Sequence[int],
        layout: str,
        dtype: str = "float32",
        how: str = "",
        scale: float = 0.4,
    ) -> Weight:
        """A weight; `how` is constant (a node) or input (an initialiser that is an input too)."""
        value = self._value(name, shape, scale).astype(dtype)
        name = self.style.format(name)
        self.weights[name], self.layouts[name] = value, layout
        if name not in self.changed:
            self._store(name, value, how)
            return Weight(name, name, name)
        self._store(name, self.changed[name].astype(dtype), how)
        self._store(f"{name}__old", value, how)
        return Weight(name, name, f"{name}__old")

    def _store(self, name: str, value: Array, how: str = "") -> None:
        tensor = from_array(value, name)
        if how == "constant":
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            return
        self.stored.append(tensor)
        if how == "input":
            self.inputs.append(helper.make_tensor_value_info(name, tensor.data_type, value.shape))

    def const(self, value: Any, dtype: str | None = None, *, node: bool = False) -> str:
        """A constant."""
        name = self.fresh("c")
        array = np.asarray(value, dtype or ("int64" if _whole(value) else "float32"))
        self._store(name, array, "constant" if node else "")
        return name

    def known(self, name: str) -> str | None:
        """The weight of a name, or of one where `@` and brackets are spelled `_`."""
        spelled = {re.sub(r"[@\[\]]", "_", n): n for n in self.weights}
        return name if name in self.weights else spelled.get(name)

    # --- nodes ------------------------------------------------------------------------------------

    def node(
        self, op: str, ins: Sequence[Operand], n: int = 1, domain: str = "", **attrs: Any
    ) -> Any:
        """A node; its result, or a tuple of several."""
        self.used.update(x.name for x in ins if isinstance(x, Weight))
        names = [x.new if isinstance(x, Weight) else x for x in ins]
        made = [self.fresh() for _ in range(n)]
        domain = domain or self.domain
        self.nodes.append(helper.make_node(op, names, made, domain=domain, **attrs))
        return made[0] if n == 1 else tuple(made)

    def view(
        self, op: str, w: Weight, ins: Sequence[str] = (), n: int = 1, at: int = 0, **attrs: Any
    ) -> Weight:
        """Another way to see a weight: result `at` of an op."""
        names = [self.fresh() for _ in range(n)]
        self.nodes.append(helper.make_node(op, [w.new, *ins], names, **attrs))
        if w.new == w.old:
            return Weight(w.name, names[at], names[at])
        old = [f"{name}__old" for name in names]
        self.nodes.append(helper.make_node(op, [w.old, *ins], old, **attrs))
        return Weight(w.name, names[at], old[at])

    def other(self, w: Weight) -> str:
        """The weight as everything but a product of the op table reads it."""
        self.read.add(w.name)
        return w.old

    def shape(self, x: Operand, sizes: Sequence[int]) -> Any:
        """x as sizes."""
        to = self.const(list(sizes))
        return self.view("Reshape", x, [to]) if isinstance(x, Weight) else self.node(
            "Reshape", [x, to]
        )  # fmt: skip

    def turn(self, x: Any, *perm: int) -> Any:
        """The transpose of x."""
        if isinstance(x, Weight):
            return self.view("Transpose", x, perm=perm)
        return self.node("Transpose", [x], perm=perm)

    def cast(self, x: Any, dtype: str) -> Any:
        """The value x in another dtype."""
        if isinstance(x, Weight):
            seen = self.view("Cast", x, to=dtype_of(dtype))
            if not self.exact or x.new != x.name or x.name not in self.changed:
                return seen
            made = f"{x.name}__exact{len(self.stored)}"
            self._store(made, self.changed[x.name].astype(dtype))
            return Weight(x.name, made, seen.old)
        return self.node("Cast", [x], to=dtype_of(dtype))

    def cut(self, x: Any, start: int, stop: int, axis: int, step: int = 1) -> Any:
        """The slice of x."""
        bounds = [self.const([n]) for n in (start, stop, axis, step)]
        if isinstance(x, Weight):
            return self.view("Slice", x, bounds[: 3 if step == 1 else 4])
        return self.node("Slice", [x, *bounds])

    def _axes(self, op: str, x: Any, axes: Sequence[int], since: int, **attrs: Any) -> Any:
        ins = [] if self.opset < since else [self.const(list(axes))]
        attrs |= {"axes": list(axes)} if self.opset < since else {}
        if isinstance(x, Weight):
            return self.view(op, x, ins, **attrs)
        return self.node(op, [x, *ins], **attrs)

    def squeeze(self, x: Any, *axes: int) -> Any:
        """The value x without axes."""
        return self._axes("Squeeze", x, axes, 13)

    def unsqueeze(self, x: Any, *axes: int) -> Any:
        """The value x with axes of size 1."""
        return self._axes("Unsqueeze", x, axes, 13)

    def reduce(self, op: str, x: Operand, axes: Sequence[int], keep: int = 1) -> Any:
        """A reduction; `op` is Mean, Sum, Max …"""
        name = x.new if isinstance(x, Weight) else x
        since = 13 if op == "Sum" else 18
        return self._axes(f"Reduce{op}", name, axes, since, keepdims=keep)

    def like(self, x: str, y: str, width: int) -> str:
        """The flat rows x in the leading sizes of y."""
        lead = self.node("Slice", [self.node("Shape", [y]), self.const([0]), self.const([-1])])
        to = self.node("Concat", [lead, self.const([width])], axis=0)
        return str(self.node("Reshape", [x, to]))

    def add(self, x: str, y: Operand) -> str:
        """A sum."""
        return str(self.node("Add", [x, y]))

    # --- interfaces -------------------------------------------------------------------------------

    def input(
        self, name: str, dims: Dims, dtype: str = "float32", high: int = 2, said: Dims | None = None
    ) -> str:
        """An input of these dimensions; the file says others where `said` is given."""
        told = dims if said is None else said
        self.inputs.append(helper.make_tensor_value_info(name, dtype_of(dtype), told))
        self.symbols[name], self.highs[name] = dims, high
        return name

    def output(self, x: Operand, dims: Dims | None = None, dtype: str = "float32") -> None:
        """An output."""
        name = x.new if isinstance(x, Weight) else x
        taken = {v.name for v in (*self.outputs, *self.inputs)} | {t.name for t in self.stored}
        if name in taken:
            name = str(self.node("Identity", [name]))
        self.outputs.append(helper.make_tensor_value_info(name, dtype_of(dtype), dims))

    def graph(self, name: str = "body") -> GraphProto:
        """A body."""
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.stored)

    def function(self, name: str, ins: Sequence[str], body: Text, outs: Sequence[str]) -> None:
        """A function of the model."""
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MS, 1)]
        self.functions.append(
            helper.make_function(LOCAL, name, ins, list(outs), body.nodes, opsets)
        )

    def model(self) -> ModelProto:
        """The model."""
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MS, 1)]
        opsets += [helper.make_opsetid(LOCAL, 1)] if self.functions else []
        version = 10 if self.opset > 20 else 9 if self.functions or self.opset > 18 else 8
        made = helper.make_model(
            self.graph("main"), opset_imports=opsets, functions=self.functions, ir_version=version
        )
        return onnx.shape_inference.infer_shapes(made) if self.infer and not self.domain else made


def _whole(value: Any) -> bool:
    return bool(np.issubdtype(np.asarray(value).dtype, np.integer))


TOKEN = re.compile(r"([bio])([a-z]?)(\d*)")


@dataclass(frozen=True)
class Axes:
    """How ΔW [*batch, out, in] lies in a stored tensor."""

    split: tuple[int, ...]
    letters: tuple[str, ...]

    def order(self, kind: str) -> list[int]:
        """The axes of one kind, by their own order."""
        mine = [k for k, t in enumerate(self.letters) if t[0] == kind]
        return sorted(mine, key=lambda k: self.letters[k][1:])

    def size(self, kind: str) -> int:
        """Elements along one kind."""
        return int(np.prod([self.split[k] for k in self.order(kind)], dtype=np.int64))

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.split[k] for k in self.order("b"))

    def stored(self, matrix: Array, shape: Sequence[int]) -> Array:
        """[*batch, out, in] as it is stored."""
        order = self.order("b") + self.order("o") + self.order("i")
        parts = matrix.reshape([self.split[k] for k in order])
        return parts.transpose(np.argsort(order)).reshape(shape)

    def swapped(self) -> Axes:
        """What the other way to read it makes of it."""
        other = {"i": "o", "o": "i", "b": "b"}
        return Axes(self.split, tuple(other[t[0]] + t[1:] for t in self.letters))


def axes_of(layout: str, shape: Sequence[int]) -> Axes:
    """The axes of a layout's text, of a tensor or of a region of one."""
    found = [TOKEN.fullmatch(t) for t in layout.split()]
    tokens = [m.groups() for m in found if m]
    whole = len(tokens) == len(shape)
    split = tuple(shape) if whole else tuple(int(size) for _, _, size in tokens)
    return Axes(split, tuple(kind + order for kind, order, _ in tokens))


def has_body(model: ModelProto) -> bool:
    """True where a node has one."""
    graphs = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    return any(a.type in graphs for n in model.graph.node for a in n.attribute)
