"""The parts of torch's ONNX exporter: the facade of `torch.onnx._internal`.

Its table of operators, which dtypes it promotes, and how it translates a node. All of it is
imported on first use. Tried with torch 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
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
    """Operator → its decomposition, for operators that the exporter cannot translate itself."""
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
    """Arguments of `patched`: the class of the table, and a way to make it that remembers."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry as Table

    return {"thing": Table, "from_torchlib": staticmethod(functools.cache(Table.from_torchlib))}


def typed_by_values() -> contextlib.AbstractContextManager[None]:
    """A block in which the exporter reads the dtypes of operands from the values of their nodes.

    It runs the whole graph on shapes for them: a fifth of what a small model costs.
    """
    from torch.onnx._internal.fx.passes import type_promotion as promotion

    run = promotion._TypePromotionInterpreter.run_node

    def promote(self: Any, node: fx.Node) -> object:
        if value(node) is None:
            return run(self, node)
        rule = promotion.get_type_promotion_rule(node, self.type_promotion_table)
        if rule:
            with self._set_current_node(node):  # what is put in beside it has its marks
                self._maybe_promote_node(node, rule)
        return value(node)

    return patched(promotion._TypePromotionInterpreter, run_node=promote)


@dataclass(frozen=True)
class _Translation:
    """The nodes and the result of a function of operators, run once.

    Attributes:
        inputs: The values that it was given, in order.
        nodes: The nodes that it made, each with the types of its outputs.
        result: The value that it returned.
    """

    inputs: Sequence[ir.Value]
    nodes: Sequence[tuple[ir.Node, Types]]
    result: object


def translated_once() -> contextlib.AbstractContextManager[None]:
    """A block in which a function of operators is run once for all nodes that give it the same.

    What it made is copied for the others: the same nodes between other values. Constants that the
    exporter shares among nodes stay shared.
    """
    import onnx_ir as ir
    from onnxscript import evaluator
    from torch.onnx._internal.exporter import _dispatching as dispatching

    translations: dict[Hashable, _Translation] = {}
    constant_farms: list[object] = []  # held, so that no other one has the id of one of these
    dispatch = dispatching.dispatch

    def replayed(function: Callable[..., object], *args: object, **named: object) -> object:
        recorder: Any = evaluator.default()
        leaves = tree_leaves((args, named))
        inputs = dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, ir.Value))
        order = {operand: i for i, operand in enumerate(inputs)}
        key = (function, id(recorder.constant_farm), described((args, named), order))
        if key in translations:
            return _replay(translations[key], list(inputs), recorder)

        result = function(*args, **named)
        shared = set(recorder.constant_farm.values())
        nodes = [node for node in recorder.nodes if node.outputs[0] not in shared]
        if not any(map(_has_body, nodes)):
            constant_farms.append(recorder.constant_farm)
            # the exporter will set other shapes for the last of them
            typed_nodes = [(node, types_of(node.outputs)) for node in nodes]
            translations[key] = _Translation(tuple(inputs), typed_nodes, result)
        return result

    def dispatched(node: fx.Node, table: Any) -> tuple[object, str]:
        function, message = dispatch(node, table)
        if not function:
            return function, message
        return partial(replayed, function), message

    return patched(dispatching, dispatch=dispatched)


def _has_body(node: ir.Node) -> bool:
    return any("GRAPH" in attribute.type.name for attribute in node.attributes.values())


def _replay(translation: _Translation, inputs: Sequence[ir.Value], recorder: Any) -> object:
    """Record the nodes of a translation between other values; returns its result between them."""
    import onnx_ir as ir
    from torch.onnx._internal.exporter._tensors import SymbolicTensor

    copies: dict[ir.Value | None, ir.Value]
    copies = dict(zip(translation.inputs, inputs, strict=True))
    for node, types in translation.nodes:
        outputs = [SymbolicTensor(recorder.opset) for _ in types]
        give_types(types, outputs)
        attributes = [
            ir.Attr(attribute.name, attribute.type, copy.copy(attribute.value))
            for attribute in node.attributes.values()
        ]
        copies |= zip(node.outputs, outputs, strict=True)
        recorder.nodes.append(
            ir.Node(
                node.domain,
                node.op_type,
                [copies.get(operand, operand) for operand in node.inputs],
                attributes,
                outputs=outputs,
                overload=node.overload,
                version=node.version,
            )
        )
    return tree_map_only(ir.Value, lambda operand: copies.get(operand, operand), translation.result)
