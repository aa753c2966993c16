"""torch.fx as a Graph: weights are found by data flow, branches inserted as marked ATen nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MistakeError
from lora_fx.files.quantised.onnx import nbits_zero_points
from lora_fx.fx import codes, dequantise_nodes, dotted_names, quantised_parameters, tensors
from lora_fx.fx.dotted_names import all_tensors, named_tensors, owner, parameter_of
from lora_fx.fx.graph import ops
from lora_fx.fx.graph.computed_weights import evaluate
from lora_fx.fx.graph.flops import data_flops, gathered
from lora_fx.fx.graph.flow import FxFlow, weight_flow
from lora_fx.fx.graph.graph_text import graph_text
from lora_fx.fx.graph.in_place import Writes
from lora_fx.fx.graph.nodes import (
    MARK,
    argument,
    copy_into,
    dtype_name,
    is_marked,
    make_marked,
    mark,
    shape_of,
    value,
)
from lora_fx.fx.graph.ops import slots
from lora_fx.fx.graph.other_readers import other_readers
from lora_fx.fx.graph.sites import Bodies, FxUse, uses
from lora_fx.fx.graph.views import gather
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.ir.graph import Analysed, Deferred, OtherReader, Parameter, Role, Site
from lora_fx.ir.quantised import ZeroPoints
from lora_fx.text import free_name


class FxGraph(Analysed):
    """An export graph over a tree of modules that holds its tensors.

    Args:
        graph: Nodes; get_attr targets are dotted names under `root`.
        root: The module tree. Passes may register parameters on it.
        training: True for a train graph; insert adds dropout to such graphs only.
        bodies: What the higher-order ops of the graph call, by the name that it reads.
        constants: Tensors that the graph reads and that the tree does not hold, by that name.

    Attributes:
        held: What the tree's codes stand for, by first name, once `read_codes` has looked.
    """

    alone = False  # the programs of a module share its tensors

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        *,
        training: bool = False,
        bodies: Bodies | None = None,
        constants: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.bodies = dict(bodies or {})
        self.constants = dict(constants or {})
        self.root = root
        self.training = training
        self._names, self._aliases = named_tensors(root)
        self.held: dict[str, codes.Stored] = {}
        self._writes: Writes | None = None
        self._index: dict[str, fx.Node] = {}  # sites are nodes of the capture, which keep names

    def __str__(self) -> str:
        """Return the nodes as text, one a line."""
        return graph_text(self.graph)

    def refresh(self) -> None:
        """Read the tree's names again, after tensors were added to the tree."""
        self._names, self._aliases = named_tensors(self.root)

    def read_codes(self) -> bool:
        """Dequantise the tree's codes in the graph; return whether the graph changed."""
        self.held = quantised_parameters.forms(self.root)
        if not self.held or not dequantise_nodes.read_codes(self.graph, self._names, self.held):
            return False
        self.changed()
        return True

    # --- reading ---------------------------------------------------------------------------------

    def parameters(self) -> Sequence[Parameter]:
        """Return every parameter of the tree by its first name, without adapters' parameters.

        A computed weight follows the parameter that its computation starts from.
        """
        computed = self._computed_parameters()
        parameters = []
        for name, aliases in self._aliases.items():
            codes_of_it = self.held.get(name)
            if codes_of_it is None:
                tensor = parameter_of(self.root, name)
                parameter = Parameter(
                    name, tuple(tensor.shape), dtype_name(tensor.dtype), tuple(aliases)
                )
            else:
                parameter = Parameter(
                    name,
                    tuple(codes_of_it.shape),
                    dtype_name(codes_of_it.dtype),
                    tuple(aliases),
                    codes_of_it.format,
                    codes_of_it.bits,
                )
            parameters.append(parameter)
            parameters += computed.get(name, {}).values()
        return parameters

    def _computed_parameters(self) -> dict[str, dict[str, Parameter]]:
        """Return the computed weights by name, per parameter that their computation starts from."""
        computed: dict[str, dict[str, Parameter]] = {}
        for site, _, weight in self._uses():
            if weight.name:
                continue
            name = site.parameter
            captured = value(weight.root)
            alias, _, _ = name.rpartition("~")
            computed.setdefault(weight.behind[0], {}).setdefault(
                name,
                Parameter(
                    name,
                    tuple(captured.shape),
                    dtype_name(captured.dtype),
                    (alias,) if alias else (),
                ),
            )
        return computed

    def sites(self) -> Sequence[Site]:
        """Return every use of a weight, in execution order."""
        return [site for site, _, _ in self._uses()]

    def other_readers(self) -> Sequence[OtherReader]:
        """Return the readers of parameters that are not sites."""
        return other_readers(self.graph, self.flow(), self._uses(), self.bodies)

    def data_flops(self) -> int:
        """Count the FLOPs of matmuls without a weight and without rows gathered from a weight."""
        return sum(self._products().values()) - sum(self.gathered_flops().values())

    def gathered_flops(self) -> dict[str, int]:
        """Implement `Graph.gathered_flops`."""
        sources = gathered(self.graph, self.flow())
        flops: dict[str, int] = {}
        for node, count in self._products().items():
            names = [sources[operand] for operand in node.all_input_nodes if operand in sources]
            if names:
                flops[names[0]] = flops.get(names[0], 0) + count
        return flops

    def _products(self) -> dict[fx.Node, int]:
        """Return the FLOPs of each product that is not a site."""
        sites = {node for _, node, _ in self._uses()}
        products = {}
        for node in self.graph.nodes:
            if node in sites or is_marked(node):
                continue
            count = data_flops(node)
            if count:
                products[node] = count
        return products

    def adapted(self) -> frozenset[str]:
        """Return the ids of the sites with a branch, read from the marks of its nodes."""
        marked = filter(is_marked, self.graph.nodes)
        return frozenset(node.meta["custom"][MARK]["site"] for node in marked)

    def read(self, name: str) -> Array:
        """Return a stored parameter as an array; compute a computed weight."""
        if name not in self._aliases:
            for site, _, weight in self._uses():
                if site.parameter == name:
                    return to_numpy(evaluate(self.root, self.flow(), weight.root))
        return to_numpy(quantised_parameters.numbers(self.root, name))

    def reader(self, name: str) -> Callable[[], Array]:
        """Return a function that returns the present value, even if the storage changes later."""
        value = self.read(name)
        return lambda: value

    def flow(self) -> FxFlow:
        """Return the data flow of parameters and constants."""
        return self.kept("flow", lambda: weight_flow(self.graph, self.root, self._names))

    def _uses(self) -> Sequence[FxUse]:
        return self.kept("uses", lambda: tuple(uses(self.graph, self.flow(), self.bodies)))

    # --- rewriting -------------------------------------------------------------------------------

    def _at(self, site: Site) -> fx.Node:
        name = site.id.partition(":")[0]
        node = self._index.get(name)
        if node is None or node._erased:
            self._index = {candidate.name: candidate for candidate in self.graph.nodes}
            node = self._index.get(name)
        if node is None:
            raise LoraFxError(
                f"site {site.id!r} is not in this graph", "run find again after a rewrite"
            )
        return node

    def use(self, site: Site) -> ops.FxOperand:
        """Return the op table's operand entry for a site."""
        node = self._at(site)
        row = ops.row_of(node)
        assert row is not None
        return next(use for use in row.uses(node) if use.weight == site.slot)

    def activation(self, site: Site) -> fx.Node:
        """Return the current activation of a site, the operand that is not the weight."""
        return _node(ops.pick(self._at(site), self.use(site).x))

    def kept_activation(self, site: Site) -> fx.Node:
        """Return the activation, or a copy if a train graph later overwrites the activation.

        A frozen layer keeps no x for backward, so a model may; a branch keeps it for ∂L/∂a.
        """
        x = self.activation(site)
        if not self.training:
            return x
        node = self._at(site)
        if self._writes is None:  # insertion writes to nothing, so it holds for all sites
            self._writes = Writes(self.graph)
        if x not in self._writes.order or not self._writes.between(x, node):
            return x
        copy = make_marked(node, x, site.id, aten.clone.default, (x,))
        copy.meta["val"] = value(x)
        return copy

    def weight(self, site: Site) -> fx.Node:
        """Return the first node of the site's chain: a get_attr, or the weight's computation."""
        return self._chain(site)[0]

    def picked(self, site: Site, e: object) -> fx.Node:
        """Return the indices of the last gather between the weight and the site."""
        chain = self._chain(site)[1:]
        pick = next(node for node in chain if gather(node, shape_of(node.args[0]) or ()))
        ids = pick.args[-1]
        if isinstance(ids, (tuple, list)):
            return _node(ids[0])
        return _node(ids)

    def output(self, site: Site) -> fx.Node:
        """Return the result of the site's op; the first result if there are several."""
        node = self._at(site)
        row = ops.row_of(node)
        if row is None or not row.first:
            return node
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == 0:
                return user
        raise MistakeError(f"nothing reads the result of site {site.id!r}")

    def product(self, site: Site, e: Any) -> fx.Node | None:
        """Return the result without its bias, which is subtracted so that no product runs twice."""
        node = self._at(site)
        y = self.output(site)
        row = ops.row_of(node)
        assert row is not None
        if row.bias is None:
            return y
        bias = ops.pick(node, (row.bias,))
        if not isinstance(bias, fx.Node):
            return y
        if row.bias == 0 and float(argument(node, "beta", 1)) != 1.0:
            return None

        if row.op.startswith("conv"):
            ones = (1,) * len(site.operand[2:])
            bias = e.op("reshape", bias, shape=(-1, *ones))
        negative = e.op("cast_like", e.op("mul", bias, -1.0), y)
        return _node(e.op("add", negative, y))

    def emit(self, site: Site, *, before: bool = False) -> FxEmitter:
        """Return an emitter after the site's node (branch) or before it (weight form)."""
        self.changed()  # here once, and when the result is put in its place: not at every node
        return FxEmitter(self, site, self._at(site), before=before)

    def replace_output(self, site: Site, y: fx.Node) -> None:
        """Make every user of the site read y, except the nodes of the site's own branch.

        The branch's nodes read the old result; otherwise the sum would read itself.
        """
        node = self.output(site)
        y.meta["val"] = node.meta.get("val")  # later sites read shapes from their operands
        self.changed()
        node.replace_all_uses_with(y, delete_user_cb=lambda user: not is_marked(user, site.id))

    def rebase(self, site: Site, w: fx.Node) -> None:
        """Make the site read w through a marked copy of its chain."""
        w.meta["val"] = self.weight(site).meta.get("val")  # what follows it reads shape and dtype
        self._replay(site, w, marked=True)

    def _replay(self, site: Site, start: fx.Node, *, marked: bool = False) -> None:
        """Make the site read the result of a copy of its chain that begins with `start`."""
        node, chain = self.places(site)
        copies = {chain[0]: start}
        with self.graph.inserting_before(node):
            for step in chain[1:]:
                copy = self.graph.node_copy(step, lambda operand: copies.get(operand, operand))
                if marked:
                    mark(copy, site.id)
                copies[step] = copy
        w = copies[chain[-1]]
        w.meta["val"] = chain[-1].meta.get("val")
        node.args = replaced(node.args, site.slot, w)
        self.changed()

    def _chain(self, site: Site) -> list[fx.Node]:
        """Return the nodes from the weight to the site's operand, both included."""
        chain = [_node(ops.pick(self._at(site), site.slot))]
        while chain[0].op != "get_attr" and chain[0].name != site.root:
            chain.insert(0, _node(chain[0].args[0]))
        return chain

    def places(self, site: Site) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """Return the site's node, and the nodes from the weight to its operand."""
        return self._at(site), tuple(self._chain(site))

    def nodes_of(self, name: str) -> list[fx.Node]:
        """Return the nodes that read a parameter from the tree, under any of its names."""
        nodes = self.graph.find_nodes(op="get_attr")
        return [node for node in nodes if self._names.get(str(node.target)) == name]

    def covers(self, name: str, sites: Sequence[Site]) -> bool:
        """True if nothing but these sites reads a parameter in this graph."""
        site_slots = {(self._at(site), site.slot) for site in sites}
        chains: set[fx.Node] = set()
        for site in sites:
            chains.update(self._chain(site))
        for node in chains.union(self.nodes_of(name)):
            for user in node.users:
                if user in chains:
                    continue
                # a node may read the weight in another slot than the site's, as its bias
                if any((user, path) not in site_slots for path in slots(user, node)):
                    return False
        return True

    def replace_parameter(self, name: str, sites: Sequence[Site], value: Array | Deferred) -> str:
        """Make sites read a new value; return its name, `NAME_folded[_1]` for a separate constant.

        A parameter whose every use is among the sites is replaced under all its names.
        """
        array = value.compute() if isinstance(value, Deferred) else value
        is_computed = name not in self._aliases
        if is_computed:
            before = parameter_of(self.root, sites[0].behind[0])
            # a computed weight may have another dtype than what it is computed from
            tensor = from_numpy(array).to(before.device)
        else:
            before = parameter_of(self.root, name)
            tensor = from_numpy(array, before)
        constant = nn.Parameter(tensor, requires_grad=False)
        if not is_computed and self.covers(name, sites):
            dotted_names.replace_parameter(self.root, before, constant)
            return name

        stored_name = name.removesuffix("~")
        module, leaf = owner(self.root, stored_name)
        folded_leaf = free_name(f"{leaf}_folded", module._parameters, "_")
        module.register_parameter(folded_leaf, constant)
        folded_name = stored_name.removesuffix(leaf) + folded_leaf
        self.refresh()
        self.repoint(sites, folded_name)
        return folded_name

    def zero_points(self, site: Site) -> ZeroPoints | None:
        """Return zero points that may be floats in ONNX Runtime, for codes [out, in]; else None."""
        name = site.parameter
        if name not in self._aliases:
            return None
        stored = quantised_parameters.stored_of(self.root, name)
        if stored is None or stored.turned or stored.format not in ("int2", "int4"):
            return None
        if len(stored.shape) != 2:
            return None
        has_zero = stored.parts[1:] == ("zero",)
        if not has_zero and (
            stored.parts[1:] or quantised_parameters.occupied_name(self.root, name, ("zero",))
        ):
            return None

        _, scale, *zeros = map(to_numpy, quantised_parameters.tensors_of(self.root, name))
        zero = zeros[0] if zeros else None
        rows, columns = stored.shape
        return nbits_zero_points(name, scale, zero, (rows, columns), stored.bits, stored.block)

    def put_zeros(self, sites: Sequence[Site], zero: Array) -> str:
        """Make all uses of a weight read its codes with other zero points; return their name.

        Raises:
            LoraFxError: A use that is none of these sites: the tree has one tensor for both.
        """
        name = sites[0].parameter
        if not self.covers(name, sites):
            raise LoraFxError(
                f"{name!r}: another use reads the same codes, and it must not get the update",
                "export with --mode switch, which adds a branch to one use",
            )
        quantised_parameters.replace_zeros(self.root, name, from_numpy(zero))
        for node in self.graph.find_nodes(op="call_function", target=codes.DEQUANTISE):
            if self._names.get(str(_node(node.args[0]).target)) == name:
                with self.graph.inserting_before(node):
                    node.update_arg(2, self.graph.get_attr(f"{name}_zero"))
        self.changed()
        return f"{name}_zero"

    def repoint(self, sites: Sequence[Site], stored: str) -> None:
        """Make sites read another stored tensor through their own copies of the chain."""
        for site in sites:
            with self.graph.inserting_before(self._at(site)):
                start = self.graph.get_attr(stored)
            start.meta = dict(self.weight(site).meta)
            self._replay(site, start)

    def clone(self) -> FxGraph:
        """Return a copy of the graph with the same node names; tensors and tree are shared."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copy = copy_into(graph, node, copies)
            if copy.name != node.name:
                copy.name = node.name
        graph.set_codegen(self.graph._codegen)

        clone = FxGraph(
            graph, self.root, training=self.training, bodies=self.bodies, constants=self.constants
        )
        clone.share(self._named)
        clone.held = self.held
        return clone

    def module(self) -> fx.GraphModule:
        """Return the graph as a module that runs.

        It takes the inputs of the graph in their order, reads the tensors of the tree, and returns
        the outputs in a tuple. What passes do later to this graph does not reach it.
        """
        tensors = {**self.constants, **all_tensors(self.root), **self.bodies}
        names = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        return fx.GraphModule({name: tensors[name] for name in names}, self.clone().graph)

    def lint(self) -> None:
        """Run torch.fx's own check."""
        self.graph.lint()


def replaced(args: Any, path: Sequence[int], value: Any) -> Any:
    """Return arguments with the value at a path replaced."""
    if not path:
        return value
    position, *deeper = path
    changed = list(args)
    changed[position] = replaced(changed[position], deeper, value)
    if isinstance(args, tuple):
        return tuple(changed)
    return changed


def _node(arg: object) -> fx.Node:
    assert isinstance(arg, fx.Node)
    return arg


aten = torch.ops.aten
CONVS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}


OpCall = tuple[Any, tuple[Any, ...]]
"""An op and its arguments."""


PRIMS: Mapping[str, Callable[..., OpCall]] = {
    "matmul": lambda x, y: (aten.matmul.default, (x, y)),
    "add": lambda x, y: (aten.add.Tensor, (x, y)),
    "mul": lambda x, y: (aten.mul.Tensor if isinstance(y, fx.Node) else aten.mul.Scalar, (x, y)),
    "div": lambda x, y: (aten.div.Tensor, (x, y)),
    "norm": lambda x: (aten.linalg_vector_norm.default, (x, 2, [-1], True)),
    "detach": lambda x: (aten.detach.default, (x,)),
    "transpose": lambda x, perm: (aten.permute.default, (x, list(perm))),
    "reshape": lambda x, shape: (aten.reshape.default, (x, list(shape))),
    "repeat": lambda x, times: (aten.repeat_interleave.self_int, (x, times, -1)),
    "slice": lambda x, axis, start, stop: (aten.slice.Tensor, (x, axis, start, stop)),
    "pad": lambda x, **sides: (aten.constant_pad_nd.default, (x, tensors.padding(**sides), 0.0)),
    "einsum": lambda x, y, equation: (aten.einsum.default, (equation, [x, y])),
    "where": lambda mask, x, y: (aten.where.self, (mask, x, y)),
    "gather": lambda x, ids: (aten.index.Tensor, (x, [ids])),
    "dropout": lambda x, p: (aten.dropout.default, (x, p, True)),
    "cast": lambda x, dtype: (aten.to.dtype, (x, getattr(torch, dtype))),
    "cast_like": lambda x, y: (aten.type_as.default, (x, y)),  # a and b stay fp32 over any base
}
"""The function that makes the node for each primitive of lora_fx.ir.emitter.Ops, except conv."""


class FxEmitter:
    """Makes ATen nodes after or before a site's node, each marked as part of its branch.

    The nodes carry the module stack of their site, so that they are in the same block when blocks
    become functions.
    """

    def __init__(self, graph: FxGraph, site: Site, node: fx.Node, *, before: bool) -> None:
        self.owner = graph
        self.site = site
        self.node = node
        self.next = node  # what the branch's nodes stand before
        if not before:
            self.next = node.next
            while self.next.target is operator.getitem and self.next.args[0] is node:
                self.next = self.next.next  # past what picks from a result that is a tuple

    def _make(self, target: Any, args: Any = None, kwargs: Any = None) -> fx.Node:
        return make_marked(self.next, self.node, self.site.id, target, args, kwargs)

    def op(self, prim: str, *xs: Any, **attrs: Any) -> fx.Node:
        """Add the node of one primitive of the closed set; see lora_fx.ir.emitter.Ops."""
        if prim == "conv":
            return self._make(CONVS[len(self.site.operand)], xs, {"groups": attrs["groups"]})
        if prim not in PRIMS:
            raise MistakeError(f"the fx emitter has no primitive {prim!r}")
        return self._make(*PRIMS[prim](*xs, **attrs))

    def like(self, site: Site, x: fx.Node, w: fx.Node) -> fx.Node:
        """Add the site's own op on other operands, with its attributes and without its bias."""
        row = ops.row_of(self.node)
        assert row is not None
        use = self.owner.use(site)
        args = list(self.node.args)
        args[use.weight[0]] = w
        args[use.x[0]] = x
        if row.bias is not None and row.bias < len(args):
            args[row.bias] = None
        kwargs = {name: setting for name, setting in self.node.kwargs.items() if name != "bias"}
        result = self._make(self.node.target, tuple(args), kwargs)
        if row.first:
            return self._make(operator.getitem, (result, 0))
        return result

    def parameter(self, name: str, value: Array, role: Role) -> fx.Node:
        """Add a get_attr of an adapter's tensor, and register the tensor on the tree once."""
        root = self.owner.root
        module, leaf = owner(root, name, create=lambda _: tensors.AdapterTensors())
        if leaf not in module._parameters and leaf not in module._buffers:
            # a later graph finds it there
            # In torch's own memory, which is aligned, and row by row, which factors of an SVD are
            # not: so a run gives the same bits again, also from a file.
            tensor = from_numpy(value).clone().to(tensors.device_of(root))
            module.register_parameter(leaf, nn.Parameter(tensor, role is Role.TRAIN))
        return self._make(name)
