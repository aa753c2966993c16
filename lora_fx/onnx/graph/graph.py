"""onnx_ir as a Graph: weights found by data flow, branches inserted as marked nodes.

The same find, insert and fold as on torch.fx run on it. Model functions are inlined first, since a
function serves all its calls with one body; bodies of If, Loop and Scan are rewritten in place.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError, MistakeError, silenced
from lora_fx.files.quantised.onnx import nbits_zero_points
from lora_fx.ir.graph import Analysed, Deferred, Emitter, OtherReader, Parameter, Role, Site
from lora_fx.ir.kinds import Embedding
from lora_fx.ir.quantised import ZeroPoints
from lora_fx.onnx.graph.flow import (
    MARK,
    VIEW,
    WAS,
    OnnxFlow,
    OnnxWeightUse,
    bodies_of,
    constant,
    dtype_name,
    follow,
    operand,
    shape_of,
    site_name,
)
from lora_fx.onnx.graph.ops import row_of
from lora_fx.text import by_key, free_name

OLDEST = 11
"""From this opset on, Slice and Pad take their sizes as operands, as the emitter writes them."""


UNKNOWN_SHAPES = "some shapes are unknown: FLOPs are too low"


@contextlib.contextmanager
def _counted_names() -> Iterator[None]:
    """A block in which onnx_ir's inliner remembers how far it has counted the copies of a name.

    Unasked it tries NAME_2, NAME_3 … anew for each copy: 4,096 of one name take 12 s. The names
    that come of it are the same, since none is given back.
    """
    from onnx_ir.passes.common import inliner

    last: dict[tuple[str, int], int] = {}

    def unique(name: str, callstack: list[str], used_names: set[str]) -> str:
        count, candidate = last.get((name, id(used_names)), 1), name
        while candidate in used_names:
            count += 1
            candidate = f"{name}_{count}"
        last[name, id(used_names)] = count
        used_names.add(candidate)
        return candidate

    before = inliner._make_unique_name
    try:
        inliner._make_unique_name = unique
        yield
    finally:
        inliner._make_unique_name = before


class OnnxGraph(Analysed):
    """A model of onnx_ir, whose stored tensors are the parameters.

    Args:
        model: The model, which passes rewrite in place.

    Raises:
        LoraFxError: The model has an opset before 11.
    """

    alone = True

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self.model = model
        self.notes: list[str] = []
        opset = model.opset_imports.get("", OLDEST)
        if opset < OLDEST:
            raise LoraFxError(
                f"the model is of opset {opset}; expected {OLDEST} or later",
                "onnx.version_converter.convert_version(model, 18) rewrites it",
            )
        if model.functions:
            from onnx_ir.passes.common import InlinePass

            self.notes.append(f"{len(model.functions)} model functions were inlined")
            with _counted_names():
                InlinePass()(model)
        if _unknown(model):
            from onnx_ir.passes.common import ShapeInferencePass

            # where it cannot infer, it logs an error; the note says it to the user
            with silenced(levels={"onnx_ir": logging.CRITICAL}):
                ShapeInferencePass()(model)
                if (twin := _in_floats(model)) is not None:
                    ShapeInferencePass()(twin)
                    _copy_shapes(twin, model)
            if _unknown(model):
                self.notes.append(UNKNOWN_SHAPES)
        self._names = 0
        self._taken = {v.name for node in model.graph.all_nodes() for v in node.outputs}
        self._found: dict[str, OnnxWeightUse] = {}  # these two hold through every edit
        self._stores: dict[str, ir.Value] = {}

    # --- reading ---------------------------------------------------------------------------------

    @property
    def flow(self) -> OnnxFlow:
        """What a walk over the graph found; walked again after every change."""
        return self.kept("flow", self._follow)

    def _follow(self) -> OnnxFlow:
        flow = follow(self.model)
        self._found |= {f.site.id: f for f in flow.found}
        self._stores |= flow.stores
        return flow

    def fresh(self, stem: str) -> str:
        """A name that no value has."""
        self._names += 1
        name = f"{stem}_{self._names}"
        return self.fresh(stem) if name in self._taken else name  # a file with branches has some

    def parameters(self) -> Sequence[Parameter]:
        """Floating tensors that no pass added, in file order."""
        return self.flow.parameters()

    def sites(self) -> Sequence[Site]:
        """Every use of a weight, in execution order."""
        return [f.site for f in self.flow.found]

    def gathered_flops(self) -> dict[str, int]:
        """See Graph; a symbolic size counts once."""
        return self.flow.gathered_flops

    def data_flops(self) -> int:
        """FLOPs of the products of activations; a symbolic size counts once."""
        return self.flow.data_flops

    def adapted(self) -> frozenset[str]:
        """The ids of sites whose branch stands in the graph."""
        marks = (n.metadata_props.get(MARK) for n in self.model.graph.all_nodes())
        return frozenset(m for m in marks if m)

    def read(self, name: str) -> Array:
        """The value of a stored tensor."""
        return self.flow.tensor(name).numpy()

    def reader(self, name: str) -> Callable[[], Array]:
        """A function that reads the value.

        It maps a tensor of a data file anew each time, so that nothing keeps it in memory.
        """
        tensor = self.flow.tensor(name)
        if isinstance(tensor, ir.ExternalTensor) and tensor.size:
            shape = tuple(tensor.shape.numpy())
            dtype, start = tensor.dtype.numpy(), tensor.offset or 0
            return lambda: np.memmap(tensor.path, dtype, "r", start, shape)
        return tensor.numpy

    def at(self, site: Site) -> OnnxWeightUse:
        """What the walk found at a site."""
        if site.id not in self._found:
            self.flow  # noqa: B018  # walks the graph, where nobody has yet
        found = self._found.get(site.id)
        if found is not None and found.node.graph is not None:
            return found
        raise LoraFxError(f"site {site.id!r} is not in this graph", "run find again")

    def activation(self, site: Site) -> ir.Value:
        """The operand of the site that is no weight."""
        return self.at(site).x

    kept_activation = activation

    def weight(self, site: Site) -> ir.Value:
        """The stored tensor that the site reads."""
        if site.parameter not in self._stores:
            self.flow  # noqa: B018
        return self._stores[site.parameter]

    def output(self, site: Site) -> ir.Value:
        """The product of the site."""
        return self.at(site).y

    # --- rewriting -------------------------------------------------------------------------------

    def emit(self, site: Site, *, before: bool = False) -> OnnxEmitter:
        """An emitter after the site's node, or before it."""
        found = self.at(site)
        node = found.node if before else found.y.producer()
        assert node is not None
        return OnnxEmitter(self, node, site.id, found, before=before)

    def emit_first(self, mark: str) -> OnnxEmitter:
        """An emitter before all nodes, for what is computed of initialisers."""
        return OnnxEmitter(self, self.model.graph[0], mark, before=True)

    def replace_output(self, site: Site, y: ir.Value) -> None:
        """Let every user but the branch itself read y; an output of a graph keeps its name.

        The name is part of the file's interface, so it goes to y, and the old value gets another.
        """
        old = self.output(site)
        y.shape, y.type = old.shape, old.type
        for user, i in list(old.uses()):
            if user.metadata_props.get(MARK) != site.id:
                user.replace_input_with(i, y)
        graph = self.at(site).node.graph
        assert isinstance(graph, ir.Graph)  # functions were inlined
        for i, out in enumerate(graph.outputs):
            if out is old:
                old.metadata_props[WAS] = str(old.name)
                y.name, old.name = old.name, self.fresh(f"{old.name}_base")
                graph.outputs[i] = y
        self.changed()

    def product(self, site: Site, e: object) -> ir.Value | None:
        """None: no output form needs it in a file, where DoRA takes the weight form."""
        return None

    def rebase(self, site: Site, w: ir.Value) -> None:
        """Let the site read w through a view of its own.

        Raises:
            LoraFxError: The site reads codes.
        """
        if site.no_fold:
            raise LoraFxError(
                f"{site.parameter!r}: {site.no_fold}: this update has no branch there, only W + ΔW",
                "plain LoRA has one: --mode switch or batch",
            )
        e = self.emit(site, before=True)
        e.viewing = w.producer() is not None  # W + ΔW: still a use of the weight
        ids = None if site.view.picked is None else self.picked(site, e)
        operand = site.view.replay(e, w, ids)
        self.at(site).node.replace_input_with(site.slot[0], operand)
        self.changed()

    def picked(self, site: Site, e: Emitter[ir.Value]) -> ir.Value:
        """What the last Gather on the weight's way takes, as a list."""
        value = self.at(site).node.inputs[site.slot[0]]
        while value is not None and (node := value.producer()) is not None:
            if node.op_type in ("Gather", "GatherND") and constant(node.inputs[1]) is None:
                ids = e.op("reshape", node.inputs[1], shape=(-1,))
                ids.shape = ir.Shape([None])  # by which the walk knows a list of them
                return ids
            value = node.inputs[0]
        raise AssertionError(f"no data picks what {site.id} reads")

    def covers(self, name: str, sites: Sequence[Site]) -> bool:
        """True when only these sites, and the views before them, read the tensor."""
        mine = {(id(self.at(s).node), s.slot[0]) for s in sites}
        weights = self.flow.weights.items()
        return not any(w.name == name and self._beside(v, mine) for v, w in weights)

    def _beside(self, value: ir.Value, mine: Collection[tuple[int, int]]) -> list[str]:
        """What reads a weight at other places than these, and is no view of it."""
        weights, name = self.flow.weights, self.flow.weights[value].name
        others = ["the output"] if value.is_graph_output() else []
        for user, i in value.uses():
            viewed = any(o in weights and weights[o].name == name for o in user.outputs)
            if not viewed and (id(user), i) not in mine:
                others.append(user.op_type)
        return others

    def other_readers(self) -> Sequence[OtherReader]:
        """What reads a stored tensor beside its sites."""
        found = (f for f in self.flow.found if not f.site.refusal or f.site.allowed)
        mine = {(id(f.node), f.use.weight) for f in found}
        return [
            OtherReader(w.name, op, w.view)
            for v, w in self.flow.weights.items()
            for op in self._beside(v, mine)
            if op not in ("Shape", "Size")
        ]

    def repoint(self, sites: Sequence[Site], stored: str) -> None:
        """Let sites read another stored tensor through views of their own."""
        for site in sites:
            self.rebase(site, self.flow.stores[stored])

    def replace_parameter(self, name: str, sites: Sequence[Site], value: Array | Deferred) -> str:
        """Let sites read a value; a constant of their own is called `NAME_folded[_1]`."""
        if self.covers(name, sites):
            # no other flow: nothing to drop
            self.flow.put(name, as_tensor(value, str(self.flow.tensor(name).name)))
            return name
        stored = free_name(f"{name}_folded", self.flow.stores, "_")
        add_initialiser(self.model.graph, stored, value)
        self.changed()
        self.repoint(sites, stored)
        return stored

    def zero_points(self, site: Site) -> ZeroPoints | None:
        """Those of a MatMulNBits; None for other operators, and where they may not be floats."""
        node = self.at(site).node
        number, given = node.attributes.get_int, operand(node, 3)
        bits, scales, zero = number("bits", 4), constant(operand(node, 2)), constant(given)
        odd = number("weight_prepacked", 0) or operand(node, 4) or (given and zero is None)
        if node.op_type != "MatMulNBits" or bits not in (2, 4) or odd or scales is None:
            return None
        (n, k), block = site.operand, number("block_size", 0)
        return nbits_zero_points(site.parameter, scales, zero, (n, k), bits, block)

    def put_zeros(self, sites: Sequence[Site], zero: Array) -> str:
        """Let sites of one weight read their codes by other zero points; returns their name.

        What no other node reads gives its place and its name.
        """
        nodes, name = [self.at(s).node for s in sites], f"{sites[0].parameter}_zero"
        old = {v for n in nodes if (v := operand(n, 3)) is not None}
        name = free_name(name, self.flow.stores, "_")
        for node in nodes:
            node.resize_inputs(max(4, len(node.inputs)))
            node.replace_input_with(3, None)
        for value in (v for v in old if not v.uses()):
            name, maker, graph = str(value.name), value.producer(), value.graph
            assert isinstance(graph, ir.Graph)
            if maker is None:
                del graph.initializers[name]
            else:
                graph.remove(maker, safe=True)
        made = add_initialiser(self.model.graph, name, zero)
        for node in nodes:
            node.replace_input_with(3, made)
        self.changed()
        return name

    def store(self, name: str, value: Array) -> None:
        """Store another value [stored shape] in a tensor, in the dtype that it has."""
        was = self.flow.tensor(name)
        self.flow.put(name, ir.tensor(value.astype(was.dtype.numpy()), name=was.name))

    def clone(self) -> OnnxGraph:
        """The same graph in new nodes; tensors are shared."""
        other = OnnxGraph(self.model.clone())
        other._names, other.notes = self._names, list(self.notes)
        other.share(self._named)
        return other

    def lint(self) -> None:
        """Raise unless every operand is an initialiser, an input, or made before its use."""
        _lint(self.model.graph, set())


def _unknown(model: ir.Model) -> bool:
    """True when an op of the table has an operand of unknown shape."""
    nodes = (n for n in model.graph.all_nodes() if row_of(n) is not None)
    values = (v for n in nodes for v in (*n.inputs, n.outputs[0]) if v is not None)
    return any(shape_of(v) is None and v.const_value is None for v in values)


def _in_floats(model: ir.Model) -> ir.Model | None:
    """The model with floats in the place of codes that ONNX's inference knows nothing of.

    None where there are none.
    """
    whole = model.clone()
    known = [(n, r) for n in whole.graph.all_nodes() if n.domain and (r := row_of(n)) and r.twin]
    for i, (node, row) in enumerate(known):
        use = next(row.uses(node, [shape_of(v) for v in node.inputs].__getitem__), None)
        scale, graph = node.inputs[2], node.graph
        if use is None or scale is None or graph is None:
            continue
        w = use.stored or shape_of(node.inputs[use.weight]) or ()
        w = w[::-1] if use.stored and row.twin == "MatMul" else w
        kind = ir.TensorType(scale.dtype or ir.DataType.FLOAT)
        floats = ir.Value(name=f"{i}_in_floats", shape=ir.Shape(w), type=kind)
        whole.graph.inputs.append(floats)
        x = node.inputs[use.x]
        new = [ir.node("Cast", [x], {"to": int(kind.dtype)})] if row.twin == "MatMul" else []
        operands = {use.x: new[0].outputs[0] if new else x, use.weight: floats}
        new.append(ir.node(row.twin, [operands[0], operands[1]]))
        made = new[-1].outputs
        made[0].name = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs[:1], made)
    return whole if known else None


def _copy_shapes(source: ir.Model, model: ir.Model) -> None:
    """Give values the shape and dtype that another model has for their names."""
    known = {v.name: v for n in source.graph.all_nodes() for v in n.outputs}
    for value in (v for n in model.graph.all_nodes() for v in n.outputs):
        other = known.get(value.name)
        if value.shape is None and other is not None and other.shape is not None:
            value.shape, value.type = other.shape, value.type or other.type


def _lint(graph: ir.Graph, outer: set[ir.Value]) -> None:
    seen = outer | {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        for v in node.inputs:
            if v is not None and v not in seen:
                raise LoraFxError(
                    f"{node.op_type} {site_name(node)} reads {v.name!r} too early",
                    "onnx.checker says where the order of its nodes is wrong",
                )
        for body in bodies_of(node):
            _lint(body, seen)
        seen.update(node.outputs)


# onnx_ir as an Emitter: nodes at a site, each marked as part of its branch.


def as_tensor(value: Array | Deferred, name: str) -> ir.TensorProtocol:
    """The array as a tensor; a deferred one is computed each time that it is read."""
    if not isinstance(value, Deferred):
        return ir.tensor(value, name=name)
    dtype = ir.DataType.from_numpy(numpy_dtype(value.dtype))
    compute = value.compute
    return ir.LazyTensor(lambda: ir.tensor(compute()), dtype, ir.Shape(value.shape), name=name)


def add_initialiser(
    graph: ir.Graph, name: str, value: Array | Deferred, mark: str = ""
) -> ir.Value:
    """A new initialiser; `mark` is the site of the branch that it belongs to."""
    marked = {MARK: mark} if mark else None
    v = ir.val(name, const_value=as_tensor(value, name), metadata_props=marked)
    graph.initializers[name] = v
    return v


OF_CODES = {"bits", "block_size", "gather_axis", "quantize_axis"}
"""Attributes of a lookup of codes, which one of floats does not have."""
PLAIN = {"matmul": "MatMul", "div": "Div", "gather": "Gather", "einsum": "Einsum",
         "transpose": "Transpose"}  # fmt: skip
"""Primitives that are a node of the same operands and attributes."""


@dataclass(eq=False, repr=False)
class OnnxEmitter:
    """Inserts in order, after the site's node or before it, in the graph or body that holds it."""

    owner: OnnxGraph
    node: ir.Node
    mark: str
    found: OnnxWeightUse | None = None
    before: bool = field(kw_only=True)
    viewing: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """The first node stands beside the site's, each other one after the last."""
        self.last = self.node

    def call(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node of an ONNX op and give its first result."""
        return self._place(ir.node(op, inputs, attributes))

    def results(self, op: str, *inputs: ir.Value, count: int, **attributes: Any) -> list[ir.Value]:
        """Add a node of an ONNX op and give all its results."""
        made = ir.node(op, inputs, attributes, num_outputs=count)
        self._place(made)
        return list(made.outputs)

    def _place(self, new: ir.Node) -> ir.Value:
        new.metadata_props[MARK] = self.mark
        if self.viewing:
            new.metadata_props[VIEW] = "of the weight form"
        for value in new.outputs:
            value.name = self.owner.fresh(f"{self.mark}_lora")
        if self.before:
            self.node.prepend(new)
        else:
            self.last.append(new)
            self.last = new
        self.owner.changed()
        return new.outputs[0]

    def _ints(self, *values: int) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _constant(self, value: Array) -> ir.Value:
        name = self.owner.fresh(f"{self.mark}_lora_const")
        return add_initialiser(self.owner.model.graph, name, value, self.mark)

    def op(self, prim: str, *xs: Any, **attrs: Any) -> ir.Value:
        """Add the node of one primitive of the closed set; see lora_fx.ir.emitter.Ops."""
        made = self._op(prim, *xs, **attrs)
        # onnx_ir infers no types, and later casts ask for this one
        first = next((x for x in xs if isinstance(x, ir.Value)), None)
        if made.dtype is None and first is not None and first.dtype is not None:
            made.type = ir.TensorType(first.dtype)
        return made

    def _op(self, prim: str, *xs: Any, **attrs: Any) -> ir.Value:
        if prim in PLAIN:
            return self.call(PLAIN[prim], *xs, **attrs)
        if prim in ("add", "mul"):
            x, y = xs
            if isinstance(y, (int, float)):
                kind = numpy_dtype(dtype_name(x) or "float32")
                y = self._constant(np.array(y, np.float32).astype(kind))
            return self.call(prim.title(), x, y)
        if prim == "norm":
            if self.owner.model.opset_imports.get("", 0) < 18:
                return self.call("ReduceL2", xs[0], axes=[-1], keepdims=1)
            return self.call("ReduceL2", xs[0], self._ints(-1), keepdims=1)
        if prim in ("detach", "dropout"):  # a file has no gradients and is no training graph
            assert isinstance(xs[0], ir.Value)
            return xs[0]
        if prim == "repeat":
            shape = [int(n) for n in shape_of(xs[0]) or ()]
            one, wide = self._ints(*shape, 1), self._ints(*shape, attrs["times"])
            wide = self.call("Expand", self.call("Reshape", xs[0], one), wide)
            return self.call("Reshape", wide, self._ints(*shape[:-1], -1))
        if prim == "reshape":
            return self.call("Reshape", xs[0], self._ints(*attrs["shape"]))
        if prim == "slice":
            bounds = (self._ints(attrs[k]) for k in ("start", "stop", "axis"))
            return self.call("Slice", xs[0], *bounds)
        if prim == "pad":
            return self.call("Pad", xs[0], self._ints(*attrs["before"], *attrs["after"]))
        if prim == "conv":
            return self.call("Conv", *xs, group=attrs["groups"])
        if prim == "cast":
            return self._cast(xs[0], attrs["dtype"])
        if prim == "cast_like":
            wanted = dtype_name(xs[1])
            if wanted:
                return self._cast(xs[0], wanted)
            if self.owner.model.opset_imports.get("", 0) < 15:
                raise LoraFxError(
                    f"the dtype of {xs[1].name!r} is unknown, and opset 15 is needed to ask for it",
                    "onnx.shape_inference.infer_shapes(model) writes dtypes into the file",
                )
            return self.call("CastLike", *xs)
        raise MistakeError(f"the ONNX emitter has no primitive {prim!r}")

    def _cast(self, x: ir.Value, dtype: str) -> ir.Value:
        if dtype_name(x) == dtype:
            return x
        to = ir.DataType.from_numpy(numpy_dtype(dtype))
        made = self.call("Cast", x, to=int(to))
        made.type = ir.TensorType(to)
        return made

    def like(self, site: Site, x: ir.Value, w: ir.Value) -> ir.Value:
        """The site's own op on other operands, its attributes kept and its bias left out."""
        assert self.found is not None
        node, use, row = self.found.node, self.found.use, self.found.row
        inputs = list(node.inputs)
        inputs[use.x], inputs[use.weight] = x, w
        if row.bias is not None and row.bias < len(inputs):
            inputs = inputs[: row.bias]
        attributes = list(node.attributes.values())
        domain, op = node.domain, node.op_type
        if row.twin:
            domain, op, inputs = "", row.twin, inputs[:2]
            attributes = [a for a in attributes if a.name not in OF_CODES]
        made = self._place(ir.Node(domain, op, inputs, attributes))
        if w.dtype is not None:
            made.type = ir.TensorType(w.dtype)
        return made

    def parameter(self, name: str, value: Array, role: Role) -> ir.Value:
        """A new initialiser, or the one of that name; an input of the graph where `role` says so.

        An optional input has the value as its default.
        """
        graph = self.owner.model.graph
        known = graph.initializers.get(name)
        if known is not None:
            return known
        made = add_initialiser(graph, name, value, self.mark)
        if role is Role.OPTIONAL_INPUT:
            graph.inputs.append(made)
        return made


# Our passes in onnx_ir's own pass manager.


class ManagedOnnxPass(ir.passes.InPlacePass):
    """A pass of ours on an onnx_ir model.

    Args:
        rewrite: Insert, Fold or any other pass of lora_fx.passes.
    """

    def __init__(self, rewrite: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rewrite = rewrite

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        done = self.rewrite(OnnxGraph(model))
        return ir.passes.PassResult(model, done.modified)


# How far the integers of an input may go. A sample or a user's number above the rows of the table
# that it indexes would be refused by the runtime.


SAME_NUMBERS = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose",
                "Slice", "Expand", "Gather", "GatherND"}  # fmt: skip
"""Ops whose outputs are elements of their first input."""


def highest(graph: OnnxGraph) -> dict[str, int]:
    """For each input that indexes tables, the rows of the smallest of them."""
    lookups = (s for s in graph.sites() if isinstance(s.kind, Embedding))
    tables = by_key((_input(graph.activation(s), graph.model), s.operand[0]) for s in lookups)
    return {name: min(rows) for name, rows in tables.items() if name is not None}


def _input(value: ir.Value | None, model: ir.Model) -> str | None:
    while value is not None:
        node = value.producer()
        if node is None:
            return value.name if value in model.graph.inputs else None
        if node.op_type not in SAME_NUMBERS:
            return None
        value = node.inputs[0]
    return None
