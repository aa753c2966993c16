"""torch.fx as a Graph: weights found by data flow, branches inserted as marked ATen nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lora_fx.errors import LoraFxError
from lora_fx.fx import ops
from lora_fx.fx.emitter import MARK, FxEmitter, is_marked
from lora_fx.fx.flow import (
    Computed,
    State,
    Weight,
    data_flops,
    roots,
    scope_of,
    site_flops,
    tensor,
    weight_states,
)
from lora_fx.fx.nodes import dtype_name, shape_of
from lora_fx.fx.tensors import from_numpy, named_tensors, owner, to_numpy
from lora_fx.graph import Parameter, Role, Site
from lora_fx.view import View


class FxGraph:
    """An export graph over a tree of modules that holds its tensors.

    Args:
        graph: Nodes; get_attr targets are dotted names under `root`.
        root: The module tree. Passes may register parameters on it.
        training: Whether dropout nodes are wanted.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, *, training: bool = False) -> None:
        self.graph = graph
        self.root = root
        self.training = training
        self._names, self._aliases = named_tensors(root)

    def refresh(self) -> None:
        """Read the tree's names again after tensors were added to it."""
        self._names, self._aliases = named_tensors(self.root)

    # --- reading ---------------------------------------------------------------------------------

    def parameters(self) -> Sequence[Parameter]:
        """Every parameter of the tree under its first name; adapters' own are left out."""
        result = []
        for name, aliases in self._aliases.items():
            t = tensor(self.root, name)
            result.append(Parameter(name, tuple(t.shape), dtype_name(t.dtype), tuple(aliases)))
        return result

    def sites(self) -> Sequence[Site]:
        """Every use of a weight, in execution order."""
        return [site for site, _, _ in self._uses()]

    def data_flops(self) -> int:
        """FLOPs of matmuls that no weight takes part in."""
        taken = {node for _, node, _ in self._uses()}
        total = 0
        for node in self.graph.nodes:
            if node in taken or is_marked(node) or node.op != "call_function":
                continue
            if node.target in ops.DATA_OPS or (
                node.target in ops.OPS and node.target is not ops.aten.embedding.default
            ):
                total += data_flops(node)
        return total

    def adapted(self) -> frozenset[str]:
        """Ids of sites that carry a branch: their marked nodes say so."""
        return frozenset(n.meta["custom"][MARK]["site"] for n in self.graph.nodes if is_marked(n))

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """A stored parameter as an array."""
        return to_numpy(tensor(self.root, name))

    def _uses(self) -> Iterator[tuple[Site, fx.Node, ops.Use]]:
        states = weight_states(self.graph, self.root, self._names)
        for node in self.graph.nodes:
            row = ops.OPS.get(node.target) if node.op == "call_function" else None
            if row is None or is_marked(node):
                continue
            found = [(u, states.get(ops.pick(node, u.weight))) for u in row.uses(node)]
            found = [(u, s) for u, s in found if s is not None]
            direct = [(u, s) for u, s in found if isinstance(s, Weight)]
            one_weight = node.target is not ops.aten.lstm.input
            if one_weight and len(direct) > 1:
                direct, found = [], [(u, Computed(tuple(roots(s)), row.op)) for u, s in found[:1]]
            for use, state in direct or found[:1]:
                yield self._site(node, row, use, state), node, use  # type: ignore[arg-type]

    def _site(self, node: fx.Node, row: ops.Row, use: ops.Use, state: State) -> Site:
        many = len(use.weight) > 1 and row.op == "lstm"
        scope, cls = scope_of(node)
        operand = shape_of(ops.pick(node, use.weight)) or ()
        refusal, name, view = use.refusal, "", View()
        if isinstance(state, Computed):
            name = state.roots[0]
            refusal = f"the weight is computed by {state.by} from {', '.join(state.roots)}"
        else:
            name, view = state.name, state.view
        return Site(
            id=f"{node.name}:{use.weight[-1]}" if many else node.name,
            op=row.op,
            kind=use.kind,
            parameter=name,
            view=view,
            operand=tuple(int(n) for n in operand),
            scope=scope,
            module_class=cls,
            flops=site_flops(node, use),
            refusal=refusal,
            behind=roots(state),
            slot=use.weight,
            attrs=use.attrs,
        )

    # --- rewriting -------------------------------------------------------------------------------

    def _at(self, site: Site) -> tuple[fx.Node, ops.Use]:
        name = site.id.partition(":")[0]
        for node in self.graph.nodes:
            if node.name == name:
                for use in ops.OPS[node.target].uses(node):
                    if use.weight == site.slot:
                        return node, use
        raise LoraFxError(
            f"site {site.id!r} is not in this graph", "run find again after a rewrite"
        )

    def activation(self, site: Site) -> fx.Node:
        """The other operand of the site."""
        node, use = self._at(site)
        return _node(ops.pick(node, use.x))

    def weight(self, site: Site) -> fx.Node:
        """The get_attr node at the start of the site's chain."""
        return self._chain(site)[0]

    def output(self, site: Site) -> fx.Node:
        """The site's node."""
        return self._at(site)[0]

    def emit(self, site: Site, *, before: bool = False) -> FxEmitter:
        """An emitter at the site: after its node (branch) or before it (weight form)."""
        node = self._at(site)[0]
        return FxEmitter(self, site, node, before=before)

    def replace_output(self, site: Site, y: fx.Node) -> None:
        """Every user of the site reads y; the nodes of its own branch do not change."""
        node = self._at(site)[0]
        y.meta["val"] = node.meta.get("val")  # later sites read shapes from their operands
        node.replace_all_uses_with(y, delete_user_cb=lambda user: not is_marked(user, site.id))

    def replace_weight(self, site: Site, w: fx.Node) -> None:
        """The site reads w."""
        node, use = self._at(site)
        w.meta["val"] = _node(ops.pick(node, use.weight)).meta.get("val")
        args = list(node.args)
        if len(use.weight) == 1:
            args[use.weight[0]] = w
        else:
            inner = list(args[use.weight[0]])  # type: ignore[arg-type]
            inner[use.weight[1]] = w
            args[use.weight[0]] = inner
        node.args = tuple(args)

    def _chain(self, site: Site) -> list[fx.Node]:
        """get_attr … operand: the nodes between the stored parameter and the site."""
        node, use = self._at(site)
        chain = [_node(ops.pick(node, use.weight))]
        while chain[0].op != "get_attr":
            chain.insert(0, _node(chain[0].args[0]))
        return chain

    def covers(self, name: str, sites: Sequence[Site]) -> bool:
        """True when these sites are all that reads a parameter in this graph."""
        chains = [self._chain(s) for s in sites]
        inside = {n for chain in chains for n in chain}
        mine = inside | {self._at(s)[0] for s in sites}
        starts = {
            n
            for n in self.graph.nodes
            if n.op == "get_attr" and self._names.get(str(n.target)) == name
        }
        return all(user in mine for n in inside | starts for user in n.users)

    def replace_parameter(
        self, name: str, sites: Sequence[Site], value: np.ndarray[Any, Any]
    ) -> str:
        """See lora_fx.graph.Graph. A constant of their own is `NAME_folded[_1]`."""
        module, leaf = owner(self.root, name)
        old = tensor(self.root, name)
        new = nn.Parameter(from_numpy(value, like=old), requires_grad=False)
        if self.covers(name, sites):
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
        stored = name.removesuffix(leaf) + fresh
        self.refresh()
        self.repoint(sites, stored)
        return stored

    def repoint(self, sites: Sequence[Site], stored: str) -> None:
        """Let sites read another stored tensor through a chain of their own."""
        for site in sites:
            self._repoint(site, self._chain(site), stored)

    def _repoint(self, site: Site, chain: list[fx.Node], target: str) -> None:
        env: dict[fx.Node, fx.Node] = {}
        node = self._at(site)[0]
        with self.graph.inserting_before(node):
            for old in chain:
                new = self.graph.node_copy(old, lambda n: env.get(n, n))
                if old.op == "get_attr":
                    new.target = target
                env[old] = new
        self.replace_weight(site, env[chain[-1]])

    def clone(self) -> FxGraph:
        """New nodes, same tensors and tree."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].name = node.name
        graph.set_codegen(self.graph._codegen)
        return FxGraph(graph, self.root, training=self.training)

    def lint(self) -> None:
        """Fx's own check."""
        self.graph.lint()

    def add_parameter(self, name: str, value: np.ndarray[Any, Any], role: Role) -> None:
        """Register an adapter's tensor at its dotted name, once; a later graph finds it there."""
        module, leaf = owner(self.root, name, create=True)
        if leaf not in module._parameters:
            device = next((p.device for p in self.root.parameters()), None)
            tensor = torch.from_numpy(np.array(value)).to(device)
            module.register_parameter(leaf, nn.Parameter(tensor, role is Role.TRAIN))


def _node(arg: Any) -> fx.Node:
    assert isinstance(arg, fx.Node)
    return arg
