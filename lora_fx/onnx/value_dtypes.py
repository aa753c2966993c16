"""Dtypes of values, as ONNX Runtime writes them, also of those of which a file does not say any."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import onnx
import onnx_ir as ir

GIVEN = ("to", "dtype", "stash_type", "output_dtype")
"""Attributes with the dtype of a result."""
DTYPES = [dtype.value for dtype in ir.DataType if dtype != ir.DataType.UNDEFINED]


class ValueDtypes:
    """The dtypes of values of a graph whose nodes are added in order."""

    def __init__(self, opset: int) -> None:
        """Start with the dtypes that the file says.

        Args:
            opset: The version of ONNX's operators in the file.
        """
        self.opset = opset
        self._inferred: dict[ir.Value, str] = {}

    def of(self, value: ir.Value) -> str:
        """Return a dtype: float, int64, seq(float) …; empty where it is unknown."""
        if value.type is not None:
            return _text(value.type)
        if value.const_value is not None:
            return _name(value.const_value.dtype)
        return self._inferred.get(value, "")

    def add(self, node: ir.Node) -> None:
        """Infer the dtypes of a node's results, where the file does not say them."""
        for i, result in enumerate(node.outputs):
            if not self.of(result):
                self._inferred[result] = self._result(node, i)

    def _result(self, node: ir.Node, number: int) -> str:
        schema = schema_of(node, self.opset)
        if schema is None:
            return self._of_runtime(node) if number == 0 else ""
        variable = schema.outputs[min(number, len(schema.outputs) - 1)].type_str
        for value, of_input in _typed_inputs(node, schema):
            if of_input == variable and self.of(value):
                return self.of(value)
        for constraint in schema.type_constraints:
            if constraint.type_param_str == variable and len(constraint.allowed_type_strs) == 1:
                return _of_schema(constraint.allowed_type_strs[0])
        if "(" in variable:
            return _of_schema(variable)
        return _given(node, schema) or self._of_runtime(node)

    def _of_runtime(self, node: ir.Node) -> str:
        """Return the dtype of a result of which no schema says anything.

        Operators of the runtime compute floats where they read some, beside codes or ids.
        """
        dtypes = [self.of(value) for value in node.inputs if value is not None]
        floats = [dtype for dtype in dtypes if "float" in dtype or dtype == "double"]
        return next(iter([*floats, *dtypes]), "")


@functools.cache
def _schema(name: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(name, opset)
    except onnx.defs.SchemaError:
        return None


def schema_of(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    """Return the schema of a node; None where the operator is not ONNX's."""
    return None if node.domain else _schema(node.op_type, opset)


def _typed_inputs(node: ir.Node, schema: onnx.defs.OpSchema) -> Iterator[tuple[ir.Value, str]]:
    """Yield the inputs of a node, and the names of their types in its schema."""
    for i, value in enumerate(node.inputs):
        if value is not None and schema.inputs:
            yield value, schema.inputs[min(i, len(schema.inputs) - 1)].type_str


def _given(node: ir.Node, schema: onnx.defs.OpSchema) -> str:
    """Return the dtype that the attributes of a node give its result; empty where none does."""
    for name in GIVEN:
        number = None
        if name in node.attributes:
            number = node.attributes[name].value
        elif name in schema.attributes:
            number = schema.attributes[name].default_value.i
        if number in DTYPES:
            return _name(ir.DataType(number))
    value = node.attributes.get("value")
    if value is not None and value.type == ir.AttributeType.TENSOR:
        return _name(value.as_tensor().dtype)
    return "float" if node.op_type == "ConstantOfShape" else ""


def _of_schema(text: str) -> str:
    """Return int64 of tensor(int64), seq(float) of seq(tensor(float))."""
    return text.replace("tensor(", "", 1).replace(")", "", 1)


def _text(kind: ir.TypeProtocol) -> str:
    """Return float of a tensor, seq(float) of a sequence; others have no kernels."""
    if isinstance(kind, ir.SequenceType):
        return f"seq({_text(kind.elem_type)})"
    if isinstance(kind, ir.TensorType):
        return _name(kind.dtype)
    return str(kind)


def _name(dtype: ir.DataType) -> str:
    return dtype.name.lower()
