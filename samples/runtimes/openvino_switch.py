"""One model and two adapters in OpenVINO: A and B are inputs, so they are swapped between two runs.

`python openvino_switch.py X.onnx INPUTS.npz OUTPUTS.npz X.base.safetensors de.safetensors …` runs
each adapter on the arrays of INPUTS.npz, and writes what comes out as `NAME/OUTPUT`. It needs
`pip install numpy safetensors openvino`, and files that were exported with
`lora-fx export MODEL ./de ./fr -o X.onnx --mode switch --target portable`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino as ov
from safetensors.numpy import load_file

Arrays = dict[str, np.ndarray]
Adapter = list[tuple[ov.Output, ov.Tensor]]
"""The tensors of a NAME.safetensors, each with the input that it is for."""


class SwitchModel:
    """A compiled model whose adapter can change before every run."""

    def __init__(self, path: str | Path) -> None:
        # Unasked, processors with bfloat16 compute in it, with three significant digits.
        hints = {"INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = ov.Core().compile_model(path, "CPU", hints)
        self.request = self.compiled.create_infer_request()
        self.ports = {port.any_name: port for port in self.compiled.inputs}

    def load(self, path: str | Path) -> Adapter:
        """Read an adapter, once; any number of them may be in memory."""
        arrays = load_file(path)
        return [
            (self.ports[name], ov.Tensor(array, shared_memory=True))
            for name, array in arrays.items()
        ]

    def use(self, adapter: Adapter) -> None:
        """Choose the adapter of the runs that follow; nothing is copied."""
        self.adapter = adapter  # the request holds no reference, and would read freed memory
        for port, tensor in adapter:
            self.request.set_tensor(port, tensor)

    def run(self, inputs: Arrays) -> Arrays:
        """Run once; arrays by output name."""
        for name, array in inputs.items():
            self.request.set_tensor(name, ov.Tensor(array))
        self.request.infer()
        return {
            port.any_name: self.request.get_tensor(port).data.copy()
            for port in self.compiled.outputs
        }


def main(model: str, inputs_path: str, outputs_path: str, *adapters: str) -> None:
    """Run each adapter, with one compilation."""
    switch = SwitchModel(model)
    inputs = dict(np.load(inputs_path))
    outputs = {}
    for path in adapters:
        switch.use(switch.load(path))
        for name, array in switch.run(inputs).items():
            outputs[f"{Path(path).stem}/{name}"] = array
    np.savez(outputs_path, **outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
