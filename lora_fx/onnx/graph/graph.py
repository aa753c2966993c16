"""OnnxGraph, the Graph over onnx_ir: weights by data flow, branches as marked nodes.

The same find, insert and fold as on torch.fx run on it. Model functions are inlined first, since a
function serves all its calls with one body; bodies of If, Loop and Scan are rewritten in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.onnx import nbits_zero_points
from lora_fx.ir.graph import Analysed, Deferred, Emitter, OtherReader, Parameter, Site
from lora_fx.ir.quantised import ZeroPoints
from lora_fx.onnx.graph.emitter import OnnxEmitter, add_initialiser, as_tensor
from lora_fx.onnx.graph.flow import OnnxFlow, OnnxWeightUse, follow
from lora_fx.onnx.graph.inlining import inline_functions
from lora_fx.onnx.graph.marks import MARK, WAS, site_name
from lora_fx.onnx.graph.shape_inference import infer_shapes
from lora_fx.onnx.graph.values import bodies_of, constant, operand, values_of
from lora_fx.text import free_name

OLDEST = 11
"""The oldest supported opset: from it on, Slice and Pad take their sizes as operands."""


UNKNOWN_SHAPES = "some shapes are unknown, so the FLOPs are too low"


class OnnxGraph(Analysed):
    """A Graph over an onnx_ir model, whose stored tensors are the parameters.

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
                f"the model has opset {opset}; expected {OLDEST} or later",
                "rewrite it with onnx.version_converter.convert_version(model, 18)",
            )
        if model.functions:
            self.notes.append(f"{len(model.functions)} model functions were inlined")
            inline_functions(model)
        if not infer_shapes(model):
            self.notes.append(UNKNOWN_SHAPES)
        self._name_count = 0
        self._names_in_file = {value.name for value in values_of(model)}
        # These two hold through every edit of the graph.
        self._uses: dict[str, OnnxWeightUse] = {}
        self._stores: dict[str, ir.Value] = {}

    # --- reading ---------------------------------------------------------------------------------

    @property
    def flow(self) -> OnnxFlow:
        """The data flow of the graph, computed again after every change."""
        return self.kept("flow", self._follow)

    def _follow(self) -> OnnxFlow:
        flow = follow(self.model)
        self._uses |= {use.site.id: use for use in flow.uses}
        self._stores |= flow.stores
        return flow

    def fresh(self, stem: str) -> str:
        """Return a name that no value has."""
        self._name_count += 1
        name = f"{stem}_{self._name_count}"
        if name in self._names_in_file:  # a file with branches has some
            return self.fresh(stem)
        return name

    def parameters(self) -> Sequence[Parameter]:
        """Return the float tensors that no pass added, in file order."""
        return self.flow.parameters()

    def sites(self) -> Sequence[Site]:
        """Return every use of a weight, in execution order."""
        return [use.site for use in self.flow.uses]

    def gathered_flops(self) -> dict[str, int]:
        """See `Graph.gathered_flops`; a symbolic size counts as 1."""
        return self.flow.gathered_flops

    def data_flops(self) -> int:
        """Return the FLOPs of products of activations; a symbolic size counts as 1."""
        return self.flow.data_flops

    def adapted(self) -> frozenset[str]:
        """Return the ids of sites whose branch is in the graph."""
        marks = (node.metadata_props.get(MARK) for node in self.model.graph.all_nodes())
        return frozenset(mark for mark in marks if mark)

    def read(self, name: str) -> Array:
        """Return the value of a stored tensor."""
        return self.flow.tensor(name).numpy()

    def reader(self, name: str) -> Callable[[], Array]:
        """Return a function that reads the value.

        The function maps a tensor of a data file again at each call, so that no memory is kept.
        """
        tensor = self.flow.tensor(name)
        if isinstance(tensor, ir.ExternalTensor) and tensor.size:
            shape = tuple(tensor.shape.numpy())
            dtype = tensor.dtype.numpy()
            start = tensor.offset or 0
            return lambda: np.memmap(tensor.path, dtype, "r", start, shape)
        return tensor.numpy

    def at(self, site: Site) -> OnnxWeightUse:
        """Return the use of a weight at a site.

        Raises:
            LoraFxError: The site is not in this graph, or its node was removed.
        """
        if site.id not in self._uses:
            self.flow  # noqa: B018  # walks the graph, where nobody has yet
        use = self._uses.get(site.id)
        if use is None or use.node.graph is None:
            raise LoraFxError(f"site {site.id!r} is not in this graph", "run find again")
        return use

    def activation(self, site: Site) -> ir.Value:
        """Return the site's operand that is not the weight."""
        return self.at(site).x

    kept_activation = activation

    def weight(self, site: Site) -> ir.Value:
        """Return the stored tensor that the site reads."""
        if site.parameter not in self._stores:
            self.flow  # noqa: B018
        return self._stores[site.parameter]

    def output(self, site: Site) -> ir.Value:
        """Return the product of the site."""
        return self.at(site).y

    # --- rewriting -------------------------------------------------------------------------------

    def emit(self, site: Site, *, before: bool = False) -> OnnxEmitter:
        """Return an emitter after the site's node, or before it."""
        use = self.at(site)
        node = use.node if before else use.y.producer()
        assert node is not None
        return OnnxEmitter(self, node, site.id, use, before=before)

    def emit_first(self, mark: str) -> OnnxEmitter:
        """Return an emitter before all nodes, for values that are computed from initialisers."""
        return OnnxEmitter(self, self.model.graph[0], mark, before=True)

    def replace_output(self, site: Site, y: ir.Value) -> None:
        """Let every user except the branch read y; an output of a graph keeps its name.

        The name is part of the file's interface, so it goes to y, and the old value gets another.
        """
        replaced = self.output(site)
        y.shape = replaced.shape
        y.type = replaced.type
        for user, slot in list(replaced.uses()):
            if user.metadata_props.get(MARK) != site.id:
                user.replace_input_with(slot, y)

        graph = self.at(site).node.graph
        assert isinstance(graph, ir.Graph)  # functions were inlined
        for i, graph_output in enumerate(graph.outputs):
            if graph_output is replaced:
                name = replaced.name
                replaced.metadata_props[WAS] = str(name)
                replaced.name = self.fresh(f"{name}_base")
                y.name = name
                graph.outputs[i] = y
        self.changed()

    def product(self, site: Site, e: Emitter[ir.Value]) -> ir.Value | None:
        """Return the result without its bias, which is subtracted so that no product runs twice.

        None where the op does more than to add it, or adds it in units of codes.
        """
        use = self.at(site)
        node = use.node
        if use.y is not node.outputs[0]:
            return None
        bias = None
        if use.row.bias is not None:
            if node.domain and node.op_type != "MatMulNBits":
                return None  # an activation, or attention
            bias = operand(node, use.row.bias)
        if bias is None:
            return use.y
        if node.op_type == "Gemm" and node.attributes.get_float("beta", 1.0) != 1.0:
            return None
        if node.op_type == "Conv":
            ones = (1,) * len(site.operand[2:])
            bias = e.op("reshape", bias, shape=(-1, *ones))
        return e.op("add", use.y, e.op("mul", bias, -1.0))

    def rebase(self, site: Site, w: ir.Value) -> None:
        """Let the site read w through its own view.

        Raises:
            LoraFxError: The site reads codes.
        """
        if site.no_fold:
            raise LoraFxError(
                f"{site.parameter!r}: {site.no_fold}: this update cannot be a branch there, only "
                "W + ΔW",
                "use plain LoRA with --mode switch or batch",
            )
        emitter = self.emit(site, before=True)
        emitter.viewing = w.producer() is not None  # W + ΔW: still a use of the weight
        ids = None
        if site.view.picked is not None:
            ids = self.picked(site, emitter)
        operand = site.view.replay(emitter, w, ids)
        self.at(site).node.replace_input_with(site.slot[0], operand)
        self.changed()

    def picked(self, site: Site, e: Emitter[ir.Value]) -> ir.Value:
        """Return the indices of the last Gather between the weight and the site, as a list."""
        value = self.at(site).node.inputs[site.slot[0]]
        while value is not None:
            node = value.producer()
            if node is None:
                break
            if node.op_type in ("Gather", "GatherND") and constant(node.inputs[1]) is None:
                ids = e.op("reshape", node.inputs[1], shape=(-1,))
                ids.shape = ir.Shape([None])  # by which the walk knows a list of them
                return ids
            value = node.inputs[0]
        raise AssertionError(f"no input data selects the rows that {site.id} reads")

    def covers(self, name: str, sites: Sequence[Site]) -> bool:
        """Whether only these sites, and the views before them, read the tensor."""
        slots = {(id(self.at(site).node), site.slot[0]) for site in sites}
        for value, weight in self.flow.weights.items():
            if weight.name == name and self._readers_beside(value, slots):
                return False
        return True

    def _readers_beside(
        self, value: ir.Value, slots_of_sites: Collection[tuple[int, int]]
    ) -> list[str]:
        """Return the readers of a weight in other slots than these that are not views of it.

        Args:
            value: The weight.
            slots_of_sites: The id of a site's node, and the slot of its weight.
        """
        weights = self.flow.weights
        name = weights[value].name
        readers = []
        if value.is_graph_output():
            readers.append("the output")
        for user, slot in value.uses():
            if (id(user), slot) in slots_of_sites:
                continue
            is_view = any(out in weights and weights[out].name == name for out in user.outputs)
            if not is_view:
                readers.append(user.op_type)
        return readers

    def other_readers(self) -> Sequence[OtherReader]:
        """Return the readers of a stored tensor other than its sites."""
        slots = set()
        for use in self.flow.uses:
            if not use.site.refusal or use.site.allowed:
                slots.add((id(use.node), use.use.weight))
        readers = []
        for value, weight in self.flow.weights.items():
            for op in self._readers_beside(value, slots):
                if op not in ("Shape", "Size"):
                    readers.append(OtherReader(weight.name, op, weight.view))
        return readers

    def repoint(self, sites: Sequence[Site], stored: str) -> None:
        """Let sites read another stored tensor through their own views."""
        for site in sites:
            self.rebase(site, self.flow.stores[stored])

    def replace_parameter(self, name: str, sites: Sequence[Site], value: Array | Deferred) -> str:
        """Let sites read a value, stored in the tensor or, if others read that, in a new one."""
        if self.covers(name, sites):
            tensor = as_tensor(value, str(self.flow.tensor(name).name))
            self.flow.put(name, tensor)  # the flow stays what it is: nothing to drop
            return name
        stored = free_name(f"{name}_folded", self.flow.stores, "_")
        add_initialiser(self.model.graph, stored, value)
        self.changed()
        self.repoint(sites, stored)
        return stored

    def zero_points(self, site: Site) -> ZeroPoints | None:
        """Return the zero points of a MatMulNBits.

        None for other operators, and where they may not be floats.
        """
        node = self.at(site).node
        number = node.attributes.get_int
        bits = number("bits", 4)
        scales = constant(operand(node, 2))
        stored_zero_points = operand(node, 3)
        zero_points = constant(stored_zero_points)
        if node.op_type != "MatMulNBits" or bits not in (2, 4) or scales is None:
            return None
        if number("weight_prepacked", 0) or operand(node, 4) is not None:
            return None
        if stored_zero_points is not None and zero_points is None:
            return None
        n, k = site.operand
        block_size = number("block_size", 0)
        return nbits_zero_points(site.parameter, scales, zero_points, (n, k), bits, block_size)

    def put_zeros(self, sites: Sequence[Site], zero: Array) -> str:
        """Let sites of one weight use other zero points for their codes; return the new name.

        Zero points that no other node reads are removed, and these take their name.
        """
        nodes = [self.at(site).node for site in sites]
        replaced = {value for node in nodes if (value := operand(node, 3)) is not None}
        name = free_name(f"{sites[0].parameter}_zero", self.flow.stores, "_")
        for node in nodes:
            node.resize_inputs(max(4, len(node.inputs)))
            node.replace_input_with(3, None)
        for value in replaced:
            if not value.uses():
                name = str(value.name)
                _remove_stored(value)
        zero_points = add_initialiser(self.model.graph, name, zero)
        for node in nodes:
            node.replace_input_with(3, zero_points)
        self.changed()
        return name

    def store(self, name: str, value: Array) -> None:
        """Store another value [stored shape] in a tensor, in the tensor's dtype."""
        tensor = self.flow.tensor(name)
        self.flow.put(name, ir.tensor(value.astype(tensor.dtype.numpy()), name=tensor.name))

    def clone(self) -> OnnxGraph:
        """Return the same graph with new nodes; tensors are shared."""
        copy = OnnxGraph(self.model.clone())
        copy._name_count = self._name_count
        copy.notes = list(self.notes)
        copy.share(self._named)
        return copy

    def lint(self) -> None:
        """Raise unless every operand is an initialiser, an input, or made before its use."""
        _lint(self.model.graph, set())


def _remove_stored(value: ir.Value) -> None:
    """Remove an initialiser or a Constant from its graph."""
    producer = value.producer()
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    if producer is None:
        del graph.initializers[str(value.name)]
    else:
        graph.remove(producer, safe=True)


def _lint(graph: ir.Graph, outer_values: set[ir.Value]) -> None:
    """Raise if a node reads a value that no enclosing graph has, or that is made after it."""
    values = outer_values | {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in values:
                raise LoraFxError(
                    f"{node.op_type} {site_name(node)} reads {value.name!r} before it is computed",
                    "sort the nodes of the file; onnx.checker names the first that is out of order",
                )
        for body in bodies_of(node):
            _lint(body, values)
        values.update(node.outputs)


# Our passes in onnx_ir's own pass manager.


class ManagedOnnxPass(ir.passes.InPlacePass):
    """A pass of lora-fx on an onnx_ir model.

    Args:
        rewrite: Insert, Fold or any other pass of lora_fx.passes.
    """

    def __init__(self, rewrite: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rewrite = rewrite

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        result = self.rewrite(OnnxGraph(model))
        return ir.passes.PassResult(model, result.modified)
