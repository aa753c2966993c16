"""What onnxsim and onnxslim make of files; run in their environment: `in_simplifiers.py FILE…`.

Each FILE is written again as FILE.onnxsim and FILE.onnxslim, and how many nodes there were and are
is printed as JSON.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import onnx
import onnxsim
import onnxslim


def main(paths: list[str]) -> None:
    """Simplify every file with both programs."""
    nodes: dict[str, list[int] | str] = {name: version(name) for name in ("onnxsim", "onnxslim")}
    for path in paths:
        model = onnx.load(path)
        simplified = {"onnxsim": onnxsim.simplify(model)[0], "onnxslim": onnxslim.slim(model)}
        for tool, result in simplified.items():
            onnx.save(result, f"{path}.{tool}")
            nodes[f"{Path(path).name}.{tool}"] = [len(model.graph.node), len(result.graph.node)]
    print(json.dumps(nodes))


if __name__ == "__main__":
    main(sys.argv[1:])
