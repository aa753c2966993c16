"""torch.fx as a Graph: weights found by data flow, branches inserted as marked ATen nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MistakeError
from lora_fx.files.quantised.onnx import nbits_zero_points
from lora_fx.fx import codes, dequantise_nodes, dotted_names, quantised_parameters, tensors
from lora_fx.fx.dotted_names import all_tensors, named_tensors, owner, parameter_of
from lora_fx.fx.graph import ops
from lora_fx.fx.graph.computed_weights import evaluate
from lora_fx.fx.graph.flops import data_flops, gathered
from lora_fx.fx.graph.flow import FxFlow, weight_flow
from lora_fx.fx.graph.in_place import Writes
from lora_fx.fx.graph.nodes import (
    MARK,
    argument,
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

    def refresh(self) -> None:
        """Read the tree's names again after tensors were added to it."""
        self._names, self._aliases = named_tensors(self.root)

    def read_codes(self) -> bool:
        """Read the tree's codes as numbers; returns whether the graph changed."""
        self.held = quantised_parameters.forms(self.root)
        if not self.held or not dequantise_nodes.read_codes(self.graph, self._names, self.held):
            return False
        self.changed()
        return True

    # --- reading ---------------------------------------------------------------------------------

    def parameters(self) -> Sequence[Parameter]:
        """Every parameter of the tree under its first name, adapters' own left out.

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
        """Computed weights by name, under the parameter that the computation starts from."""
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
        """Every use of a weight, in execution order."""
        return [site for site, _, _ in self._uses()]

    def other_readers(self) -> Sequence[OtherReader]:
        """The readers of a parameter other than its sites."""
        return other_readers(self.graph, self.flow(), self._uses(), self.bodies)

    def data_flops(self) -> int:
        """FLOPs of the matmuls without a weight, and without rows gathered from a weight."""
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
        """FLOPs of the products that are no site."""
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
        """The ids of sites that carry a branch, read from the marks of its nodes."""
        marked = filter(is_marked, self.graph.nodes)
        return frozenset(node.meta["custom"][MARK]["site"] for node in marked)

    def read(self, name: str) -> Array:
        """A stored parameter as an array; a computed weight is computed."""
        if name not in self._aliases:
            for site, _, weight in self._uses():
                if site.parameter == name:
                    return to_numpy(evaluate(self.root, self.flow(), weight.root))
        return to_numpy(quantised_parameters.numbers(self.root, name))

    def reader(self, name: str) -> Callable[[], Array]:
        """A function that gives the value as it was here: the storage may change before it runs."""
        value = self.read(name)
        return lambda: value

    def flow(self) -> FxFlow:
        """The nodes that depend only on parameters and constants."""
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
        """The op table's row for the operand of a site."""
        node = self._at(site)
        row = ops.row_of(node)
        assert row is not None
        return next(use for use in row.uses(node) if use.weight == site.slot)

    def activation(self, site: Site) -> fx.Node:
        """The operand of the site that is no weight, as it is now."""
        return _node(ops.pick(self._at(site), self.use(site).x))

    def kept_activation(self, site: Site) -> fx.Node:
        """The activation, or a copy of it where a train graph writes over it later.

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
        """The node at the start of the site's chain: a get_attr, or the weight's computation."""
        return self._chain(site)[0]

    def picked(self, site: Site, e: object) -> fx.Node:
        """The indices of the last gather on the way from the weight to the site."""
        chain = self._chain(site)[1:]
        pick = next(node for node in chain if gather(node, shape_of(node.args[0]) or ()))
        ids = pick.args[-1]
        if isinstance(ids, (tuple, list)):
            return _node(ids[0])
        return _node(ids)

    def output(self, site: Site) -> fx.Node:
        """The result of the site's op; of an op with several results, the first."""
        node = self._at(site)
        row = ops.row_of(node)
        if row is None or not row.first:
            return node
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == 0:
                return user
        raise MistakeError(f"nothing reads the result of site {site.id!r}")

    def product(self, site: Site, e: Any) -> fx.Node | None:
        """The result without its bias: the bias is subtracted again, so no product runs twice."""
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
        """An emitter at the site: after its node (branch) or before it (weight form)."""
        self.changed()  # here once, and when the result is put in its place: not at every node
        return FxEmitter(self, site, self._at(site), before=before)

    def replace_output(self, site: Site, y: fx.Node) -> None:
        """Let every user of the site read y, except the nodes of its own branch.

        Those read the old result: redirected as well, the sum would read itself.
        """
        node = self.output(site)
        y.meta["val"] = node.meta.get("val")  # later sites read shapes from their operands
        self.changed()
        node.replace_all_uses_with(y, delete_user_cb=lambda user: not is_marked(user, site.id))

    def rebase(self, site: Site, w: fx.Node) -> None:
        """Let the site read w through a copy of its own chain, which is part of the branch."""
        w.meta["val"] = self.weight(site).meta.get("val")  # what follows it reads shape and dtype
        self._replay(site, w, marked=True)

    def _replay(self, site: Site, start: fx.Node, *, marked: bool = False) -> None:
        """Let the site read the result of a copy of its chain on `start`."""
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
        """The nodes between the weight and the site, both ends included."""
        chain = [_node(ops.pick(self._at(site), site.slot))]
        while chain[0].op != "get_attr" and chain[0].name != site.root:
            chain.insert(0, _node(chain[0].args[0]))
        return chain

    def places(self, site: Site) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """The site's node, and its weight's way to it, both ends included."""
        return self._at(site), tuple(self._chain(site))

    def covers(self, name: str, sites: Sequence[Site]) -> bool:
        """True when these sites are all that reads a parameter in this graph."""
        site_slots = {(self._at(site), site.slot) for site in sites}
        chains: set[fx.Node] = set()
        for site in sites:
            chains.update(self._chain(site))
        starts = {
            node
            for node in self.graph.find_nodes(op="get_attr")
            if self._names.get(str(node.target)) == name
        }
        for node in chains | starts:
            for user in node.users:
                if user in chains:
                    continue
                # a node may read the weight in another slot than the site's, as its bias
                if any((user, path) not in site_slots for path in slots(user, node)):
                    return False
        return True

    def replace_parameter(self, name: str, sites: Sequence[Site], value: Array | Deferred) -> str:
        """Let sites read a value; if they need a separate constant, it is called `NAME_folded[_1]`.

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
        """Those of codes [out, in] whose product in ONNX Runtime takes floats for them."""
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
        """Let all uses of a weight read its codes by other zero points; returns their name.

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
        """Let sites read another stored tensor through their own copy of the chain."""
        for site in sites:
            with self.graph.inserting_before(self._at(site)):
                start = self.graph.get_attr(stored)
            start.meta = dict(self.weight(site).meta)
            self._replay(site, start)

    def clone(self) -> FxGraph:
        """The same graph in new nodes, which keep their names; tensors and tree are shared."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copy = graph.create_node(node.op, node.target, None, None, node.name)
            copies[node] = copy
            # set afterwards: create_node looks for symbols among its arguments, a third of its time
            copy.args = map_arg(node.args, copies.__getitem__)
            copy.kwargs = map_arg(node.kwargs, copies.__getitem__)
            copy.meta = dict(node.meta)
            copy.type = node.type
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
        """The graph as a module that runs.

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
    """The arguments with another value at a path."""
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
    "gather": lambda x, ids: (aten.index.Tensor, (x, [ids])),
    "dropout": lambda x, p: (aten.dropout.default, (x, p, True)),
    "cast": lambda x, dtype: (aten.to.dtype, (x, getattr(torch, dtype))),
    "cast_like": lambda x, y: (aten.type_as.default, (x, y)),  # a and b stay fp32 over any base
}
"""The function that makes the node of each primitive of lora_fx.ir.emitter.Ops, except conv."""


class FxEmitter:
    """Builds ATen nodes after a site's node or before it, each marked as part of its branch.

    They carry the module stack of their site, so that they land in the same block when blocks
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
        """The site's own op on other operands, its attributes kept and its bias left out."""
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
        """A get_attr of an adapter's tensor, registered once at its dotted name on the tree."""
        root = self.owner.root
        module, leaf = owner(root, name, create=lambda _: tensors.AdapterTensors())
        if leaf not in module._parameters:  # a later graph finds it there
            # In torch's own memory, which is aligned, and row by row, which factors of an SVD are
            # not: so a run gives the same bits again, also from a file.
            tensor = from_numpy(value).clone().to(tensors.device_of(root))
            module.register_parameter(leaf, nn.Parameter(tensor, role is Role.TRAIN))
        return self._make(name)
