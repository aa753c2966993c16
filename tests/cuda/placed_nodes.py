"""Print what the CUDA provider copies for each of several files, as JSON: file name → row.

Tests start this as a script in a child process that sees the stand-in:
`python tests/cuda/placed_nodes.py FOLDER`. A row is a list of copies, or the reason of a refusal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lora_fx.onnx.device_placement import copies_in, placed_graph
from lora_fx.onnx.provider_nodes import CUDA


def row_of(path: Path) -> list[str] | str:
    try:
        session, graph = placed_graph(path, "cuda")
    except Exception as error:  # the runtime's own classes, one for each status
        return str(error)
    assert session.get_providers()[0] == CUDA, "the CUDA provider did not load"
    return copies_in(graph)


if __name__ == "__main__":
    for file in sorted(Path(sys.argv[1]).iterdir()):
        print(json.dumps([file.stem, row_of(file)]), flush=True)
