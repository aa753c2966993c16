"""Files whose sigmoids are a step off: what the precision of a kernel makes of their outputs.

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
from lora_fx.onnx.graph.flow import dtype_name
from lora_fx.onnx.graph.graph import OnnxEmitter, OnnxGraph, add_initialiser
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
    """A file with a step behind every sigmoid; None where it has none.

    Args:
        path: The file.
        provider: As in open_session.
        seed: Of the signs of the steps, element by element; None for a step up everywhere.
        stored: Arrays in the place of the file's initialisers.
    """
    graph = OnnxGraph(load(path))
    nodes = [node for node in graph.model.graph.all_nodes() if node.op_type in SIGMOIDS]
    if not nodes:
        return None
    for name, array in stored.items():
        graph.model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    for number, node in enumerate(nodes):
        for y in node.outputs:
            if dtype_name(y) == "float32" and (y.uses() or y.is_graph_output()):
                _put(graph, node, y, None if seed is None else 1000.0 * seed + number)
    with scratch_folder() as folder:
        other = Path(folder) / "steps.onnx"
        save(graph.model, other)
        return open_session(other, provider)


def _put(graph: OnnxGraph, node: ir.Node, y: ir.Value, seed: float | None) -> None:
    """Let everything read y + step in the place of y."""
    uses = tuple(y.uses())
    e = OnnxEmitter(graph, node, MARK, before=False)
    inner = graph.model.graph
    step = inner.initializers.get(MARK)
    if step is None:
        step = add_initialiser(inner, MARK, np.array(SIGMOID_STEP, np.float32), MARK)
    if seed is not None:
        drawn = e.call("RandomUniformLike", y, low=-1.0, high=1.0, seed=seed)
        step = e.call("Mul", e.call("Sign", drawn), step)
    if node.op_type in TIMES_INPUT:
        step = e.call("Mul", node.inputs[0], step)
    moved = e.call("Add", y, step)
    moved.type, moved.shape = y.type, y.shape
    for use in uses:
        use.node.replace_input_with(use.idx, moved)
    outputs = node.graph.outputs if node.graph is not None else []
    for i, output in enumerate(outputs):
        if output is y:
            moved.name, y.name = y.name, graph.fresh(f"{y.name}_exact")
            outputs[i] = moved
