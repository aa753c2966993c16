"""Files that make the choices of another run: what a comparison of near-equal numbers decides.

A choice is a value of integers or booleans that a node computes from floats: the indices of TopK,
ArgMax or NonMaxSuppression, a comparison, a cast. Rounding alone turns it among near-equal scores,
and what is gathered by it are other numbers. In the graph that is made here each one is

    y' = If(NAME.taken, NAME.chosen, y)

so that any of them can come from outside. The graph gives its own, and the floats that they are
among, as outputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_fx.compare import Choice, nearest_choice
from lora_fx.dtypes import Array
from lora_fx.inputs import Named
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.save import save
from lora_fx.onnx.session import RuntimeSession, open_session

CHOSEN, TAKEN = ".chosen", ".taken"
"""What the inputs for a choice have after its name: the choice, and whether it is that."""
SIZES = {"Shape", "Size"}
"""Ops that make integers of floats, of which they read no number."""
ROUNDS = 64
"""Times that a file is run for choices which depend on choices."""


def choices_of(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """The choices of a graph, in their order; those of nested graphs are left out."""
    found: dict[str, tuple[str, ...]] = {}
    for node in model.graph:
        among = tuple(str(v.name) for v in node.inputs if v is not None and _is_computed_float(v))
        if node.op_type in SIZES or not among:
            continue
        found |= {str(v.name): among for v in node.outputs if _is_discrete(v)}
    return found


def _is_computed_float(value: ir.Value) -> bool:
    node = value.producer()
    computed = node is not None and node.op_type != "Constant"
    return computed and value.dtype is not None and value.dtype.is_floating_point()


def _is_discrete(value: ir.Value) -> bool:
    return value.dtype is not None and (value.dtype.is_integer() or value.dtype == ir.DataType.BOOL)


def let_choose(model: ir.Model, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Let choices come from outside, and give the graph's own and what they are among; edits it."""
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    outputs = {v.name for v in model.graph.outputs}
    shown = dict.fromkeys(n for name, among in choices.items() for n in (name, *among))
    model.graph.outputs.extend(values[n] for n in shown if n not in outputs)
    for name in choices:
        _let_choose(model.graph, values[name])


def _let_choose(graph: ir.Graph, value: ir.Value) -> None:
    uses = tuple(value.uses())
    node = value.producer()
    assert node is not None
    shape = value.shape and ir.Shape([None] * len(value.shape))
    chosen = ir.Value(name=f"{value.name}{CHOSEN}", type=value.type, shape=shape)
    taken = ir.Value(
        name=f"{value.name}{TAKEN}", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([])
    )
    graph.inputs.extend([taken, chosen])
    branches = [
        ir.AttrGraph(branch, _of_one(f"{value.name}.{branch}", source))
        for branch, source in (("then_branch", chosen), ("else_branch", value))
    ]
    result = ir.Value(name=f"{value.name}.here", type=value.type, shape=shape)
    graph.insert_after(node, ir.Node("", "If", [taken], branches, outputs=[result]))
    for use in uses:
        use.node.replace_input_with(use.idx, result)


def _of_one(name: str, source: ir.Value) -> ir.Graph:
    """A branch that gives a value from outside."""
    result = ir.Value(name=name, type=source.type, shape=source.shape)
    node = ir.Node("", "Identity", [source], outputs=[result])
    return ir.Graph([], [result], nodes=[node], name=name)


@dataclass(eq=False)
class ChoosingFile:
    """A file that makes any of its choices, or those of another run; made by `choosing_file`.

    Attributes:
        session: The graph of let_choose.
        choices: Choice → the floats that it is among.
        inner: The outputs of the graph that are none of the file.
        zeros: Choice → what its input takes where it is not asked for.
        same: Choice → that of another run, since `follow`.
        floats: Float of another run, which its choices are among → that of the file.
    """

    session: RuntimeSession
    choices: Mapping[str, tuple[str, ...]]
    inner: frozenset[str]
    zeros: Named
    same: dict[str, str] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)

    def run(self, feeds: Named, chosen: Named | None = None) -> dict[str, Array]:
        """Every output of the graph.

        Args:
            feeds: The inputs of the file.
            chosen: Choices by their names in the file; it makes its own of the others.
        """
        chosen = chosen or {}
        inputs: dict[str, Array] = {}
        for name, zero in self.zeros.items():
            inputs[f"{name}{TAKEN}"] = np.array(name in chosen)
            inputs[f"{name}{CHOSEN}"] = chosen.get(name, zero).astype(zero.dtype)
        return self.session.run({**feeds, **inputs})

    def follow(self, feeds: Named, others: Mapping[str, Choice]) -> None:
        """Learn which choices are those of another run, by the floats that they are made among.

        One that was turned moves the floats of later ones. So the file runs with the choices that
        it is known to share until no more of them are found.
        """
        for _ in range(ROUNDS):
            made = self.run(feeds, self.chosen(others))
            found = {name: self._choice(name, made) for name in self.choices}
            nearest = {name: nearest_choice(choice, others) for name, choice in found.items()}
            same = {name: other for name, other in nearest.items() if other}
            if same == self.same:
                break
            self.same = same
            for name, other in same.items():
                self.floats |= found[name].pairs(others[other])

    def outputs(self, made: Named) -> dict[str, Array]:
        """Those of the file, of all that a run made."""
        return {name: value for name, value in made.items() if name not in self.inner}

    def chosen(self, others: Mapping[str, Choice]) -> dict[str, Array]:
        """The choices that others make, by their names in the file."""
        values = {name: others[other].value for name, other in self.same.items()}
        return {name: _listed(value, self.zeros[name].ndim) for name, value in values.items()}

    def _choice(self, name: str, made: Named) -> Choice:
        return Choice(made[name], {n: made[n] for n in self.choices[name]})


def _listed(value: Array, ndim: int) -> Array:
    """A choice as the file has it: boxes with their image and class before them, both the first."""
    if ndim == value.ndim + 1:
        return np.stack([np.zeros_like(value), np.zeros_like(value), value], axis=1)
    return value


def choosing_file(path: Path, provider: str, stored: Named) -> ChoosingFile | None:
    """A file that makes the choices of another run; None where it makes none.

    Args:
        path: The file.
        provider: As in open_session.
        stored: Arrays in the place of the file's initialisers.
    """
    model = OnnxGraph(load(path)).model
    outputs = {v.name for v in model.graph.outputs}
    choices = choices_of(model)
    if not choices:
        return None
    for name, array in stored.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    let_choose(model, choices)
    inner = frozenset(str(v.name) for v in model.graph.outputs if v.name not in outputs)
    zeros = {
        str(x.name).removesuffix(CHOSEN): np.zeros((0,) * len(x.shape or ()), x.dtype.numpy())
        for x in model.graph.inputs
        if str(x.name).endswith(CHOSEN) and x.dtype is not None
    }
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "choosing.onnx"
        save(model, saved)
        return ChoosingFile(open_session(saved, provider), choices, inner, zeros)
