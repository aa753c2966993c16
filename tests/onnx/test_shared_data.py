"""A model that reads the tensors in another one's data file, as they are or transposed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from lora_fx.compare import rel
from lora_fx.onnx.save import save, save_beside
from lora_fx.onnx.session import open_session

RNG = np.random.default_rng(0)
WEIGHTS = {
    "same": RNG.standard_normal((8, 9)).astype(np.float32),
    "turned": RNG.standard_normal((9, 8)).astype(np.float32),
    "other": RNG.standard_normal((8, 9)).astype(np.float32),
    "stacked": RNG.standard_normal((3, 9, 8)).astype(np.float32),
}


def model_of(weights: dict[str, np.ndarray]) -> ir.Model:
    text = """<ir_version: 10, opset_import: ["" : 20]> m (float[n, 8] x) => (float[3, n, 8] y)
        { a = MatMul(x, same) b = MatMul(a, turned) c = MatMul(b, other) y = MatMul(c, stacked) }"""
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def test_what_lies_in_the_other_files_data(tmp_path: Path) -> None:
    first = {**WEIGHTS, "other": WEIGHTS["other"] + 1}
    save(model_of(first), tmp_path / "first.onnx", external_over=0)
    # the second one holds the first one's matrix transposed, and reads it so
    second = model_of({**WEIGHTS, "turned": np.ascontiguousarray(WEIGHTS["turned"].T)})
    for node in list(second.graph):
        if node.inputs[1] is not None and node.inputs[1].name == "turned":
            transpose = ir.node("Transpose", [node.inputs[1]], {"perm": [1, 0]})
            transpose.outputs[0].name = "transposed"
            node.prepend(transpose)
            node.replace_input_with(1, transpose.outputs[0])
    save(second.clone(), tmp_path / "alone.onnx")

    left = save_beside(second, tmp_path / "second.onnx", tmp_path / "first.onnx")
    assert left == WEIGHTS["other"].nbytes
    stored = ir.load(tmp_path / "second.onnx").graph.initializers
    external = {name for name, v in stored.items() if isinstance(v.const_value, ir.ExternalTensor)}
    assert external == {"same", "turned", "stacked"}
    x = {"x": RNG.standard_normal((4, 8)).astype(np.float32)}
    results = [open_session(tmp_path / f"{n}.onnx", "cpu").run(x)["y"] for n in ("alone", "second")]
    assert rel(results[1], results[0]) < 1e-6
