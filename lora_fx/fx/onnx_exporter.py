"""The parts of torch's ONNX exporter: the facade of `torch.onnx._internal`.

Its table of operators, which dtypes it promotes, and how it translates a node. All of it is
imported on first use. Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import fx

from lora_fx.fx.graph.nodes import value
from lora_fx.fx.trees import tree_leaves, tree_map_only
from lora_fx.onnx.value_types import Types, described, give_types, types_of
from lora_fx.patching import patched

if TYPE_CHECKING:
    import onnx_ir as ir


def decompositions(opset: int) -> dict[Any, Callable[..., Any]]:
    """Operator → what it is made of, for operators that the exporter cannot translate itself."""
    from torch.onnx._internal.exporter import _decomp

    table = _table_read_once()["from_torchlib"].__func__(opset)
    translated = set(_decomp.get_onnx_implemented_overloads(table))
    return _decomp.create_onnx_friendly_decomposition_table(translated)


def table_read_once() -> contextlib.AbstractContextManager[None]:
    """A block in which the exporter makes its table of operators once an opset and process.

    It parses the source of 500 functions for every model, half of what a small one costs.
    """
    return patched(**_table_read_once())


@functools.cache
def _table_read_once() -> dict[str, Any]:
    """What `patched` takes: the class of the table, and a way to make it that remembers."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry as Table

    return {"thing": Table, "from_torchlib": staticmethod(functools.cache(Table.from_torchlib))}


def typed_by_values() -> contextlib.AbstractContextManager[None]:
    """A block in which the exporter reads the dtypes of operands from the values of their nodes.

    It runs the whole graph on shapes for them: a fifth of what a small model costs.
    """
    from torch.onnx._internal.fx.passes import type_promotion as promotion

    run = promotion._TypePromotionInterpreter.run_node

    def known(self: Any, node: fx.Node) -> object:
        if value(node) is None:
            return run(self, node)
        if rule := promotion.get_type_promotion_rule(node, self.type_promotion_table):
            with self._set_current_node(node):  # what is put in beside it has its marks
                self._maybe_promote_node(node, rule)
        return value(node)

    return patched(promotion._TypePromotionInterpreter, run_node=known)


def translated_once() -> contextlib.AbstractContextManager[None]:
    """A block in which a function of operators is run once for all nodes that give it the same.

    What it made is copied for the others: the same nodes between other values. Constants that the
    exporter shares among nodes stay shared.
    """
    import onnx_ir as ir
    from onnxscript import evaluator
    from torch.onnx._internal.exporter import _dispatching as dispatching
    from torch.onnx._internal.exporter._tensors import SymbolicTensor

    known: dict[Hashable, tuple[Sequence[ir.Value], Sequence[tuple[ir.Node, Types]], object]] = {}
    farms, dispatch = list[object](), dispatching.dispatch

    def replayed(function: Callable[..., object], *args: object, **named: object) -> object:
        recorder: Any = evaluator.default()
        values = [v for v in tree_leaves((args, named)) if isinstance(v, ir.Value)]
        order = {v: i for i, v in enumerate(dict.fromkeys(values))}
        key = function, id(recorder.constant_farm), described((args, named), order)
        if key not in known:
            made = function(*args, **named)
            shared = set(recorder.constant_farm.values())
            nodes = [n for n in recorder.nodes if n.outputs[0] not in shared]
            if not any("GRAPH" in a.type.name for n in nodes for a in n.attributes.values()):
                farms.append(recorder.constant_farm)  # held, so that no other one has its id
                # the exporter will set other shapes for the last of them
                known[key] = tuple(order), [(n, types_of(n.outputs)) for n in nodes], made
            return made
        before, parts, made = known[key]
        at: dict[ir.Value | None, ir.Value] = dict(zip(before, order, strict=True))
        for node, types in parts:
            outputs = [SymbolicTensor(recorder.opset) for _ in types]
            give_types(types, outputs)
            inputs = [at.get(v, v) for v in node.inputs]
            own = [ir.Attr(a.name, a.type, copy.copy(a.value)) for a in node.attributes.values()]
            at |= zip(node.outputs, outputs, strict=True)
            recorder.nodes.append(
                ir.Node(node.domain, node.op_type, inputs, own, outputs=outputs,
                        overload=node.overload, version=node.version)
            )  # fmt: skip
        return tree_map_only(ir.Value, lambda v: at.get(v, v), made)

    def dispatched(node: fx.Node, table: Any) -> tuple[object, str]:
        function, message = dispatch(node, table)
        return function and partial(replayed, function), message

    return patched(dispatching, dispatch=dispatched)
