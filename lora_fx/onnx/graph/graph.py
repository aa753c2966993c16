"""onnx_ir as a Graph: weights found by data flow, branches inserted as marked nodes.

The same find, insert and fold as on torch.fx run on it. Model functions are inlined first, since a
function serves all its calls with one body; bodies of If, Loop and Scan are rewritten in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, silenced
from lora_fx.files.quantised.onnx import nbits_zero_points
from lora_fx.ir.graph import Analysed, Deferred, Emitter, OtherReader, Parameter, Site
from lora_fx.ir.quantised import ZeroPoints
from lora_fx.onnx.graph.emitter import OnnxEmitter, add_initialiser, as_tensor
from lora_fx.onnx.graph.flow import OnnxFlow, OnnxWeightUse, follow
from lora_fx.onnx.graph.inlining import counted_names
from lora_fx.onnx.graph.marks import MARK, WAS, site_name
from lora_fx.onnx.graph.shape_inference import copy_shapes, in_floats, unknown_shapes
from lora_fx.onnx.graph.values import bodies_of, constant, operand
from lora_fx.text import free_name

OLDEST = 11
"""From this opset on, Slice and Pad take their sizes as operands, as the emitter writes them."""


UNKNOWN_SHAPES = "some shapes are unknown: FLOPs are too low"


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
            with counted_names():
                InlinePass()(model)
        if unknown_shapes(model):
            from onnx_ir.passes.common import ShapeInferencePass

            # where it cannot infer, it logs an error; the note says it to the user
            with silenced(levels={"onnx_ir": logging.CRITICAL}):
                ShapeInferencePass()(model)
                if (twin := in_floats(model)) is not None:
                    ShapeInferencePass()(twin)
                    copy_shapes(twin, model)
            if unknown_shapes(model):
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
        self._found |= {f.site.id: f for f in flow.uses}
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
        return [f.site for f in self.flow.uses]

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
        found = (f for f in self.flow.uses if not f.site.refusal or f.site.allowed)
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
