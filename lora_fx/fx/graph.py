"""torch.fx as a Graph: weights found by data flow, branches inserted as marked ATen nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lora_fx.errors import LoraFxError
from lora_fx.fx import ops
from lora_fx.fx.computed import evaluate
from lora_fx.fx.emitter import MARK, FxEmitter, is_marked, mark
from lora_fx.fx.flops import data_flops
from lora_fx.fx.flow import Flow, tensor, weight_flow
from lora_fx.fx.nodes import argument, dtype_name, value
from lora_fx.fx.sites import Found, uses
from lora_fx.fx.tensors import from_numpy, named_tensors, owner, to_numpy
from lora_fx.ir.emitter import Parameter, Role
from lora_fx.ir.graph import Deferred, Site


class FxGraph:
    """An export graph over a tree of modules that holds its tensors.

    Args:
        graph: Nodes; get_attr targets are dotted names under `root`.
        root: The module tree. Passes may register parameters on it.
        training: Whether dropout nodes are wanted.
        bodies: What the higher-order ops of the graph call, by the name that it reads.
    """

    alone = False  # the programs of a module share its tensors

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        *,
        training: bool = False,
        bodies: Mapping[str, fx.GraphModule] | None = None,
    ) -> None:
        self.graph = graph
        self.bodies = dict(bodies or {})
        self.root = root
        self.training = training
        self._names, self._aliases = named_tensors(root)

    def refresh(self) -> None:
        """Read the tree's names again after tensors were added to it."""
        self._names, self._aliases = named_tensors(self.root)

    # --- reading ---------------------------------------------------------------------------------

    def parameters(self) -> Sequence[Parameter]:
        """Every parameter of the tree under its first name, computed weights behind their roots.

        Adapters' own are left out.
        """
        computed: dict[str, list[Parameter]] = {}
        for site, found in self._uses():
            if found.weight.name or any(
                p.name == site.parameter for p in computed.get(found.weight.behind[0], ())
            ):
                continue
            dtype = dtype_name(value(found.weight.root).dtype)
            shape = tuple(value(found.weight.root).shape)
            alias = site.parameter.rpartition("~")[0]
            new = Parameter(site.parameter, shape, dtype, (alias,) if alias else ())
            computed.setdefault(found.weight.behind[0], []).append(new)
        result = []
        for name, aliases in self._aliases.items():
            t = tensor(self.root, name)
            result.append(Parameter(name, tuple(t.shape), dtype_name(t.dtype), tuple(aliases)))
            result += computed.get(name, ())
        return result

    def sites(self) -> Sequence[Site]:
        """Every use of a weight, in execution order."""
        return [site for site, _ in self._uses()]

    def data_flops(self) -> int:
        """FLOPs of matmuls that no weight takes part in."""
        taken = {found.node for _, found in self._uses()}
        total = 0
        for node in self.graph.nodes:
            if node in taken or is_marked(node) or node.op != "call_function":
                continue
            if node.target in ops.DATA_OPS or (
                (row := ops.row_of(node)) is not None and not row.op.startswith("embedding")
            ):
                total += data_flops(node)
        return total

    def adapted(self) -> frozenset[str]:
        """Ids of sites that carry a branch: their marked nodes say so."""
        return frozenset(n.meta["custom"][MARK]["site"] for n in self.graph.nodes if is_marked(n))

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """A stored parameter as an array; a computed weight is computed."""
        for site, found in self._uses() if name not in self._aliases else ():
            if site.parameter == name:
                return to_numpy(evaluate(self.root, self.flow(), found.weight.root))
        return to_numpy(tensor(self.root, name))

    def reader(self, name: str) -> Callable[[], np.ndarray[Any, Any]]:
        """Read now, since its storage may change."""
        value = self.read(name)
        return lambda: value

    def flow(self) -> Flow:
        """Which nodes depend on parameters and constants only."""
        return weight_flow(self.graph, self.root, self._names)

    def _uses(self) -> Iterator[tuple[Site, Found]]:
        return uses(self.graph, self.flow(), self.bodies)

    # --- rewriting -------------------------------------------------------------------------------

    def _at(self, site: Site) -> fx.Node:
        name = site.id.partition(":")[0]
        for node in self.graph.nodes:
            if node.name == name:
                return _node(node)
        raise LoraFxError(
            f"site {site.id!r} is not in this graph", "run find again after a rewrite"
        )

    def use(self, site: Site) -> ops.Use:
        """What the table says of the site's operand."""
        node = self._at(site)
        row = ops.row_of(node)
        assert row is not None
        return next(u for u in row.uses(node) if u.weight == site.slot)

    def activation(self, site: Site) -> fx.Node:
        """The other operand of the site."""
        return _node(ops.pick(self._at(site), self.use(site).x))

    def weight(self, site: Site) -> fx.Node:
        """The node at the start of the site's chain: a get_attr, or what computes the weight."""
        return self._chain(site)[0]

    def output(self, site: Site) -> fx.Node:
        """The site's result."""
        node = self._at(site)
        row = ops.row_of(node)
        if row is None or not row.first:
            return node
        first = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
        if first:
            return _node(first[0])
        raise LoraFxError(f"nothing reads the result of site {site.id!r}")

    def product(self, site: Site, e: Any) -> fx.Node | None:
        """See lora_fx.ir.graph.Graph; torch knows it of linear layers and convolutions."""
        node, y = self._at(site), self.output(site)
        row = ops.row_of(node)
        assert row is not None
        bias = None if row.bias is None else ops.pick(node, (row.bias,))
        if not isinstance(bias, fx.Node):
            return y
        if row.op == "addmm" and float(argument(node, "beta", 1)) != 1.0:
            return None
        if row.op.startswith("conv"):
            bias = e.op("reshape", bias, shape=(-1, *(1 for _ in site.operand[2:])))
        less = e.op("cast_like", e.op("mul", bias, -1.0), y)
        return _node(e.op("add", less, y))

    def emit(self, site: Site, *, before: bool = False) -> FxEmitter:
        """An emitter at the site: after its node (branch) or before it (weight form)."""
        return FxEmitter(self, site, self._at(site), before=before)

    def replace_output(self, site: Site, y: fx.Node) -> None:
        """Every user of the site reads y; the nodes of its own branch do not change."""
        node = self.output(site)
        y.meta["val"] = node.meta.get("val")  # later sites read shapes from their operands
        node.replace_all_uses_with(y, delete_user_cb=lambda user: not is_marked(user, site.id))

    def _read_by(self, site: Site, w: fx.Node) -> None:
        """The site's operand becomes w."""
        node = self._at(site)
        w.meta["val"] = _node(ops.pick(node, site.slot)).meta.get("val")
        args = list(node.args)
        if len(site.slot) == 1:
            args[site.slot[0]] = w
        else:
            inner = list(args[site.slot[0]])  # type: ignore[arg-type]
            inner[site.slot[1]] = w
            args[site.slot[0]] = inner
        node.args = tuple(args)

    def rebase(self, site: Site, w: fx.Node) -> None:
        """The site reads w through a copy of its own chain; the copy is part of its branch."""
        w.meta["val"] = self.weight(site).meta.get("val")  # what follows it reads shape and dtype
        self._replay(site, w, marked=True)

    def _replay(self, site: Site, start: fx.Node, *, marked: bool = False) -> None:
        chain = self._chain(site)
        env = {chain[0]: start}
        with self.graph.inserting_before(self._at(site)):
            for old in chain[1:]:
                new = self.graph.node_copy(old, lambda n: env.get(n, n))
                if marked:
                    mark(new, site.id)
                env[old] = new
        self._read_by(site, env[chain[-1]])

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
        chains = [self._chain(s) for s in sites]
        inside = {n for chain in chains for n in chain}
        mine = inside | {self._at(s) for s in sites}
        starts = {
            n
            for n in self.graph.nodes
            if n.op == "get_attr" and self._names.get(str(n.target)) == name
        }
        return all(user in mine for n in inside | starts for user in n.users)

    def replace_parameter(
        self, name: str, sites: Sequence[Site], value: np.ndarray[Any, Any] | Deferred
    ) -> str:
        """See lora_fx.ir.graph.Graph. A constant of their own is `NAME_folded[_1]`."""
        value = value.compute() if isinstance(value, Deferred) else value
        stored = name.replace("~", "")
        module, leaf = owner(self.root, stored)
        old = tensor(self.root, name if name in self._aliases else sites[0].behind[0])
        new = nn.Parameter(from_numpy(value, like=old), requires_grad=False)
        if name in self._aliases and self.covers(name, sites):
            for m in self.root.modules():
                for k, p in m._parameters.items():
                    if p is old:
                        m._parameters[k] = new
            return name
        fresh, i = f"{leaf}_folded", 0
        while fresh in module._parameters:
            i += 1
            fresh = f"{leaf}_folded_{i}"
        module.register_parameter(fresh, new)
        stored = stored.removesuffix(leaf) + fresh
        self.refresh()
        self.repoint(sites, stored)
        return stored

    def repoint(self, sites: Sequence[Site], stored: str) -> None:
        """Let sites read another stored tensor through a chain of their own."""
        for site in sites:
            with self.graph.inserting_before(self._at(site)):
                start = self.graph.get_attr(stored)
            start.meta = dict(self.weight(site).meta)
            self._replay(site, start)

    def clone(self) -> FxGraph:
        """New nodes, same tensors and tree."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].name = node.name
        graph.set_codegen(self.graph._codegen)
        return FxGraph(graph, self.root, training=self.training, bodies=self.bodies)

    def lint(self) -> None:
        """Fx's own check."""
        self.graph.lint()

    def add_parameter(self, name: str, value: np.ndarray[Any, Any], role: Role) -> None:
        """Register an adapter's tensor at its dotted name, once; a later graph finds it there."""
        module, leaf = owner(self.root, name, create=True)
        if leaf not in module._parameters:
            device = next((p.device for p in self.root.parameters()), None)
            # Torch's own memory is aligned, so that a run gives the same bits again.
            tensor = torch.from_numpy(np.array(value)).clone().to(device)
            module.register_parameter(leaf, nn.Parameter(tensor, role is Role.TRAIN))


def _node(arg: Any) -> fx.Node:
    assert isinstance(arg, fx.Node)
    return arg
