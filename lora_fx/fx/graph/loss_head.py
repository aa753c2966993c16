"""The output head whose scores only a cross entropy reads, found backwards from the loss.

    x [..., n] → scores → casts, scales, a softcap → [rows, classes] → cross entropy

Every value between is of rows that know nothing of each other, so the loss of some rows needs
their x and no other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.attention import is_full_slice
from lora_fx.fx.graph.in_place import Writes
from lora_fx.fx.graph.nodes import argument, aten_ops, block_of, is_marked, shape_of

aten = torch.ops.aten
LEAST_CLASSES = 4096
"""Fewer classes are no vocabulary: their scores are nothing beside what made them."""
SAME_ROWS = aten_ops("view reshape _unsafe_view flatten.using_ints contiguous clone alias")
"""Ops that leave the rows and their order as they are where the last axis stays."""
BY_ELEMENT = aten_ops(
    "to.dtype _to_copy neg tanh sigmoid relu clamp mul.Scalar div.Scalar add.Scalar sub.Scalar "
    "mul.Tensor div.Tensor add.Tensor sub.Tensor"
)
"""Ops whose every element is made of the elements at its place."""
PRODUCTS: dict[object, int] = {aten.linear.default: 0, aten.matmul.default: 0, aten.mm.default: 0,
            aten.addmm.default: 1}  # fmt: skip
"""Products of rows with a matrix → where the rows stand among its arguments."""
_COPIES = aten_ops("contiguous clone alias")


@dataclass(frozen=True)
class LossHead:
    """A head, and the loss that is the only reader of its scores.

    Attributes:
        loss: The cross entropy.
        steps: The nodes of scores, in the order of the graph; the last is what the loss reads.
        inputs: What rows are made of: the last hidden state, and what a branch made of it.
        operands: What is the same for all rows.
        cuts: The arguments of slices that leave out rows: (dimension, start, end, step).
        classes: Scores of a row.
    """

    loss: fx.Node
    steps: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    cuts: tuple[tuple[Any, ...], ...]
    classes: int


def loss_heads(graph: fx.Graph, blocks: Sequence[str] = ()) -> list[LossHead]:
    """Return the heads of a graph that are not parts of one of these blocks."""
    losses = list(graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default))
    if not losses:
        return []
    written = Writes(graph).ever()
    of_inputs = _made_of_inputs(graph)
    heads = [_head(loss, written, of_inputs, blocks) for loss in losses]
    return [head for head in heads if head is not None]


def _made_of_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on the inputs of the graph."""
    nodes: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(operand in nodes for operand in node.all_input_nodes):
            nodes.add(node)
    return nodes


def _head(
    loss: fx.Node,
    written: Collection[fx.Node],
    of_inputs: Collection[fx.Node],
    blocks: Sequence[str],
) -> LossHead | None:
    """Return the head of a loss; None if its scores have other readers or come from other ops."""
    scores: fx.Node = loss.args[0]  # type: ignore[assignment]
    shape = shape_of(scores) or ()
    if len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < LEAST_CLASSES:
        return None
    if argument(loss, "weight") is not None or argument(loss, "reduction") not in (1, 2):
        return None
    walk = _Walk(shape[1], of_inputs)
    queue = [scores]
    while queue:
        node = queue.pop()
        if node in walk.steps:
            continue
        if node in written or block_of(node, blocks) != block_of(loss, blocks):
            return None
        wide_operands = walk.step(node)
        if wide_operands is None:
            return None
        walk.steps.add(node)
        queue += wide_operands

    readers = {user for step in walk.steps for user in step.users}
    if not walk.inputs or not readers <= walk.steps | {loss}:
        return None
    ordered = tuple(node for node in loss.graph.nodes if node in walk.steps)
    cuts = tuple(reversed(walk.cuts))
    return LossHead(loss, ordered, tuple(walk.inputs), tuple(walk.operands), cuts, shape[1])


@dataclass
class _Walk:
    """A walk from the scores back to what rows are made of.

    Attributes:
        classes: Scores of a row.
        of_inputs: The nodes of the graph that depend on its inputs.
    """

    classes: int
    of_inputs: Collection[fx.Node]
    steps: set[fx.Node] = field(default_factory=set)
    inputs: dict[fx.Node, None] = field(default_factory=dict)
    operands: dict[fx.Node, None] = field(default_factory=dict)
    cuts: list[tuple[Any, ...]] = field(default_factory=list)
    has_parts: bool = False
    """Whether a value so far was made of two others, which a cut would have to be alike for."""

    def step(self, node: fx.Node) -> list[fx.Node] | None:
        """Return the scores that a node computes its scores from; None if it mixes rows."""
        if node.op != "call_function" or not self._is_wide(node):
            return None
        if node.target in SAME_ROWS or is_full_slice(node):
            if self.cuts and not is_full_slice(node) and node.target not in _COPIES:
                return None  # the rows of a cut are those of the axes that it had
            return self._wide(node.args[0])
        if node.target is aten.slice.Tensor:
            return self._cut(node)
        if node.target in BY_ELEMENT:
            return self._by_element(node)
        if node.target in PRODUCTS:
            return self._product(node)
        return None

    def _is_wide(self, node: fx.Node) -> bool:
        """Whether a value holds scores of rows; values of a branch have no shape in the graph."""
        shape = shape_of(node)
        if shape is None:
            return is_marked(node)
        return len(shape) > 1 and shape[-1] == self.classes and node in self.of_inputs

    def _wide(self, operand: object) -> list[fx.Node] | None:
        if isinstance(operand, fx.Node) and self._is_wide(operand):
            return [operand]
        return None

    def _cut(self, node: fx.Node) -> list[fx.Node] | None:
        """Take a step through a slice that leaves out rows."""
        dim = argument(node, "dim")
        rank = len(shape_of(node) or ())
        if self.has_parts or dim % rank == rank - 1:
            return None
        self.cuts.append((dim % rank, *(argument(node, n) for n in ("start", "end", "step"))))
        return self._wide(node.args[0])

    def _by_element(self, node: fx.Node) -> list[fx.Node] | None:
        """Take a step through an elementwise op on scores and on what all rows share."""
        wide: list[fx.Node] = []
        for operand in node.all_input_nodes:
            if operand in self.of_inputs:
                wide.append(operand)
                continue
            shape = shape_of(operand)
            if shape is None or len(shape) > 2 or (len(shape) == 2 and shape[0] != 1):
                return None
            self.operands[operand] = None
        if not wide or not all(map(self._is_wide, wide)):
            return None
        self.has_parts |= len(wide) > 1
        return wide

    def _product(self, node: fx.Node) -> list[fx.Node] | None:
        """Take the last step: a product of rows with a matrix, which makes the scores."""
        place = PRODUCTS[node.target]
        rows = node.args[place]
        if node.kwargs or not isinstance(rows, fx.Node) or rows not in self.of_inputs:
            return None
        if not is_marked(rows) and len(shape_of(rows) or ()) < 2:
            return None
        for operand in node.all_input_nodes:
            if operand is rows:
                continue
            shape = shape_of(operand)
            is_of_branch = shape is None and is_marked(operand)
            if not is_of_branch and len(shape or (0, 0, 0)) > 2:
                return None
            self.operands[operand] = None
        self.inputs[rows] = None
        return []
