"""What an OnnxGraph and its emitter do at the edges: refusals, and where inputs index tables."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from lora_fx.errors import LoraFxError, MistakeError
from lora_fx.onnx.graph.emitter import OnnxEmitter
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.id_limits import highest
from lora_fx.onnx.graph.shape_inference import infer_shapes


def graph_of(text: str, opset: int = 20) -> OnnxGraph:
    header = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>'
    return OnnxGraph(ir.from_onnx_text(f"{header}\nm {text}"))


WEIGHT = "<float[2, 3] w = {1, 2, 3, 4, 5, 6}>"
LINEAR = f"(float[N, 2] x) => (float[N, 3] y) {WEIGHT} {{y = MatMul(x, w)}}"


def test_a_site_of_a_removed_node_is_refused() -> None:
    graph = graph_of(LINEAR)
    (site,) = graph.sites()
    node = graph.at(site).node
    text = f"(float[N, 2] x) => (float[N, 3] z) {WEIGHT} {{z = MatMul(x, w)}}"
    (other_site,) = graph_of(text).sites()
    with pytest.raises(LoraFxError, match="site 'z' is not in this graph"):
        graph.at(other_site)
    graph.model.graph.outputs.clear()
    graph.model.graph.remove(node)
    with pytest.raises(LoraFxError, match="site 'y' is not in this graph"):
        graph.at(site)


def test_lint_names_a_value_that_is_read_too_early() -> None:
    graph = graph_of(
        "(float[N, 2] x) => (float[N, 2] y) {a = Relu(x) y = Neg(a)}",
    )
    graph.lint()
    relu, neg = graph.model.graph
    graph.model.graph.remove(relu)
    graph.model.graph.append(relu)
    assert neg is graph.model.graph[0]
    with pytest.raises(LoraFxError, match="Neg y reads 'a' before it is computed"):
        graph.lint()


def emitter_of(graph: OnnxGraph) -> OnnxEmitter:
    (site,) = graph.sites()
    return graph.emit(site)


def test_an_unknown_primitive_is_a_mistake() -> None:
    emitter = emitter_of(graph_of(LINEAR))
    with pytest.raises(MistakeError, match="the ONNX emitter has no primitive 'erf'"):
        emitter.op("erf", emitter.node.outputs[0])


@pytest.mark.parametrize("opset", [14, 15])
def test_a_cast_to_a_dtype_that_only_a_run_knows(opset: int) -> None:
    emitter = emitter_of(graph_of(LINEAR, opset))
    unknown = ir.Value(name="unknown")
    if opset >= 15:
        producer = emitter.op("cast_like", emitter.node.outputs[0], unknown).producer()
        assert producer is not None and producer.op_type == "CastLike"
        return
    with pytest.raises(
        LoraFxError, match="the dtype of 'unknown' is unknown, and the graph needs opset 15"
    ):
        emitter.op("cast_like", emitter.node.outputs[0], unknown)


def test_primitives_of_an_emitter() -> None:
    emitter = emitter_of(graph_of(LINEAR))
    y = emitter.node.outputs[0]
    columns = emitter.op("slice", y, start=1, stop=3, axis=1)
    columns.shape = ir.Shape((4, 2))
    results = [
        emitter.op("repeat", columns, times=3),
        emitter.op("norm", y),
        emitter.op("mul", y, 0.5),
        emitter.op("cast", y, dtype="float16"),
        emitter.op("cast", y, dtype="float32"),
        emitter.op("detach", y),
    ]
    assert results[-2] is y and results[-1] is y
    ops = [node.op_type for node in emitter.owner.model.graph]
    chain = ["Reshape", "Expand", "Reshape", "ReduceL2", "Mul", "Cast"]
    assert ops == ["MatMul", "Slice", *chain]
    names = [node.outputs[0].name for node in emitter.owner.model.graph][1:]
    assert names == [f"y_lora_{i}" for i in (4, 7, 8, 10, 12, 14, 15)]


STACK = "float[4, 6, 8] w = {" + ", ".join(["1"] * 192) + "}"
PICKED = f"""(float[N, 8, 1] x) => (float[N, 6, 1] y) <{STACK}, int64 four = {{4}}> {{
    ids = ArgMax<axis = 1, keepdims = 0>(x)
    k = Mod(ids, four)
    p = GatherND(w, k)
    q = Identity(p)
    y = MatMul(q, x)
}}"""


def test_what_data_picks_is_found_through_views() -> None:
    graph = graph_of(PICKED)
    (site,) = graph.sites()
    ids = graph.picked(site, graph.emit(site, before=True))
    reshape = ids.producer()
    assert reshape is not None and reshape.inputs[0] is not None
    assert reshape.inputs[0].name == "k"

    graph = graph_of(LINEAR)
    (site,) = graph.sites()
    with pytest.raises(AssertionError, match="no input data selects the rows that y reads"):
        graph.picked(site, graph.emit(site, before=True))


def test_only_an_input_that_indexes_a_table_has_a_limit() -> None:
    table = "<float[3, 2] t = {1, 2, 3, 4, 5, 6}>"
    text = f"""(int64[N] ids, int64[N] others, float[N] x) => (float[N, 2] y) {table} {{
        i = Cast<to = 7>(ids)
        a = Gather(t, i)
        j = Abs(others)
        b = Gather(t, j)
        y = Add(a, b)
    }}"""
    assert highest(graph_of(text)) == {"ids": 3}


def test_shapes_behind_codes_are_those_of_floats() -> None:
    codes = "uint8[4, 1, 8] w = {" + ", ".join(["17"] * 32) + "}, float[4] s = {1, 1, 1, 1}"
    op = "com.microsoft.MatMulNBits<K = 16, N = 4, bits = 4, block_size = 16>(x, w, s)"
    text = f"(float[N, 16] x) => (float[N, 4] z) <{codes}> {{y = {op} z = Relu(y)}}"
    model = graph_of(text).model
    for node in model.graph:
        node.outputs[0].shape = None
    assert infer_shapes(model)
    shape = model.graph[0].outputs[0].shape
    assert shape is not None and shape[1] == 4
