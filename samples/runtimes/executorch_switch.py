"""One model, two adapters, ExecuTorch: A and B are inputs, so an adapter is swapped between two runs.

`python executorch_switch.py X.pt2 X.pte de.safetensors fr.safetensors INPUTS.npz OUTPUTS.npz` lowers
X.pt2 to XNNPACK where X.pte does not exist yet, runs the base and each adapter on the arrays of
INPUTS.npz, and writes what comes out. It needs `pip install executorch torch numpy safetensors`,
and a file that was exported with `lora-fx export MODEL ./de ./fr -o X.pt2 --mode switch`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from safetensors.torch import load_file

FACTORS = ("lora_a", "lora_b")


def lower(path: str, lowered: str) -> None:
    """Lower an exported program to XNNPACK, with the names of its inputs as a second method."""
    program = torch.export.load(path)
    names = program.graph_signature.user_inputs
    zeros = {}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in names and node.name.endswith(FACTORS):
            # A free size is the rank. Zeros of any rank change nothing, but rank 0 gives wrong
            # numbers without an error.
            zeros[node.name] = [s if isinstance(s, int) else 1 for s in node.meta["val"].shape]

    # With either of these, a convolution's batch would have to be smaller than 16.
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            constant_methods={"names": json.dumps(names), "zeros": json.dumps(zeros)},
        )
        Path(lowered).write_bytes(edge.to_executorch().buffer)


class SwitchModel:
    """A loaded program whose adapter can change before every run."""

    def __init__(self, lowered: str) -> None:
        self.program = Runtime.get().load_program(lowered)
        self.forward = self.program.load_method("forward")
        self.names = json.loads(self.program.load_method("names").execute([])[0])
        zeros = json.loads(self.program.load_method("zeros").execute([])[0])
        self.zeros = {name: torch.zeros(shape) for name, shape in zeros.items()}
        self.use({})

    def use(self, adapter: Mapping[str, torch.Tensor]) -> None:
        """Choose the adapter of the runs that follow; {} is the base model. Nothing is copied."""
        unknown = sorted(adapter.keys() - self.zeros.keys())
        if unknown:
            raise ValueError(f"{unknown[0]} is no input of this model: the adapter is of another")
        self.adapter = {**self.zeros, **adapter}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run once; the outputs in the program's order."""
        tensors = {**inputs, **self.adapter}
        return self.forward.execute([tensors[name] for name in self.names])


def main(program: str, lowered: str, *paths: str) -> None:
    """Run the base and each adapter, with one lowering."""
    *adapters, inputs_path, outputs_path = paths
    inputs = {name: torch.from_numpy(array) for name, array in np.load(inputs_path).items()}
    if not Path(lowered).exists():
        lower(program, lowered)
    switch = SwitchModel(lowered)
    outputs = {}
    for path in [None, *adapters]:
        switch.use(load_file(path) if path else {})
        for number, tensor in enumerate(switch.run(inputs)):
            outputs[f"{Path(path).stem if path else 'base'}/{number}"] = tensor.numpy()
    np.savez(outputs_path, **outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
