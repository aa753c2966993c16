"""Runs for CUDA graphs: inputs, outputs and adapters at addresses that stay, one graph a shape.

A run of new shapes allocates its outputs, and is not captured. The same inputs and outputs are
bound from then on, under a number of their own (`gpu_graph_id`): the runtime captures the next run
and replays it later. On a provider without graphs the same buffers compute the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line, retold
from lora_fx.onnx.adapter_buffers import AdapterBuffers
from lora_fx.onnx.feeds import ort_values
from lora_fx.text import Json

if TYPE_CHECKING:
    import onnxruntime as ort

GRAPH_ID = "gpu_graph_id"
"""The entry of a run's options that says which graph it is."""
UNCAPTURED = "-1"

Shapes = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass(frozen=True)
class BoundShape:
    """The values of one shape of the inputs, and the binding that has them.

    Attributes:
        inputs: By input name, as OrtValues.
        outputs: In the order of the graph, as OrtValues.
        binding: It binds these, and the buffers of the adapter.
        options: The options of a run, which say which graph it is.
    """

    inputs: Json
    outputs: Sequence[ort.OrtValue]
    binding: ort.IOBinding
    options: ort.RunOptions


class GraphRuns:
    """The runs of one session; one thread is in a run at a time, because all share the buffers.

    Args:
        session: On CUDA with `enable_cuda_graph`, or on the CPU.
        buffers: The adapter's A and B.
        device: Where inputs and outputs are bound: cpu or cuda.

    Attributes:
        shapes: What was bound, by the shapes of the inputs.
    """

    def __init__(self, session: ort.InferenceSession, buffers: AdapterBuffers, device: str) -> None:
        self.session = session
        self.buffers = buffers
        self.device = device
        self.shapes: dict[Shapes, BoundShape] = {}
        self._outputs = [node.name for node in session.get_outputs()]
        self._one_thread = threading.Lock()

    def run(self, arrays: Mapping[str, Array], tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and return arrays by output name.

        Args:
            arrays: By input name, contiguous.
            tensors: The adapter's A and B by name, or BASE.
        """
        with self._one_thread:
            self.buffers.write(tensors)
            if not all(array.size for array in arrays.values()):
                return self._copied(self._uncaptured(ort_values(arrays, self.device)).get_outputs())
            key = tuple(
                (name, array.shape, array.dtype.str) for name, array in sorted(arrays.items())
            )
            if key not in self.shapes:
                self.shapes[key] = self._bound(arrays)
            bound = self.shapes[key]
            for name, array in arrays.items():
                bound.inputs[name].update_inplace(array)
            self.session.run_with_iobinding(bound.binding, bound.options)
            return self._copied(bound.outputs)

    def _bound(self, arrays: Mapping[str, Array]) -> BoundShape:
        """Bind inputs and outputs of new shapes, after a run that makes the outputs."""
        # copies: a value on the CPU is the array itself, which is the caller's
        inputs = ort_values({name: array.copy() for name, array in arrays.items()}, self.device)
        binding = self._uncaptured(inputs)
        outputs = binding.get_outputs()
        for name, value in zip(self._outputs, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        # 0 is the runtime's own
        return BoundShape(inputs, outputs, binding, run_options(str(len(self.shapes) + 1)))

    def _uncaptured(self, inputs: Mapping[str, ort.OrtValue]) -> ort.IOBinding:
        """Run without a graph, and return the binding, which has the outputs."""
        binding = self.session.io_binding()
        for name, value in {**inputs, **self.buffers.values}.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self.device)
        self.session.run_with_iobinding(binding, run_options(UNCAPTURED))
        return binding

    def _copied(self, outputs: Sequence[ort.OrtValue]) -> dict[str, Array]:
        """Return outputs as arrays of their own: the next run writes over the values."""
        return {
            name: np.array(value.numpy())
            for name, value in zip(self._outputs, outputs, strict=True)
        }


def run_options(graph: str) -> ort.RunOptions:
    """Return the options of a run that is captured, or replayed, under a number."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, graph)
    return options


def refuse_uncapturable(path: str | PathLike[str]) -> None:
    """Raise, naming the first node, where no CUDA graph of a file can be captured.

    Raises:
        LoraFxError: There is such a node, or the file cannot be read.
    """
    import onnx_ir as ir

    from lora_fx.onnx.cuda_obstacles import cuda_obstacles
    from lora_fx.onnx.made_for import PROPERTY

    with retold(
        f"{fspath(path)}: cannot be read as an ONNX file", "pass the path of an .onnx file"
    ):
        model = ir.load(fspath(path))
    obstacles = cuda_obstacles(model)
    if not obstacles:
        return
    first = one_line(str(obstacles[0]), 200)
    others = f" (and {len(obstacles) - 1} more)" if len(obstacles) > 1 else ""
    hint = "make the session without cuda_graph"
    if model.metadata_props.get(PROPERTY) != "cuda":
        hint = f"export the model with --target cuda, or {hint}"
    raise LoraFxError(
        f"{fspath(path)}: no CUDA graph can be captured: {first}{others}",
        hint,
    )
