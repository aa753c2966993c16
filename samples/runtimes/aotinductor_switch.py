"""One model, two adapters, AOTInductor: A and B are inputs, so runs swap adapters.

`python aotinductor_switch.py X.pt2 X.aoti.pt2 INPUTS.npz OUTPUTS.npz X.base.safetensors
de.safetensors fr.safetensors` compiles X.pt2 unless X.aoti.pt2 exists, runs the base and each
adapter on the arrays of INPUTS.npz, and writes what comes out. It needs
`pip install torch numpy safetensors` and, to compile, a C++ compiler; and a file that was exported
with `lora-fx export MODEL ./de ./fr -o X.pt2 --mode switch`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Unasked, a package runs on sizes that it was not compiled for. This is read at the first run.
os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils import _pytree

Tensors = dict[str, torch.Tensor]


def compile_program(program_path: str, package: str, inputs: Tensors, adapter: Tensors) -> None:
    """Compile an exported program; inputs and adapter are an example of any allowed sizes."""
    program = torch.export.load(program_path)
    all_names = program.graph_signature.user_inputs
    names = [name for name in all_names if name in inputs]
    factors = {name: adapter[name] for name in all_names if name not in inputs}
    # The file stores no example, and the compiler asks for one.
    program.example_inputs = (tuple(inputs[name] for name in names), factors)
    options = {
        "aot_inductor.metadata": {"names": json.dumps(names)},
        "aot_inductor.check_lowerbound": False,  # it would refuse sizes of 0 and 1, which are right
    }
    torch._inductor.aoti_compile_and_package(
        program, package_path=package, inductor_configs=options
    )


class SwitchModel:
    """A compiled package whose adapter can change with every run; nothing is compiled again."""

    def __init__(self, package: str) -> None:
        self.compiled = torch._inductor.aoti_load_package(package)
        self.names = json.loads(self.compiled.get_metadata()["names"])

    def run(self, inputs: Tensors, adapter: Tensors) -> list[torch.Tensor]:
        """Run once with an adapter, which is read where it lies; the outputs in their order."""
        outputs = self.compiled(*[inputs[name] for name in self.names], **adapter)
        return _pytree.tree_leaves(outputs)


def main(program: str, package: str, inputs_path: str, outputs_path: str, *adapters: str) -> None:
    """Run every adapter, the base among them, with one compilation."""
    inputs = {name: torch.from_numpy(array) for name, array in np.load(inputs_path).items()}
    if not Path(package).exists():
        compile_program(program, package, inputs, load_file(adapters[0]))
    model = SwitchModel(package)
    results = {}
    for path in adapters:
        adapter = load_file(path)
        for number, output in enumerate(model.run(inputs, adapter)):
            results[f"{Path(path).stem}/{number}"] = output.numpy()
    np.savez(outputs_path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
