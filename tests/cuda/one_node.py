"""Models of one node between nodes of the device: those of ONNX's own tests, in several dtypes.

Each input is cast to its dtype on the device, and each result back, so that there is a copy where
the node is on the CPU. Inputs that kernels read on the host are initialisers.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lora_fx.dtypes import Array
from lora_fx.onnx.host_sizes import READ_ON_HOST
from tests.cuda import stand_in

OPSET = 20
"""That of the exporter's files. Operators that came later have the opset of their test."""
OLDEST = 11
NEWEST = 26
"""The opsets that lora_fx reads, and that ONNX Runtime 1.31 loads."""
PLACED_NODES = Path(__file__).with_name("placed_nodes.py")
DTYPES = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.BOOL,
)


@dataclass(frozen=True)
class NodeCase:
    """One node of ONNX's tests in one dtype.

    Attributes:
        name: Of the test, and the dtype.
        opset: Of the model.
        node: The node.
        types: Name of an input or a result → its dtype.
        shapes: Name of an input → its sizes.
        constants: Name of an input that is read on the host → its numbers.
    """

    name: str
    opset: int
    node: onnx.NodeProto
    types: Mapping[str, int]
    shapes: Mapping[str, Sequence[int]]
    constants: Mapping[str, Array]

    def model(self) -> onnx.ModelProto:
        """The node between casts."""
        nodes, inputs, outputs = [], [], []
        for name, shape in self.shapes.items():
            fed = other_dtype(self.types[name])
            inputs.append(helper.make_tensor_value_info(f"fed_{name}", fed, shape))
            nodes.append(helper.make_node("Cast", [f"fed_{name}"], [name], to=self.types[name]))
        nodes.append(self.node)
        for name in filter(None, self.node.output):
            read = other_dtype(self.types[name])
            nodes.append(helper.make_node("Cast", [name], [f"read_{name}"], to=read))
            outputs.append(helper.make_tensor_value_info(f"read_{name}", read, None))
        initialisers = [numpy_helper.from_array(a, name) for name, a in self.constants.items()]
        graph = helper.make_graph(nodes, "one_node", inputs, outputs, initialisers)
        domains = [helper.make_opsetid("", self.opset)]
        if self.node.domain:
            domains.append(helper.make_opsetid(self.node.domain, 1))
        return helper.make_model(graph, opset_imports=domains, ir_version=10)


def placed(
    cases: Iterable[NodeCase], libraries: Path, folder: Path
) -> Mapping[str, Sequence[str] | str]:
    """What the provider copies for each case, or why it refuses it, by the case's name."""
    folder.mkdir(exist_ok=True)
    for case in cases:
        onnx.save(case.model(), folder / f"{case.name}.onnx")
    child = stand_in.run_with(libraries, PLACED_NODES, folder)
    assert child.returncode == 0, child.stderr
    return dict(json.loads(line) for line in child.stdout.splitlines())


def other_dtype(dtype: int) -> int:
    """A dtype from which a Cast is a node."""
    return TensorProto.FLOAT if dtype == TensorProto.DOUBLE else TensorProto.DOUBLE


@functools.cache
def tests_of_onnx() -> Sequence[tuple[str, onnx.ModelProto, Sequence[Array]]]:
    """The name, the model and the inputs of each test of one node of tensors."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = load_model_tests(kind="node")
    found = []
    for test in tests:
        if test.model is None:
            continue
        graph = test.model.graph
        values = [*graph.input, *graph.output]
        if len(graph.node) != 1 or graph.node[0].domain or test.name.endswith("_expanded"):
            continue
        if all(value.type.HasField("tensor_type") for value in values) and test.data_sets:
            found.append((test.name, test.model, test.data_sets[0][0]))
    return found


def cases(operators: Collection[str] = ()) -> Iterator[NodeCase]:
    """Every test of one node, or of some operators, in every dtype of its data."""
    for name, model, arrays in tests_of_onnx():
        if operators and model.graph.node[0].op_type not in operators:
            continue
        if opset_of(model) <= NEWEST:
            yield from _in_dtypes(name, model, arrays)


def _in_dtypes(name: str, model: onnx.ModelProto, arrays: Sequence[Array]) -> Iterator[NodeCase]:
    graph = model.graph
    (node,) = graph.node
    opset = opset_of(model)
    schema = onnx.defs.get_schema(node.op_type, opset)
    own = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    variables = dict(_variables(node, schema))
    on_host = READ_ON_HOST.get(node.op_type, ())
    read = {node.input[i] for i in on_host if i < len(node.input) and node.input[i]}
    values = dict(zip((value.name for value in graph.input), arrays, strict=False))
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.input
        if value.name not in read
    }
    constants = {name: np.asarray(values[name]) for name in read if name in values}

    allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}
    data = next((v for v in variables.values() if len(allowed.get(v, ())) > 1), "")
    wanted = [d for d in DTYPES if f"tensor({dtype_name(d)})" in allowed.get(data, ())]
    data_names = [value for value, variable in variables.items() if variable == data]
    first = own.get(data_names[0]) if data_names else None
    for dtype in dict.fromkeys([*filter(None, [first]), *wanted]):
        types = {**own, **dict.fromkeys(data_names, dtype)} if dtype != first else own
        typed = {
            name: a.astype(helper.tensor_dtype_to_np_dtype(types[name]))
            for name, a in constants.items()
        }
        label = f"{name}-{dtype_name(dtype)}"
        for result, of_result in _results(node, schema, dtype):
            of_node = dict.fromkeys(node.output, result) if result else {}
            title = f"{label}-{dtype_name(result)}" if of_result is not node else label
            yield NodeCase(title, opset, of_result, {**types, **of_node}, shapes, typed)


def _results(
    node: onnx.NodeProto, schema: onnx.defs.OpSchema, dtype: int
) -> Iterator[tuple[int, onnx.NodeProto]]:
    """The node with each dtype that its attribute `dtype` can give its result, and that dtype.

    Without the attribute the result has the dtype of the input (Bernoulli, EyeLike). The dtype is 0
    where an operator has no such attribute.
    """
    attribute = schema.attributes.get("dtype")
    if attribute is None or attribute.default_value.type or not node.input:
        yield 0, node
        return
    given = [one.i for one in node.attribute if one.name == "dtype"]
    yield (given or [dtype])[0], node
    if not given:
        return
    for other in DTYPES:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        next(one for one in copy.attribute if one.name == "dtype").i = other
        yield other, copy


def opset_of(model: onnx.ModelProto) -> int:
    """OPSET, where the node is valid there."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.opset_import[0].version = OPSET
    try:
        onnx.checker.check_model(copy)
    except onnx.checker.ValidationError:
        return model.opset_import[0].version
    return OPSET


def _variables(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> Iterator[tuple[str, str]]:
    """The name of each input and result, and of its type in the schema."""
    for names, places in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for i, name in enumerate(names):
            if name and places:
                yield name, places[min(i, len(places) - 1)].type_str


def dtype_name(dtype: int) -> str:
    """float, float16, int64 …, as ONNX Runtime writes it."""
    return TensorProto.DataType.Name(dtype).lower()
