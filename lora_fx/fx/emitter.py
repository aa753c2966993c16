"""torch.fx as an Emitter: ATen nodes, each marked as part of a site's branch."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from lora_fx.errors import LoraFxError
from lora_fx.fx import ops
from lora_fx.ir.emitter import Role
from lora_fx.ir.graph import Site

if TYPE_CHECKING:
    from lora_fx.fx.graph import FxGraph

aten = torch.ops.aten
MARK = "lora_fx"
CONVS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}


def mark(node: fx.Node, site: str) -> None:
    """Say in the metadata that a node belongs to the branch of a site (survives export)."""
    node.meta["custom"] = {**node.meta.get("custom", {}), MARK: {"site": site}}


def is_marked(node: fx.Node, site: str | None = None) -> bool:
    """True for nodes that a pass emitted, for `site` or for any."""
    found = node.meta.get("custom", {}).get(MARK)
    return found is not None and (site is None or found["site"] == site)


class FxEmitter:
    """Inserts in order, after the site's node or before it, with the site's module stack."""

    def __init__(self, graph: FxGraph, site: Site, node: fx.Node, *, before: bool) -> None:
        self.owner = graph
        self.site = site
        self.node = node
        after = node.next
        while after.target is operator.getitem and after.args[0] is node:
            after = after.next  # the parts of a result that is a tuple
        self.next = node if before else after

    def _call(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        with self.owner.graph.inserting_before(self.next):
            name = f"lora_{getattr(target, '_opname', 'node')}"
            new = self.owner.graph.create_node("call_function", target, args, kwargs or {}, name)
        return self._tag(new)

    def _tag(self, new: fx.Node) -> fx.Node:
        stack = self.node.meta.get("nn_module_stack")
        if stack is not None:
            new.meta["nn_module_stack"] = stack
        mark(new, self.site.id)
        return new

    def op(self, prim: str, *xs: Any, **attrs: Any) -> fx.Node:
        """One primitive of the closed set (see lora_fx.ir.graph.Emitter)."""
        x = xs[0]
        if prim == "matmul":
            return self._call(aten.matmul.default, xs)
        if prim in ("add", "mul"):
            scalar = isinstance(xs[1], (int, float))
            packet = getattr(aten, prim)
            return self._call(packet.Scalar if scalar and prim == "mul" else packet.Tensor, xs)
        if prim == "div":
            return self._call(aten.div.Tensor, xs)
        if prim == "norm":
            return self._call(aten.linalg_vector_norm.default, (x, 2, [-1], True))
        if prim == "detach":
            return self._call(aten.detach.default, xs)
        if prim == "transpose":
            return self._call(aten.permute.default, (x, list(attrs["perm"])))
        if prim == "reshape":
            return self._call(aten.reshape.default, (x, list(attrs["shape"])))
        if prim == "slice":
            return self._call(aten.slice.Tensor, (x, attrs["axis"], attrs["start"], attrs["stop"]))
        if prim == "pad":
            pairs = list(zip(attrs["before"], attrs["after"], strict=True))[::-1]
            return self._call(aten.constant_pad_nd.default, (x, [n for p in pairs for n in p], 0.0))
        if prim == "einsum":
            return self._call(aten.einsum.default, (attrs["equation"], list(xs)))
        if prim == "conv":
            w, n = xs[1], len(self.site.operand)
            return self._call(CONVS[n], (x, w), {"groups": attrs["groups"]})
        if prim == "gather":
            return self._call(aten.embedding.default, xs)
        if prim == "dropout":
            return self._call(aten.dropout.default, (x, attrs["p"], True))
        if prim == "cast":
            return self._call(aten.to.dtype, (x, getattr(torch, attrs["dtype"])))
        if prim == "cast_like":
            return self._call(aten.type_as.default, xs)
        raise LoraFxError(f"the fx emitter has no primitive {prim!r}")

    def like(self, site: Site, x: fx.Node, w: fx.Node) -> fx.Node:
        """The site's own node on other operands, without its bias."""
        row, use = ops.row_of(self.node), self.owner.use(site)
        assert row is not None
        args = list(self.node.args)
        args[use.weight[0]], args[use.x[0]] = w, x
        if row.bias is not None and row.bias < len(args):
            args[row.bias] = None
        kwargs = {k: v for k, v in self.node.kwargs.items() if k != "bias"}
        result = self._call(self.node.target, tuple(args), kwargs)
        return self._call(operator.getitem, (result, 0)) if row.first else result

    def parameter(self, name: str, value: np.ndarray[Any, Any], role: Role) -> fx.Node:
        """A get_attr of an adapter's tensor, registered on the tree if it is new."""
        self.owner.add_parameter(name, value, role)
        with self.owner.graph.inserting_before(self.next):
            return self._tag(self.owner.graph.get_attr(name))
