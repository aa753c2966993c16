"""onnx_ir as a Graph and an Emitter: MatMul with a weight behind Transpose, so far.

The same find, insert and fold as on torch.fx run on it. Adding an op is one row of OPS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_fx import kinds
from lora_fx.errors import LoraFxError
from lora_fx.graph import Parameter, Role, Site
from lora_fx.kinds import Kind
from lora_fx.view import Permute, View

MARK = "lora_fx"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Row:
    """One op: where its weight and activation operands may be, and the Kind of each case."""

    weight: int
    x: int
    kind: Kind


OPS: Mapping[str, tuple[Row, ...]] = {
    "MatMul": (Row(1, 0, kinds.matmul_right()), Row(0, 1, kinds.matmul_left())),
}


class OnnxGraph:
    """A model's main graph; initialisers of two or more dimensions are its parameters."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def parameters(self) -> Sequence[Parameter]:
        """Floating initialisers that no pass added, in file order."""
        result = []
        for name, v in self.model.graph.initializers.items():
            if v.const_value is not None and MARK not in v.metadata_props:
                dtype = v.const_value.dtype.name.lower()
                if "float" in dtype:
                    long = {"float": "float32", "double": "float64"}.get(dtype, dtype)
                    result.append(Parameter(name, tuple(v.const_value.shape.numpy()), long))
        return result

    def sites(self) -> Sequence[Site]:
        """Every use of a weight, in execution order."""
        return [site for site, _, _ in self._uses()]

    def _uses(self) -> Iterator[tuple[Site, ir.Node, Row]]:
        known = {p.name: p for p in self.parameters()}
        for node in self.model.graph:
            if MARK in node.metadata_props:
                continue
            for row in OPS.get(node.op_type, ()):
                chain = self._chain(node.inputs[row.weight], known)
                if chain is None or self._chain(node.inputs[row.x], known) is not None:
                    continue
                name, view, shape = chain
                if len(shape) != 2:
                    continue
                site = Site(_id(node), node.op_type, row.kind, name, view, shape)
                yield site, node, row
                break

    def _chain(
        self, value: ir.Value | None, known: Mapping[str, Parameter]
    ) -> tuple[str, View, tuple[int, ...]] | None:
        """(parameter, view, operand shape) of a value that is a parameter behind Transposes."""
        steps: list[Permute] = []
        while value is not None:
            name = str(value.name)
            if name in known:
                shape = known[name].shape
                for step in reversed(steps):
                    shape = tuple(shape[d] for d in step.dims)
                return name, View(tuple(reversed(steps))), shape
            node = value.producer()
            if node is None:
                return None
            if node.op_type == "Add" and MARK in node.metadata_props:
                value = node.inputs[0]  # W + ΔW of the weight form
            elif node.op_type == "Transpose":
                perm = node.attributes.get("perm")
                if perm is None:
                    return None
                steps.append(Permute(tuple(perm.as_ints())))
                value = node.inputs[0]
            else:
                return None
        return None

    def data_flops(self) -> int:
        """Unknown without shapes."""
        return 0

    def adapted(self) -> frozenset[str]:
        """Ids of sites whose branch stands in the graph."""
        nodes = (n.metadata_props.get(MARK) for n in self.model.graph)
        return frozenset(n for n in nodes if n)

    def read(self, name: str) -> Array:
        """An initialiser's value."""
        tensor = self.model.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    def _at(self, site: Site) -> tuple[ir.Node, Row]:
        for found, node, row in self._uses():
            if found.id == site.id:
                return node, row
        raise LoraFxError(f"site {site.id!r} is not in this graph")

    def activation(self, site: Site) -> ir.Value:
        """The other operand."""
        node, row = self._at(site)
        value = node.inputs[row.x]
        assert value is not None
        return value

    def weight(self, site: Site) -> ir.Value:
        """The initialiser that the site reads."""
        return self.model.graph.initializers[site.parameter]

    def output(self, site: Site) -> ir.Value:
        """The node's result."""
        return self._at(site)[0].outputs[0]

    def emit(self, site: Site, *, before: bool = False) -> OnnxEmitter:
        """An emitter after the site's node, or before it."""
        return OnnxEmitter(self, site, self._at(site)[0], before=before)

    def replace_output(self, site: Site, y: ir.Value) -> None:
        """Every user but the branch itself reads y; a graph output keeps its name."""
        old = self.output(site)
        for user, i in list(old.uses()):
            if user.metadata_props.get(MARK) != site.id:
                user.replace_input_with(i, y)
        outputs = self.model.graph.outputs
        for i, out in enumerate(outputs):
            if out is old:
                y.name, old.name = old.name, f"{old.name}_base"
                y.shape, y.type = old.shape, old.type
                outputs[i] = y

    def rebase(self, site: Site, w: ir.Value) -> None:
        """The site reads w through Transposes of its own."""
        node, row = self._at(site)
        node.replace_input_with(row.weight, site.view.replay(self.emit(site, before=True), w))

    def covers(self, name: str, sites: Sequence[Site]) -> bool:
        """True when only these sites, and the Transposes before them, read the initialiser."""
        mine = {id(self._at(s)[0]) for s in sites}
        todo = [self.model.graph.initializers[name]]
        while todo:
            value = todo.pop()
            if value in self.model.graph.outputs:
                return False
            for user, _ in value.uses():
                if user.op_type == "Transpose":
                    todo.append(user.outputs[0])
                elif id(user) not in mine:
                    return False
        return True

    def repoint(self, sites: Sequence[Site], stored: str) -> None:
        """Sites read another initialiser through Transposes of their own."""
        for site in sites:
            self.rebase(site, self.model.graph.initializers[stored])

    def replace_parameter(self, name: str, sites: Sequence[Site], value: Array) -> str:
        """See lora_fx.graph.Graph. A constant of their own is `NAME_folded`."""
        if self.covers(name, sites):
            self.model.graph.initializers[name].const_value = ir.tensor(value, name=name)
            return name
        stored, i = f"{name}_folded", 0
        while stored in self.model.graph.initializers:
            i += 1
            stored = f"{name}_folded_{i}"
        _initialiser(self.model, stored, value)
        self.repoint(sites, stored)
        return stored

    def clone(self) -> OnnxGraph:
        """New nodes, same tensors."""
        return OnnxGraph(self.model.clone())

    def lint(self) -> None:
        """Every input is an initialiser, a graph input or made before its use."""
        seen = {id(v) for v in (*self.model.graph.inputs, *self.model.graph.initializers.values())}
        for node in self.model.graph:
            for v in node.inputs:
                if v is not None and id(v) not in seen:
                    raise LoraFxError(f"{node.op_type} reads {v.name!r} before it is made")
            seen |= {id(v) for v in node.outputs}


def _id(node: ir.Node) -> str:
    return str(node.outputs[0].name).removesuffix("_base")


def _initialiser(model: ir.Model, name: str, value: Array) -> ir.Value:
    tensor = ir.tensor(value, name=name)
    shape, kind = ir.Shape(value.shape), ir.TensorType(tensor.dtype)
    v = ir.Value(name=name, const_value=tensor, shape=shape, type=kind)
    model.graph.initializers[name] = v
    return v


class OnnxEmitter:
    """Inserts marked nodes in order at a site."""

    def __init__(self, owner: OnnxGraph, site: Site, node: ir.Node, *, before: bool) -> None:
        self.owner = owner
        self.site = site
        self.node = node
        self.before = before
        self.last = node

    def _call(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        new = ir.node(op, inputs, attributes)
        new.metadata_props[MARK] = self.site.id
        graph = self.owner.model.graph
        count = sum(1 for n in graph if MARK in n.metadata_props)
        new.outputs[0].name = f"{self.site.id}_lora_{count}"
        if self.before:
            graph.insert_before(self.node, new)
        else:
            graph.insert_after(self.last, new)
            self.last = new
        return new.outputs[0]

    def op(self, prim: str, *xs: Any, **attrs: Any) -> ir.Value:
        """The primitives that linear branches and weight forms need."""
        if prim == "matmul":
            return self._call("MatMul", *xs)
        if prim in ("add", "mul"):
            return self._call(prim.title(), *(self._value(x) for x in xs))
        if prim == "transpose":
            return self._call("Transpose", xs[0], perm=list(attrs["perm"]))
        if prim == "cast_like":
            return self._call("CastLike", *xs)
        raise LoraFxError(f"the ONNX emitter has no primitive {prim!r} yet")

    def _value(self, x: Any) -> ir.Value:
        if not isinstance(x, float):
            assert isinstance(x, ir.Value)
            return x
        name = f"{self.site.id}_lora_scale"
        known = self.owner.model.graph.initializers.get(name)
        if known is not None:
            return known
        v = _initialiser(self.owner.model, name, np.array(x, np.float32))
        v.metadata_props[MARK] = self.site.id
        return v

    def like(self, site: Site, x: ir.Value, w: ir.Value) -> ir.Value:
        """The site's own MatMul on other operands."""
        row = self.owner._at(site)[1]
        return self._call(self.node.op_type, *((x, w) if row.weight else (w, x)))

    def parameter(self, name: str, value: Array, role: Role) -> ir.Value:
        """A new initialiser, or the one of that name."""
        known = self.owner.model.graph.initializers.get(name)
        if known is not None:
            return known
        v = _initialiser(self.owner.model, name, value)
        v.metadata_props[MARK] = self.site.id
        return v
