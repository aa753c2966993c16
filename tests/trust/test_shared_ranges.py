"""Mode batch of models whose activations have one range over all rows: no row is proven alone.

So the graph itself has to say that an adapter of one row reaches no other row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.onnx.session import open_session

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 5, 4] x) => (float[N, 5, K] y) <
    uint8[4, 4] codes = {{{codes}}}, uint8 zero = {{8}}, float step = {{0.05}},
    int64[1] first = {{0}}, int64[2] both = {{0, 1}}, int64[1] last = {{-1}}, int64 along = {{0}},
    int64[1] begin = {{-1}}, int64[1] end = {{-9223372036854775807}}, int64[1] back = {{-1}}
> {{
    q, scale, at = DynamicQuantizeLinear(x)
    product = MatMulInteger(q, codes, at, zero)
    wide = Cast<to: int = 1>(product)
    by = Mul(scale, step)
    h = Mul(wide, by)
    z = MatMul(h, w)
    {rest}
}}
"""
MIXED = {
    "a mean over the rows": "m = ReduceMean<keepdims: int = 1>(z, first) y = Add(z, m)",
    "a mean over rows and tokens": "m = ReduceMean<keepdims: int = 0>(z, both) y = Add(z, m)",
    "the largest of all": "a = Abs(z) m = ReduceMax<keepdims: int = 0>(a) y = Div(z, m)",
    "rows turned round": "m = Slice(z, begin, end, first, back) y = Add(z, m)",
    "a softmax over the rows": "y = Softmax<axis: int = 0>(z)",
    "sums of the rows before": "y = CumSum(z, along)",
    "a mean of a sigmoid": (
        "s = Sigmoid(z) m = ReduceMean<keepdims: int = 1>(s, first) y = Mul(z, m)"
    ),
}
APART = {
    "as it is": "y = Identity(z)",
    "a mean over the tokens": "m = ReduceMean<keepdims: int = 1>(z, last) y = Add(z, m)",
    "a softmax": "y = Softmax<axis: int = -1>(z)",
    "a mean over rows of what no adapter changes": (
        "m = ReduceMean<keepdims: int = 0>(x, both) k = ReduceSum<keepdims: int = 0>(m) "
        "y = Add(z, k)"
    ),
}


def written(rest: str, folder: Path) -> Path:
    rng = np.random.default_rng(0)
    codes = ", ".join(map(str, rng.integers(0, 16, 16)))
    model = onnx.parser.parse_model(GRAPH.format(codes=codes, rest=rest.replace(") ", ")\n    ")))
    w = rng.standard_normal((4, 6)).astype("f4")
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 6
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def adapters() -> dict[str, lora_fx.Adapter]:
    rng = np.random.default_rng(1)

    def low() -> lora_fx.LowRank:
        a, b = (rng.standard_normal(shape).astype("f4") for shape in ((2, 4), (6, 2)))
        return lora_fx.LowRank(a, b, 2.0)

    return {name: lora_fx.Adapter({"w": low()}) for name in ("one", "other")}


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_reach_each_other_are_refused(name: str, tmp_path: Path) -> None:
    path = written(MIXED[name], tmp_path)
    with pytest.raises(LoraFxError, match=r"output 'y': .* may mix the rows of the batch, so the"):
        lora_fx.export(path, tmp_path / "b.onnx", adapters=adapters(), mode="batch", provider="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("name", APART)
def test_rows_apart_are_served(name: str, tmp_path: Path) -> None:
    path, out = written(APART[name], tmp_path), tmp_path / "b.onnx"
    mine = adapters()
    lora_fx.export(path, out, adapters=mine, mode="batch", provider="cpu")
    x = np.random.default_rng(2).standard_normal((3, 5, 4)).astype("f4")
    got = open_session(out, "cpu").run({"x": x, "adapter_ids": np.array([2, 0, 1])})["y"]
    for row, adapter in enumerate((mine["other"], None, mine["one"])):
        merged = path
        if adapter is not None:
            merged = tmp_path / f"{row}.onnx"
            lora_fx.export(path, merged, adapters=adapter, provider="cpu")
        wanted = open_session(merged, "cpu").run({"x": x})["y"]
        np.testing.assert_allclose(got[row], wanted[row], rtol=1e-4, atol=1e-5)
