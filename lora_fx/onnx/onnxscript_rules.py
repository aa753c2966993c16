"""The interface to private modules of onnxscript: its rules and its constant folding.

Both run inside torch's exporter and inside our optimisation, and lack the options that are needed
here. So each function returns a block in which one function of onnxscript is replaced temporarily.
onnxscript is imported on first use. Tried with onnxscript 0.7.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.value_types import Types, described, give_types, types_of
from lora_fx.patching import patched

if TYPE_CHECKING:
    from onnxscript.optimizer._constant_folding import FoldConstantsPass
    from onnxscript.rewriter._matcher import SimplePatternMatcher
    from onnxscript.rewriter._rewrite_rule import RewriteRule


def exact_constants() -> contextlib.AbstractContextManager[None]:
    """A block in which onnxscript's rules take a constant for 0 or 1 only if it is exactly that.

    By default the rules compare with tolerances 1e-8 (absolute) and 1e-5 (relative):
    `x / (norm + 1e-8)` would be `x / norm`, which is NaN for x = 0, and a factor of 1.000005 would
    be lost.
    """
    from onnxscript.rewriter import _matcher

    def isclose(a: float, b: float, **_: float) -> bool:
        if b in (0, 1):
            return bool(a == b)
        # of other numbers the rules give more digits than a file has
        return bool(np.float32(a) == np.float32(b))

    return patched(_matcher, math=SimpleNamespace(isclose=isclose))


def norms_unfused() -> contextlib.AbstractContextManager[None]:
    """A block in which no rule folds a batch norm into the convolution before it."""
    from onnxscript import rewriter

    name = "_DEFAULT_REWRITE_RULES"
    if not hasattr(rewriter, name):
        return contextlib.nullcontext()
    rules = tuple(rule for rule in getattr(rewriter, name) if not _is_of_norms(rule))
    return patched(rewriter, **{name: rules})


def _is_of_norms(rule: object) -> bool:
    class_name = type(rule).__name__.lower()
    name = str(getattr(rule, "name", "")).lower()
    return "batchnorm" in class_name or "batchnorm" in name


def weights_unjoined(weights: Collection[str]) -> contextlib.AbstractContextManager[None]:
    """A block in which equal initialisers are merged, except weights with these names."""
    from onnx_ir.passes.common import initializer_deduplication as joining

    name = "_should_skip_initializer"
    skips = getattr(joining, name, None)
    if skips is None:
        return contextlib.nullcontext()

    def skips_weights(value: ir.Value, *arguments: object) -> object:
        return value.name in weights or skips(value, *arguments)

    return patched(joining, **{name: skips_weights})


@contextlib.contextmanager
def constants_apart() -> Iterator[None]:
    """A block in which no constant that a rule adds replaces another one of the same name.

    A rule names the bounds of a Clip by what is clipped. Where two of them clip one value, the
    second takes the first one's place, and what reads that reads nothing.
    """
    from onnxscript.rewriter._rewrite_rule import RewriteRule

    rewrite = RewriteRule.try_rewrite

    def try_rewrite(
        self: RewriteRule, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any
    ) -> object:
        replacement = rewrite(self, model, graph, node, **options)
        for constant in getattr(replacement, "new_initializers", ()):
            name = constant.name
            numbers = itertools.count(1)
            while constant.name in graph.initializers:
                constant.name = f"{name}.{next(numbers)}"
        return replacement

    with patched(RewriteRule, try_rewrite=try_rewrite):
        yield


@contextlib.contextmanager
def graphs_forgotten() -> Iterator[None]:
    """A block after which no rule refers to a graph that it was tried on.

    The rules are global, and each one keeps the last graph that it was tried on until the next
    export, with all weights of the model.
    """
    from onnxscript.rewriter._matcher import SimplePatternMatcher
    from onnxscript.rewriter._rewrite_rule import RewriteRule

    rewrite = RewriteRule.try_rewrite
    matchers: set[SimplePatternMatcher] = set()

    def try_rewrite(
        self: RewriteRule, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any
    ) -> object:
        if isinstance(self._matcher, SimplePatternMatcher):
            matchers.add(self._matcher)
        return rewrite(self, model, graph, node, **options)

    try:
        with patched(RewriteRule, try_rewrite=try_rewrite):
            yield
    finally:
        for matcher in matchers:
            for name in ("_graph", "_match", "_current_node"):
                vars(matcher)[name] = None


@contextlib.contextmanager
def matched_by_operator() -> Iterator[None]:
    """A block in which a rule is tried only on nodes with its operator.

    The exporter tries every rule at every node, and a rule of several outputs tries every node of
    the graph as the second one, though both read one value: most of what a deep model costs.
    """
    from onnxscript.rewriter._matcher import SimplePatternMatcher
    from onnxscript.rewriter._pattern_ir import Var
    from onnxscript.rewriter._rewrite_rule import RewriteRule

    rewrite = RewriteRule.try_rewrite
    match = SimplePatternMatcher.match
    position: dict[ir.Node, int] = {}

    def rewrite_own_operator(
        self: RewriteRule, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any
    ) -> object:
        first = self._matcher.pattern.output_nodes[0]
        if not first.op.matches(node.op_type):
            return None
        return rewrite(self, model, graph, node, **options)

    def match_readers(
        self: SimplePatternMatcher, model: ir.Model, graph: Any, node: ir.Node, **options: Any
    ) -> object:
        shared = _shared_operand(self.pattern.output_nodes, node, Var)
        if shared is not None:
            readers = {use.node for use in shared.uses() if use.node.graph is node.graph}
            if not readers <= position.keys():
                position.update((other, i) for i, other in enumerate(node.graph or ()))
            graph = _SomeNodes(sorted(readers, key=position.__getitem__), node.graph)
        return match(self, model, graph, node, **options)

    with (
        patched(RewriteRule, try_rewrite=rewrite_own_operator),
        patched(SimplePatternMatcher, match=match_readers),
    ):
        yield


def _shared_operand(output_nodes: Sequence[Any], node: ir.Node, variable: type) -> ir.Value | None:
    """Return the operand that the node, as first output of a pattern, shares with the others.

    None too where the pattern has one output node, or where the operand is left out.

    Args:
        output_nodes: Those of the pattern.
        node: A node that may be the first one.
        variable: onnxscript's class of operands that stand for any value.
    """
    first, *others = output_nodes
    if not others:
        return None
    for operand, value in zip(first.inputs, node.inputs, strict=False):
        if isinstance(operand, variable) and all(operand in other.inputs for other in others):
            return value
    return None


@dataclass(frozen=True)
class _SomeNodes:
    """Some nodes of a graph, in order."""

    nodes: Sequence[ir.Node]
    graph: ir.Graph | None

    def __iter__(self) -> Iterator[ir.Node]:
        return iter(self.nodes)


def inferred_once() -> contextlib.AbstractContextManager[None]:
    """A block in which shapes are inferred only once for nodes with the same inputs.

    onnx infers them in C++, after node and types were written as protobufs: half of what folding
    constants costs.
    """
    from onnxscript.optimizer._constant_folding import FoldConstantsPass

    inferred: dict[Hashable, Types] = {}
    infer = FoldConstantsPass._do_inference

    def infer_once(self: FoldConstantsPass, node: ir.Node) -> None:
        key = _reading(node)
        if key in inferred:
            give_types(inferred[key], node.outputs)
        else:
            infer(self, node)
            inferred[key] = types_of(node.outputs)

    return patched(FoldConstantsPass, _do_inference=infer_once)


def _reading(node: ir.Node) -> Hashable:
    """Return the operator of a node and its inputs; equal results have equal inferred types."""
    values = (*node.inputs, *node.outputs)
    order = {value: i for i, value in enumerate(dict.fromkeys(values))}
    attributes = tuple(
        (attribute.name, described(attribute.value, order))
        for attribute in node.attributes.values()
    )
    return node.domain, node.op_type, attributes, described(values, order)
