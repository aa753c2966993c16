"""Files whose sigmoids are one step off, to measure how a kernel's precision moves the outputs.

ONNX Runtime's sigmoid is exact to 2^-24 however small its result is. That is much of a result of
1e-6, and nothing of one that is multiplied, normed and summed further on. So a step is added behind
every sigmoid of a file, and the outputs tell how far it moves them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_fx.compare import SIGMOID_STEP
from lora_fx.files.run_files import scratch_folder
from lora_fx.inputs import Named
from lora_fx.onnx.graph.emitter import OnnxEmitter, add_initialiser
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.values import dtype_name
from lora_fx.onnx.load import load
from lora_fx.onnx.save import save
from lora_fx.onnx.session import RuntimeSession, open_session

MARK = "sigmoid_step"
TIMES_INPUT = ("Swish", "QuickGelu")
"""Ops whose result is their input times a sigmoid."""
SIGMOIDS = ("Sigmoid", "LSTM", "GRU", *TIMES_INPUT)
"""Ops whose kernels compute one."""


def stepped_file(
    path: Path, provider: str, seed: int | None, stored: Named
) -> RuntimeSession | None:
    """A session of a file with a step behind every sigmoid; None where it has none.

    Args:
        path: The file.
        provider: As in open_session.
        seed: The seed of the steps' signs, element by element; None for a step up everywhere.
        stored: Arrays in the place of the file's initialisers.
    """
    graph = OnnxGraph(load(path))
    nodes = [node for node in graph.model.graph.all_nodes() if node.op_type in SIGMOIDS]
    if not nodes:
        return None
    for name, array in stored.items():
        graph.model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    for number, node in enumerate(nodes):
        node_seed = None if seed is None else 1000.0 * seed + number
        for value in node.outputs:
            if dtype_name(value) == "float32" and (value.uses() or value.is_graph_output()):
                _add_step(graph, node, value, node_seed)
    with scratch_folder() as folder:
        stepped = Path(folder) / "steps.onnx"
        save(graph.model, stepped)
        return open_session(stepped, provider)


def _add_step(graph: OnnxGraph, node: ir.Node, y: ir.Value, seed: float | None) -> None:
    """Let everything that reads y read y + step.

    Args:
        graph: The graph, edited in place.
        node: The node that makes y.
        y: A result of it.
        seed: The seed of the step's signs; None for a step up.
    """
    uses = tuple(y.uses())
    emitter = OnnxEmitter(graph, node, MARK, before=False)
    owner = graph.model.graph
    step = owner.initializers.get(MARK)
    if step is None:
        step = add_initialiser(owner, MARK, np.array(SIGMOID_STEP, np.float32), MARK)
    if seed is not None:
        drawn = emitter.call("RandomUniformLike", y, low=-1.0, high=1.0, seed=seed)
        step = emitter.call("Mul", emitter.call("Sign", drawn), step)
    if node.op_type in TIMES_INPUT:
        step = emitter.call("Mul", node.inputs[0], step)
    moved = emitter.call("Add", y, step)
    moved.type = y.type
    moved.shape = y.shape

    for use in uses:
        use.node.replace_input_with(use.idx, moved)
    outputs = node.graph.outputs if node.graph is not None else []
    for number, output in enumerate(outputs):
        if output is y:
            exact_name = graph.fresh(f"{y.name}_exact")
            moved.name = y.name
            y.name = exact_name
            outputs[number] = moved
