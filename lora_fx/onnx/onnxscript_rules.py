"""onnxscript's rules and its folding of constants: the facade of their private modules.

They run inside torch's exporter and inside our optimisation, and have no option for what is needed
here. So each function gives a block in which a part of them is replaced, and put back after it.
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
    """A block in which onnxscript's rules see a 0 or a 1 only where a constant is one.

    Unasked they compare to 1e-8 and to a share of 1e-5: `x / (norm + 1e-8)` would be `x / norm`,
    which is NaN for x = 0, and a factor of 1.000005 would be lost.
    """
    from onnxscript.rewriter import _matcher

    def isclose(a: float, b: float, **_: float) -> bool:
        # of others the rules give more digits than a file has
        return bool(a == b if b in (0, 1) else np.float32(a) == np.float32(b))

    return patched(_matcher, math=SimpleNamespace(isclose=isclose))


def norms_unfused() -> contextlib.AbstractContextManager[None]:
    """A block in which no rule multiplies a batch norm into the convolution before it."""
    from onnxscript import rewriter

    name = "_DEFAULT_REWRITE_RULES"
    if not hasattr(rewriter, name):
        return contextlib.nullcontext()
    rules = tuple(rule for rule in getattr(rewriter, name) if not _is_of_norms(rule))
    return patched(rewriter, **{name: rules})


def _is_of_norms(rule: object) -> bool:
    names = type(rule).__name__, str(getattr(rule, "name", ""))
    return any("batchnorm" in name.lower() for name in names)


def weights_unjoined(weights: Collection[str]) -> contextlib.AbstractContextManager[None]:
    """A block in which equal initialisers become one, but for weights of these names."""
    from onnx_ir.passes.common import initializer_deduplication as joining

    name = "_should_skip_initializer"
    skip = getattr(joining, name, None)
    if skip is None:
        return contextlib.nullcontext()
    return patched(joining, **{name: lambda v, *rest: v.name in weights or skip(v, *rest)})


@contextlib.contextmanager
def constants_apart() -> Iterator[None]:
    """A block in which no constant that a rule adds takes the place of another one.

    A rule names the bounds of a Clip by what is clipped. Where two of them clip one value, the
    second takes the first one's place, and what reads that reads nothing.
    """
    from onnxscript.rewriter._rewrite_rule import RewriteRule

    rewrite = RewriteRule.try_rewrite

    def apart(
        self: RewriteRule, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any
    ) -> object:
        replacement = rewrite(self, model, graph, node, **options)
        for constant in getattr(replacement, "new_initializers", ()):
            name = constant.name
            numbers = itertools.count(1)
            while constant.name in graph.initializers:
                constant.name = f"{name}.{next(numbers)}"
        return replacement

    with patched(RewriteRule, try_rewrite=apart):
        yield


@contextlib.contextmanager
def matched_by_operator() -> Iterator[None]:
    """A block in which a rule looks at nodes of its own operator only.

    The exporter tries every rule at every node, and a rule of several outputs tries every node of
    the graph as the second one, though both read one value: most of what a deep model costs.
    """
    from onnxscript.rewriter._matcher import SimplePatternMatcher
    from onnxscript.rewriter._pattern_ir import Var
    from onnxscript.rewriter._rewrite_rule import RewriteRule

    rewrite, match = RewriteRule.try_rewrite, SimplePatternMatcher.match
    places: dict[ir.Node, int] = {}

    def quick(
        self: RewriteRule, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any
    ) -> object:
        own = self._matcher.pattern.output_nodes[0].op.matches(node.op_type)
        return rewrite(self, model, graph, node, **options) if own else None

    def near(
        self: SimplePatternMatcher, model: ir.Model, graph: Any, node: ir.Node, **options: Any
    ) -> object:
        first, *others = self.pattern.output_nodes
        read = zip(first.inputs, node.inputs, strict=False) if others else ()
        shared = [v for p, v in read if isinstance(p, Var) and all(p in o.inputs for o in others)]
        if shared and shared[0] is not None:
            nodes = {use.node for use in shared[0].uses() if use.node.graph is node.graph}
            if not nodes <= places.keys():
                places.update((n, i) for i, n in enumerate(node.graph or ()))
            graph = _Few(sorted(nodes, key=places.__getitem__), node.graph)
        return match(self, model, graph, node, **options)

    with patched(RewriteRule, try_rewrite=quick), patched(SimplePatternMatcher, match=near):
        yield


@dataclass(frozen=True)
class _Few:
    """A few nodes of a graph, in its order."""

    nodes: Sequence[ir.Node]
    graph: ir.Graph | None

    def __iter__(self) -> Iterator[ir.Node]:
        return iter(self.nodes)


def inferred_once() -> contextlib.AbstractContextManager[None]:
    """A block in which shapes are inferred once for all nodes that read the same.

    onnx infers them in C++, after node and types were written as protobufs: half of what folding
    constants costs.
    """
    from onnxscript.optimizer._constant_folding import FoldConstantsPass

    known: dict[Hashable, Types] = {}
    infer = FoldConstantsPass._do_inference

    def inferred(self: FoldConstantsPass, node: ir.Node) -> None:
        values = (*node.inputs, *node.outputs)
        order = {v: i for i, v in enumerate(dict.fromkeys(values))}
        given = tuple((a.name, described(a.value, order)) for a in node.attributes.values())
        key = node.domain, node.op_type, given, described(values, order)
        if key in known:
            give_types(known[key], node.outputs)
        else:
            infer(self, node)
            known[key] = types_of(node.outputs)

    return patched(FoldConstantsPass, _do_inference=inferred)
