"""onnx_ir as a Graph: weights found by data flow, branches inserted as marked nodes.

The same find, insert and fold as on torch.fx run on it. Model functions are inlined first, since a
function serves all its calls with one body; bodies of If, Loop and Scan are rewritten in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.emitter import Parameter
from lora_fx.ir.graph import Deferred, Site
from lora_fx.onnx.emitter import OnnxEmitter, add_initialiser, as_tensor
from lora_fx.onnx.flow import MARK, WAS, Flow, Found, follow, shape_of, site_name
from lora_fx.onnx.ops import row_of

OLDEST = 11
"""Since this opset Slice and Pad take their sizes as operands, as the emitter writes them."""


class OnnxGraph:
    """A model; its stored tensors are the parameters.

    Args:
        model: Rewritten in place.

    Raises:
        LoraFxError: An opset before 11.
    """

    alone = True

    def __init__(self, model: ir.Model) -> None:
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
            InlinePass()(model)
        if _unknown(model):
            _infer_shapes(model)
            if _unknown(model):
                self.notes.append("some shapes are unknown: FLOPs are too low")
        self._flow: Flow | None = None
        self._names = 0

    # --- reading ---------------------------------------------------------------------------------

    @property
    def flow(self) -> Flow:
        """What a walk over the graph found; walked again after every change."""
        if self._flow is None:
            self._flow = follow(self.model)
        return self._flow

    def changed(self) -> None:
        """Forget what was found."""
        self._flow = None

    def fresh(self, stem: str) -> str:
        """A name that no value has."""
        self._names += 1
        return f"{stem}_{self._names}"

    def parameters(self) -> Sequence[Parameter]:
        """Floating tensors that no pass added, in file order."""
        return self.flow.parameters()

    def sites(self) -> Sequence[Site]:
        """Every use of a weight, in execution order."""
        return [f.site for f in self.flow.found]

    def data_flops(self) -> int:
        """FLOPs of products of activations; symbolic sizes count once."""
        return self.flow.data_flops

    def adapted(self) -> frozenset[str]:
        """Ids of sites whose branch stands in the graph."""
        marks = (n.metadata_props.get(MARK) for n in self.model.graph.all_nodes())
        return frozenset(m for m in marks if m)

    def read(self, name: str) -> Array:
        """A stored tensor's value."""
        return self.flow.stores[name].tensor.numpy()

    def reader(self, name: str) -> Callable[[], Array]:
        """A tensor in a data file is mapped anew each time, so that nothing keeps it in memory."""
        tensor = self.flow.stores[name].tensor
        if isinstance(tensor, ir.ExternalTensor) and tensor.size:
            shape = tuple(tensor.shape.numpy())
            dtype, start = tensor.dtype.numpy(), tensor.offset or 0
            return lambda: np.memmap(tensor.path, dtype, "r", start, shape)
        return tensor.numpy

    def at(self, site: Site) -> Found:
        """What was found at a site."""
        for found in self.flow.found:
            if found.site.id == site.id:
                return found
        raise LoraFxError(f"site {site.id!r} is not in this graph", "run find again")

    def activation(self, site: Site) -> ir.Value:
        """The other operand."""
        found = self.at(site)
        value = found.node.inputs[found.use.x]
        assert value is not None
        return value

    def weight(self, site: Site) -> ir.Value:
        """The stored tensor that the site reads."""
        return self.flow.stores[site.parameter].value

    def output(self, site: Site) -> ir.Value:
        """The node's result."""
        return self.at(site).node.outputs[0]

    # --- rewriting -------------------------------------------------------------------------------

    def emit(self, site: Site, *, before: bool = False) -> OnnxEmitter:
        """An emitter after the site's node, or before it."""
        return OnnxEmitter(self, self.at(site), before=before)

    def replace_output(self, site: Site, y: ir.Value) -> None:
        """Every user but the branch itself reads y; an output of a graph keeps its name."""
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
        """None: files serve and start from the weight form."""
        return None

    def rebase(self, site: Site, w: ir.Value) -> None:
        """The site reads w through a view of its own."""
        e = self.emit(site, before=True)
        e.viewing = w.producer() is not None  # W + ΔW: still a use of the weight
        operand = site.view.replay(e, w)
        self.at(site).node.replace_input_with(site.slot[0], operand)
        self.changed()

    def covers(self, name: str, sites: Sequence[Site]) -> bool:
        """True when only these sites, and the views before them, read the tensor."""
        mine = {(id(self.at(s).node), s.slot[0]) for s in sites}
        weights = self.flow.weights
        for value in [v for v, w in weights.items() if w.name == name]:
            if value.is_graph_output():
                return False
            for user, i in value.uses():
                viewed = i == 0 and any(
                    o in weights and weights[o].name == name for o in user.outputs
                )
                if not viewed and (id(user), i) not in mine:
                    return False
        return True

    def repoint(self, sites: Sequence[Site], stored: str) -> None:
        """Sites read another stored tensor through views of their own."""
        for site in sites:
            self.rebase(site, self.flow.stores[stored].value)

    def replace_parameter(self, name: str, sites: Sequence[Site], value: Array | Deferred) -> str:
        """See lora_fx.ir.graph.Graph. A constant of their own is `NAME_folded`."""
        if self.covers(name, sites):
            store = self.flow.stores[name]
            store.put(as_tensor(value, str(store.tensor.name)))
            self.changed()
            return name
        stored, i = f"{name}_folded", 0
        while stored in self.flow.stores:
            i += 1
            stored = f"{name}_folded_{i}"
        add_initialiser(self.model.graph, stored, value)
        self.changed()
        self.repoint(sites, stored)
        return stored

    def store(self, name: str, value: Array) -> None:
        """Another value [stored shape] for a tensor, in the dtype that it has."""
        store = self.flow.stores[name]
        dtype = store.tensor.dtype.numpy()
        store.put(ir.tensor(value.astype(dtype), name=store.tensor.name))
        self.changed()

    def clone(self) -> OnnxGraph:
        """New nodes, same tensors."""
        other = OnnxGraph(self.model.clone())
        other._names, other.notes = self._names, list(self.notes)
        return other

    def lint(self) -> None:
        """Every operand is an initialiser, an input, or made before its use."""
        _lint(self.model.graph, set())


def _unknown(model: ir.Model) -> bool:
    """True when an op of the table has an operand of unknown shape."""
    for node in model.graph.all_nodes():
        if row_of(node) is not None:
            for value in (*node.inputs, node.outputs[0]):
                if value is not None and shape_of(value) is None and value.const_value is None:
                    return True
    return False


def _infer_shapes(model: ir.Model) -> None:
    """Fill in what the file leaves out; the pass logs where it cannot."""
    from onnx_ir.passes.common import ShapeInferencePass

    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        ShapeInferencePass()(model)
    finally:
        logger.setLevel(level)


def _lint(graph: ir.Graph, outer: set[ir.Value]) -> None:
    seen = outer | {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        for v in node.inputs:
            if v is not None and v not in seen:
                raise LoraFxError(f"{node.op_type} {site_name(node)} reads {v.name!r} too early")
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _lint(attribute.as_graph(), seen)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    _lint(body, seen)
        seen.update(node.outputs)
