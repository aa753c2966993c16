"""One model and two adapters in OpenVINO: A and B are inputs, so they are swapped between two runs.

`python openvino_switch.py X.onnx de.safetensors fr.safetensors INPUTS.npz OUTPUTS.npz` runs the
base and each adapter on the arrays of INPUTS.npz, and writes what comes out. It needs
`pip install numpy safetensors openvino`, and a file that was exported with
`lora-fx export MODEL ./de ./fr -o X.onnx --mode switch --target portable`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino as ov
from safetensors.numpy import load_file

RANK_OF_BASE = 1  # zeros of any rank change nothing


class SwitchModel:
    """A compiled model whose adapter can change before every run."""

    def __init__(self, path: str | Path) -> None:
        # Unasked, processors with bfloat16 compute in it, with three significant digits.
        hints = {"INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = ov.Core().compile_model(path, "CPU", hints)
        self.request = self.compiled.create_infer_request()
        self.factors = {}
        for port in self.compiled.inputs:
            if port.any_name.endswith((".lora_A", ".lora_B")):
                self.factors[port.any_name] = port.partial_shape
        self.use({})

    def use(self, adapter: dict[str, np.ndarray]) -> None:
        """Choose the adapter of the runs that follow; {} is the base model.

        Nothing is copied: a run reads the arrays where they lie.
        """
        self.adapter = adapter  # the request holds no reference, and would read freed memory
        for name, shape in self.factors.items():
            if name not in adapter:  # the adapter leaves this weight as it is
                sizes = [RANK_OF_BASE if size.is_dynamic else size.get_length() for size in shape]
                self.request.set_tensor(name, ov.Tensor(np.zeros(sizes, np.float32)))
        for name, array in adapter.items():
            self.request.set_tensor(name, ov.Tensor(array, shared_memory=True))

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; arrays by output name."""
        for name, array in inputs.items():
            self.request.set_tensor(name, ov.Tensor(array))
        self.request.infer()
        return {
            port.any_name: self.request.get_tensor(port).data.copy()
            for port in self.compiled.outputs
        }


def main(model: str, *paths: str) -> None:
    """Run the base and each adapter, with one compilation."""
    *adapters, inputs_path, outputs_path = paths
    switch = SwitchModel(model)
    inputs = dict(np.load(inputs_path))
    outputs = {f"base/{name}": array for name, array in switch.run(inputs).items()}
    for path in adapters:
        switch.use(load_file(path))
        for name, array in switch.run(inputs).items():
            outputs[f"{Path(path).stem}/{name}"] = array
    np.savez(outputs_path, **outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
