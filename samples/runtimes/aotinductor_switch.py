"""One model, two adapters, AOTInductor: A and B are inputs, so an adapter is swapped between two runs.

`python aotinductor_switch.py X.pt2 X.aoti.pt2 de.safetensors fr.safetensors INPUTS.npz OUTPUTS.npz`
compiles X.pt2 where X.aoti.pt2 does not exist yet, runs the base and each adapter on the arrays of
INPUTS.npz, and writes what comes out. It needs `pip install torch numpy safetensors` and, to
compile, a C++ compiler; and a file that was exported with
`lora-fx export MODEL ./de ./fr -o X.pt2 --mode switch`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# Without this, a package runs on sizes that it was not compiled for. It is read at the first run.
os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils import _pytree

FACTORS = ("lora_a", "lora_b")


def compile_program(path: str, package: str, inputs: Mapping[str, torch.Tensor]) -> None:
    """Compile an exported program into a package. The inputs of any allowed size are an example."""
    program = torch.export.load(path)
    names = program.graph_signature.user_inputs
    zeros = {}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in names and node.name.endswith(FACTORS):
            # A free size is the rank, and zeros of any rank change nothing.
            zeros[node.name] = [s if isinstance(s, int) else 1 for s in node.meta["val"].shape]

    # The file has no example, and the compiler asks for one.
    example = {**{name: torch.zeros(shape) for name, shape in zeros.items()}, **inputs}
    flat = [example[name] for name in names]
    program.example_inputs = _pytree.tree_unflatten(flat, program.call_spec.in_spec)

    options = {
        "aot_inductor.metadata": {"names": json.dumps(names), "zeros": json.dumps(zeros)},
        "aot_inductor.check_lowerbound": False,  # it would refuse sizes of 0 and 1, which are right
    }
    torch._inductor.aoti_compile_and_package(
        program, package_path=package, inductor_configs=options
    )


class SwitchModel:
    """A compiled package whose adapter can change before every run; nothing is compiled again."""

    def __init__(self, package: str) -> None:
        self.compiled = torch._inductor.aoti_load_package(package)
        metadata = self.compiled.get_metadata()
        self.names = json.loads(metadata["names"])
        self.zeros = {n: torch.zeros(s) for n, s in json.loads(metadata["zeros"]).items()}
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
        return self.compiled.loader.boxed_run([tensors[name] for name in self.names])


def main(program: str, package: str, *paths: str) -> None:
    """Run the base and each adapter, with one compilation."""
    *adapters, inputs_path, outputs_path = paths
    inputs = {name: torch.from_numpy(array) for name, array in np.load(inputs_path).items()}
    if not Path(package).exists():
        compile_program(program, package, inputs)
    switch = SwitchModel(package)
    outputs = {}
    for path in [None, *adapters]:
        switch.use(load_file(path) if path else {})
        for number, tensor in enumerate(switch.run(inputs)):
            outputs[f"{Path(path).stem if path else 'base'}/{number}"] = tensor.numpy()
    np.savez(outputs_path, **outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
