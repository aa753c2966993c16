"""Find discrete choices of a graph, and make a file that can repeat the choices of another run.

A choice is a value of integers or booleans that a node computes from floats: the indices of TopK,
ArgMax or NonMaxSuppression, a comparison, a cast. Among near-equal scores rounding alone turns it,
and then all that is gathered by it differs, in a graph that is right. So that two runs can be
compared all the same, each choice y becomes

    y' = If(NAME.taken, NAME.chosen, y)

with two new inputs, and any of them can come from outside. The choices that the graph itself makes,
and the floats that it makes them among, become outputs.
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

CHOSEN = ".chosen"
"""The end of the name of the input that brings a choice."""
TAKEN = ".taken"
"""The end of the name of the input that says whether the choice is the one that is brought."""
SIZES = {"Shape", "Size"}
"""Ops that make integers of floats, of which they read no number."""
ROUNDS = 64
"""Times that a file is run for choices which depend on choices."""


def choices_of(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """Choice → the floats that it is made among, in the graph's order, without nested graphs."""
    choices: dict[str, tuple[str, ...]] = {}
    for node in model.graph:
        floats = [value for value in node.inputs if value is not None and _is_computed_float(value)]
        if not floats or node.op_type in SIZES:
            continue
        for output in node.outputs:
            if _is_discrete(output):
                choices[str(output.name)] = tuple(str(value.name) for value in floats)
    return choices


def _is_computed_float(value: ir.Value) -> bool:
    node = value.producer()
    if node is None or node.op_type == "Constant":
        return False
    return value.dtype is not None and value.dtype.is_floating_point()


def _is_discrete(value: ir.Value) -> bool:
    return value.dtype is not None and (value.dtype.is_integer() or value.dtype == ir.DataType.BOOL)


def let_choose(model: ir.Model, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Edit a model: its choices can come from outside, and they and their floats are outputs."""
    values: dict[str, ir.Value] = {}
    for node in model.graph:
        for value in node.outputs:
            values[str(value.name)] = value

    output_names = {value.name for value in model.graph.outputs}
    for choice, floats in choices.items():
        for name in (choice, *floats):
            if name not in output_names:
                output_names.add(name)
                model.graph.outputs.append(values[name])

    for choice in choices:
        _choose_outside(model.graph, values[choice])


def _choose_outside(graph: ir.Graph, value: ir.Value) -> None:
    """Let readers of a value read an If that gives the value, or an input in its place."""
    node = value.producer()
    assert node is not None
    uses = tuple(value.uses())  # before the If reads it, too
    shape = value.shape and ir.Shape([None] * len(value.shape))

    chosen = ir.Value(name=f"{value.name}{CHOSEN}", type=value.type, shape=shape)
    from_outside = ir.Value(
        name=f"{value.name}{TAKEN}", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([])
    )
    graph.inputs.extend([from_outside, chosen])

    then_branch = _branch(f"{value.name}.then_branch", chosen)
    else_branch = _branch(f"{value.name}.else_branch", value)
    branches = [
        ir.AttrGraph("then_branch", then_branch),
        ir.AttrGraph("else_branch", else_branch),
    ]
    result = ir.Value(name=f"{value.name}.here", type=value.type, shape=shape)
    graph.insert_after(node, ir.Node("", "If", [from_outside], branches, outputs=[result]))
    for use in uses:
        use.node.replace_input_with(use.idx, result)


def _branch(name: str, source: ir.Value) -> ir.Graph:
    """A branch of an If that gives a value from outside."""
    result = ir.Value(name=name, type=source.type, shape=source.shape)
    node = ir.Node("", "Identity", [source], outputs=[result])
    return ir.Graph([], [result], nodes=[node], name=name)


@dataclass(eq=False)
class ChoosingFile:
    """A file that makes its own choices, or repeats those of another run; see `choosing_file`.

    Attributes:
        session: The graph of let_choose.
        choices: Choice → the floats that it is among.
        inner: The outputs of the graph that are none of the file.
        zeros: Choice → the array that its input takes where the file makes the choice itself.
        shared_choices: Choice → the same one of another run, since `follow`.
        floats: Float of another run, which its choices are among → the same one of the file.
    """

    session: RuntimeSession
    choices: Mapping[str, tuple[str, ...]]
    inner: frozenset[str]
    zeros: Named
    shared_choices: dict[str, str] = field(default_factory=dict)
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
        """Learn which choices match another run, by the floats that they are made from.

        A choice that was turned moves the floats of later choices. So the file runs with the
        choices that it is known to share until no more of them are found.
        """
        for _ in range(ROUNDS):
            outputs = self.run(feeds, self.chosen(others))
            shared: dict[str, str] = {}
            choices: dict[str, Choice] = {}
            for name, among in self.choices.items():
                choice = Choice(outputs[name], {key: outputs[key] for key in among})
                nearest = nearest_choice(choice, others)
                if nearest:
                    choices[name] = choice
                    shared[name] = nearest
            if shared == self.shared_choices:
                return

            self.shared_choices = shared
            for name, nearest in shared.items():
                self.floats |= choices[name].pairs(others[nearest])

    def outputs(self, results: Named) -> dict[str, Array]:
        """The outputs of the original file among all outputs of a run."""
        return {name: value for name, value in results.items() if name not in self.inner}

    def chosen(self, others: Mapping[str, Choice]) -> dict[str, Array]:
        """The choices that others make, by their names in the file."""
        chosen: dict[str, Array] = {}
        for name, other in self.shared_choices.items():
            chosen[name] = _with_image_and_class(others[other].value, self.zeros[name].ndim)
        return chosen


def _with_image_and_class(value: Array, ndim: int) -> Array:
    """A choice as the file has it: boxes with their image and class before them, both the first."""
    if ndim == value.ndim + 1:
        return np.stack([np.zeros_like(value), np.zeros_like(value), value], axis=1)
    return value


def choosing_file(path: Path, provider: str, stored: Named) -> ChoosingFile | None:
    """The file that can repeat the choices of another run; None if it makes no choice.

    Args:
        path: The file.
        provider: As in open_session.
        stored: Arrays in the place of the file's initialisers.
    """
    model = OnnxGraph(load(path)).model
    output_names = {value.name for value in model.graph.outputs}
    choices = choices_of(model)
    if not choices:
        return None
    for name, array in stored.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)

    let_choose(model, choices)
    inner = frozenset(
        str(value.name) for value in model.graph.outputs if value.name not in output_names
    )
    zeros: dict[str, Array] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if name.endswith(CHOSEN) and value.dtype is not None:
            empty = (0,) * len(value.shape or ())
            zeros[name.removesuffix(CHOSEN)] = np.zeros(empty, value.dtype.numpy())

    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "choosing.onnx"
        save(model, saved)
        return ChoosingFile(open_session(saved, provider), choices, inner, zeros)
