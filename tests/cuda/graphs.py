"""Run a switchable file with CUDA graphs on the stand-in, and print what stays where, as JSON.

Tests start this as a script in a child process that sees the stand-in:
`python tests/cuda/graphs.py FILE FOLDER`, with a folder of adapters. A session refuses the
stand-in's device. This process alone takes that check away, because it reads no output: kernels do
not run there, but memory, copies, captures and launches are those of the real provider.
"""

from __future__ import annotations

import ctypes
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from lora_fx.onnx import Session
from lora_fx.onnx import session as sessions
from lora_fx.onnx.graph_runs import GraphRuns
from lora_fx.onnx.provider_nodes import CUDA

ROWS = (3, 1, 3, 1, 1, 3)


def addresses(runs: GraphRuns) -> list[int]:
    """The addresses of all bound values."""
    values = [*runs.buffers.values.values()]
    for bound in runs.shapes.values():
        values += [*bound.inputs.values(), *bound.outputs]
    return [value.data_ptr() for value in values]


def contents(runs: GraphRuns) -> Mapping[str, Any]:
    """What lies in the buffers of A and B, read at their addresses: they are the host's here."""
    found = {}
    for name, value in runs.buffers.values.items():
        size = int(np.prod(value.shape()))
        numbers = (ctypes.c_float * size).from_address(value.data_ptr())
        found[name] = np.array(numbers).reshape(value.shape()).tolist()
    return found


def tf32_of(session: ort.InferenceSession) -> str:
    """The provider's option for products in TF32."""
    return str(session.get_provider_options()[CUDA]["use_tf32"])


def counted(name: str) -> int:
    """A number that the stand-in keeps."""
    return int(ctypes.c_int.in_dll(ctypes.CDLL("libcudart.so.13"), name).value)


def main(path: str, folder: str) -> None:
    setattr(sessions, "refuse_stand_in", lambda: None)  # noqa: B010 - it is no export of the module
    warnings.simplefilter("ignore")
    session = Session(path, "cuda", cuda_graph=True)
    names = sorted(file.name for file in Path(folder).iterdir())
    for name in names:
        session.load(name, Path(folder, name))
    (node,) = session.session.get_inputs()
    seen = []
    held = {}
    for turn, rows in enumerate(ROWS):
        name = names[turn % len(names)]
        for choice in (name, None, name):
            session.run({node.name: np.zeros((rows, *node.shape[1:]), np.float32)}, choice)
            runs = session._graph_runs
            seen.append(addresses(runs))
        held[name] = contents(runs)
    print(
        json.dumps(
            {
                "provider": session.provider,
                "note": session.note,
                "shapes": len(runs.shapes),
                "addresses": seen,
                "held": held,
                "captures": counted("captures"),
                "launches": counted("launches"),
                "capture mode": counted("capture_mode"),
                "use_tf32": {
                    "cuda_graph": tf32_of(session.session),
                    "exact": tf32_of(Session(path, "cuda").session),
                    "not exact": tf32_of(Session(path, "cuda", exact=False).session),
                    "plain": tf32_of(ort.InferenceSession(path, providers=[CUDA])),
                },
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
