"""One model, two adapters, ExecuTorch: A and B are inputs, so runs swap adapters.

`python executorch_switch.py X.pt2 X.pte INPUTS.npz OUTPUTS.npz X.base.safetensors de.safetensors
fr.safetensors` lowers X.pt2 to XNNPACK unless X.pte exists, runs the base and each adapter on the
arrays of INPUTS.npz, and writes what comes out. It needs
`pip install executorch torch numpy safetensors`, and a file that was exported with
`lora-fx export MODEL ./de ./fr -o X.pt2 --mode switch --largest batch=4,rank=16`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def lower(program_path: str, lowered: str) -> None:
    """Lower an exported program to XNNPACK; its second method gives the names of the inputs."""
    program = torch.export.load(program_path)
    names = json.dumps(program.graph_signature.user_inputs)
    # ExecuTorch drops these checks of sizes, but not what computes them, which it refuses then.
    for check in program.graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_scalar.default
    ):
        program.graph.erase_node(check)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()

    # With either of these on, batches of 16 and more may be lost where there are convolutions.
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods={"names": names}
        )
        Path(lowered).write_bytes(edge.to_executorch().buffer)


class SwitchModel:
    """A loaded program whose adapter can change with every run."""

    def __init__(self, lowered: str) -> None:
        self.program = Runtime.get().load_program(lowered)
        self.forward = self.program.load_method("forward")
        self.names = json.loads(self.program.load_method("names").execute([])[0])

    def run(self, inputs: Tensors, adapter: Tensors) -> list[torch.Tensor]:
        """Run once with an adapter; the outputs in their order."""
        tensors = inputs | adapter
        wrong = tensors.keys() ^ set(self.names)
        if wrong:
            raise ValueError(f"the model and the adapter do not fit: {min(wrong)}")
        return self.forward.execute([tensors[name] for name in self.names])


def main(program: str, lowered: str, inputs_path: str, outputs_path: str, *adapters: str) -> None:
    """Run every adapter, the base among them, with one lowering."""
    inputs = {name: torch.from_numpy(array) for name, array in np.load(inputs_path).items()}
    if not Path(lowered).exists():
        lower(program, lowered)
    model = SwitchModel(lowered)
    results = {}
    for path in adapters:
        adapter = load_file(path)
        for number, output in enumerate(model.run(inputs, adapter)):
            results[f"{Path(path).stem}/{number}"] = output.numpy()
    np.savez(outputs_path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
