"""merge of a large .onnx file, beside `onnx.load` and save: CPU, wall and peak memory.

`python -m tests.benchmarks.merge_onnx [--gigabytes 2.4] [--folder DIR]`; run by hand.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.formats.io import save_adapter
from tests.benchmarks.interleave import rows, run
from tests.benchmarks.kept import add_keep, report

ROWS, COLUMNS, RANK = 4096, 6144, 16
PLAIN = (
    "import onnx, sys\n"
    "m = onnx.load(sys.argv[1])\n"
    "onnx.save_model(m, sys.argv[2], save_as_external_data=True, location='plain.data')\n"
)


def make(folder: Path, gigabytes: float) -> None:
    """A chain of fp32 matmuls over one data file, and an adapter of all of them."""
    count = max(2, round(gigabytes * 1e9 / (ROWS * COLUMNS * 4)))
    rng = np.random.default_rng(0)
    block = (rng.standard_normal((ROWS, COLUMNS)) / 64).astype(np.float32)
    nodes, tensors, entries, value = [], [], {}, "x"
    with (folder / "base.data").open("wb") as data:
        for i in range(count):
            shape = (ROWS, COLUMNS) if i % 2 == 0 else (COLUMNS, ROWS)
            t = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=shape)
            t.data_location = TensorProto.EXTERNAL
            said = {"location": "base.data", "offset": data.tell(), "length": block.nbytes}
            for key, v in said.items():
                t.external_data.add(key=key, value=str(v))
            data.write(block.tobytes())
            tensors.append(t)
            nodes.append(helper.make_node("MatMul", [value, f"w{i}"], [f"h{i}"]))
            value = f"h{i}"
            a = rng.standard_normal((RANK, shape[0])).astype(np.float32)
            entries[f"w{i}"] = LowRank(a, np.ones((shape[1], RANK), np.float32) / 64, 1.5)
    wide = COLUMNS if count % 2 else ROWS
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", ROWS])
    y = helper.make_tensor_value_info(value, TensorProto.FLOAT, ["N", wide])
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "base.onnx")
    save_adapter(Adapter(dict(entries)), folder / "adapter")


def main() -> None:
    """Make the inputs, time, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.4)
    parser.add_argument("--folder")
    add_keep(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make(folder, options.gigabytes)
        base, out = str(folder / "base.onnx"), str(folder / "merged.onnx")
        merge = [sys.executable, "-m", "lora_fx.cli", "merge", base, str(folder / "adapter")]
        plain = [sys.executable, "-c", PLAIN, base, str(folder / "plain.onnx")]
        found = {
            "onnx.load and save": [run(plain)],
            "lora-fx merge": [run([*merge, "-o", out])],
        }
        what = f"{options.gigabytes} GB of fp32: whole commands, seconds"
        report("merge_onnx", what, rows(found), options.keep)


if __name__ == "__main__":
    main()
