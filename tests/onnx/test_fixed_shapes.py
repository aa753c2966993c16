"""Graphs at given sizes: inputs without a shape, and results that the inference does not know."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lora_fx.errors import LoraFxError
from lora_fx.onnx.fixed_shapes import with_fixed_shapes

GRAPH = """<ir_version: 8, opset_import: ["" : 18, "other" : 1]>
g (float[batch, width, 6] x, float y) => (float[batch, width, 3] z) {
    h = other.Op(x)
    z = other.Op(h)
}"""


def model() -> ir.Model:
    """A graph of ops that the inference does not know; its input y has no shape."""
    parsed = ir.from_proto(onnx.parser.parse_model(GRAPH))
    parsed.graph.inputs[1].shape = None
    return parsed


def test_sizes_of_what_the_inference_does_not_know_follow_their_names() -> None:
    at_sizes, shapes = with_fixed_shapes(model(), {}, "m.onnx")
    assert shapes == {"x": (1, 64, 6)}
    z = at_sizes.graph.outputs[0]
    assert z.shape is not None and z.shape.numpy() == (1, 64, 3)


def test_an_array_gives_sizes_to_names() -> None:
    at_sizes, shapes = with_fixed_shapes(model(), {"x": np.zeros((2, 5, 6))}, "m.onnx")
    assert shapes == {"x": (2, 5, 6)}
    z = at_sizes.graph.outputs[0]
    assert z.shape is not None and z.shape.numpy() == (2, 5, 3)


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 7)])
def test_an_array_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LoraFxError, match=r"m\.onnx: input 'x' takes \[batch, width, 6\]"):
        with_fixed_shapes(model(), {"x": np.zeros(shape)}, "m.onnx")
