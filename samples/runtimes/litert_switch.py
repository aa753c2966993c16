"""One model, two adapters, LiteRT: A and B are inputs, so runs swap adapters.

`python litert_switch.py X.pt2 X.tflite INPUTS.npz OUTPUTS.npz X.base.safetensors de.safetensors
fr.safetensors` converts X.pt2 unless X.tflite exists, runs the base and each adapter on the arrays
of INPUTS.npz, and writes what comes out. It needs
`pip install litert-torch torch numpy safetensors`, and a file of fixed sizes that was exported with
`lora-fx export MODEL ./de ./fr -o X.pt2 --mode switch --rank 8 --static`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The default loses the layout of a convolution whose weight is computed, as W + BA is.
os.environ.setdefault("LAYOUT_OPTIMIZE_PARTITIONER", "GREEDY")

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from safetensors.torch import load_file
from torch.utils import _pytree

Tensors = dict[str, torch.Tensor]


class ByName(torch.nn.Module):
    """A program whose inputs have names, as LiteRT's have, and whose outputs have an order."""

    def __init__(self, program: torch.export.ExportedProgram, factors: set[str]) -> None:
        super().__init__()
        self.training = False
        self.program = program.module(check_guards=False)
        self.names = [n for n in program.graph_signature.user_inputs if n not in factors]

    def forward(self, **tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arguments = [tensors.pop(name) for name in self.names]
        return tuple(_pytree.tree_leaves(self.program(*arguments, **tensors)))


def convert(program_path: str, converted: str, inputs: Tensors, adapter: Tensors) -> None:
    """Convert an exported program of fixed sizes, which are those of the inputs."""
    import litert_torch

    program = ByName(torch.export.load(program_path), {*adapter})
    # Without x64, ids would have to be int32.
    model = litert_torch.convert(program, (), inputs | adapter, enable_x64=True)
    model.export(converted)


class SwitchModel:
    """A loaded model whose adapter can change with every run."""

    def __init__(self, converted: str) -> None:
        self.interpreter = Interpreter(converted, num_threads=1)
        self.runner = self.interpreter.get_signature_runner()

    def run(self, inputs: Tensors, adapter: Tensors) -> list[torch.Tensor]:
        """Run once with an adapter; the outputs in their order."""
        tensors = inputs | adapter
        outputs = self.runner(**{name: tensor.numpy() for name, tensor in tensors.items()})
        in_order = sorted(outputs, key=lambda name: int(name.removeprefix("output_")))
        return [torch.from_numpy(outputs[name]) for name in in_order]


def main(program: str, converted: str, inputs_path: str, outputs_path: str, *adapters: str) -> None:
    """Run every adapter, the base among them, with one conversion."""
    inputs = {name: torch.from_numpy(array) for name, array in np.load(inputs_path).items()}
    if not Path(converted).exists():
        convert(program, converted, inputs, load_file(adapters[0]))
    model = SwitchModel(converted)
    results = {}
    for path in adapters:
        adapter = load_file(path)
        for number, output in enumerate(model.run(inputs, adapter)):
            results[f"{Path(path).stem}/{number}"] = output.numpy()
    np.savez(outputs_path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
