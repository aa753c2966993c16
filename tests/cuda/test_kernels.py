"""The table of CUDA's kernels, the provider's own list, and where it places single nodes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest

from lora_fx.onnx.cuda_kernels import kernels
from lora_fx.onnx.cuda_obstacles import CONTROL_FLOW, COUNTED, cuda_obstacles
from tests.cuda import one_node
from tests.cuda.kernels import (
    differences,
    functions_of,
    kernels_of,
    measured_functions,
    registered,
    stored,
)

QUICK = ("Add", "ArgMax", "Bernoulli", "BitwiseAnd", "Dropout", "Hardmax", "Mean", "Mish",
         "NonZero", "Pad", "ReduceL1", "ReduceProd", "Sinh", "Where")  # fmt: skip
"""Operators whose nodes are placed in the default run."""
VERSION_OF_TABLE = pytest.mark.skipif(
    onnxruntime.__version__ not in stored(),
    reason="the table has no kernels of this version: python -m tests.cuda.kernels --write",
)


@VERSION_OF_TABLE
def test_the_table_is_the_providers_list(stand_in_folder: Path, tmp_path: Path) -> None:
    registry = registered(tmp_path)
    assert list(differences(kernels_of(registry), functions_of(registry))) == []


@VERSION_OF_TABLE
@pytest.mark.slow
def test_functions_are_those_that_copy_nothing(stand_in_folder: Path, tmp_path: Path) -> None:
    registry = registered(tmp_path / "registry")
    functions = measured_functions(functions_of(registry), stand_in_folder, tmp_path / "files")
    assert list(differences({**kernels_of(registry), **functions})) == []


@VERSION_OF_TABLE
@pytest.mark.parametrize("operators", [QUICK, pytest.param((), marks=pytest.mark.slow, id="all")])
def test_a_node_copies_where_the_table_has_no_kernel(
    operators: Collection[str], stand_in_folder: Path, tmp_path: Path
) -> None:
    """Nodes that count their results copy a number alone, which is no node of the graph, and some
    Scans copy nothing. A Constant is none here."""
    cases = [case for case in one_node.cases(operators) if case.node.op_type != "Constant"]
    placed = one_node.placed(cases, stand_in_folder, tmp_path)
    compared = set()
    wrong = {}
    for case in cases:
        copies = placed[case.name]
        if isinstance(copies, str):
            continue  # this node has no kernel on the CPU either
        compared.add(case.node.op_type)
        obstacles = cuda_obstacles(ir.from_proto(case.model()))
        expected = bool(copies) or case.node.op_type in (*COUNTED, *CONTROL_FLOW)
        if bool(obstacles) != expected:
            wrong[case.name] = (copies, [str(obstacle) for obstacle in obstacles])
    assert wrong == {}
    assert compared >= set(operators)
    assert len(compared) >= (len(operators) or 150)


def test_what_nobody_listed_is_an_obstacle() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20, "org.example" : 1]>'
        " g (float[n] x) => (float[n] y) { d = Neg(x) y = org.example.Fast(d) }"
    )
    (obstacle,) = cuda_obstacles(model)
    assert str(obstacle) == (
        "Fast '' is not known to have a CUDA kernel: what it reads and writes may be copied in "
        "every run"
    )


def test_a_version_of_an_operator_is_one_with_a_kernel() -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : {}]> g (float[n] x) => (float[n] y) {{ y = Relu(x) }}'
    )
    for opset in (11, 13, 14, 20, 21):
        assert cuda_obstacles(ir.from_onnx_text(text.format(opset))) == []
    assert kernels()["Relu"]
    assert cuda_obstacles(ir.from_onnx_text(text.format(1)))


@pytest.mark.parametrize(
    "node",
    [
        'y = Cast <to = 999> (x)',
        'y = Cast <to = "int"> (x)',
        'y = ConvTranspose <pads = 3, auto_pad = 1> (x, x)',
        'y = ArgMax <select_last_index = "no"> (x)',
        'y = ConstantOfShape <value = 1> (x)',
        'y = Add ()',
        'y = Shape (x, x, x)',
    ],
)  # fmt: skip
def test_a_node_that_is_none_of_its_operator_raises_nothing(node: str) -> None:
    """The runtime refuses such a file; the list is asked before."""
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[n] x) => (z) {{ {node}  z = Neg(y) }}""")
    assert cuda_obstacles(model) is not None


def test_dtypes_that_a_file_does_not_say_are_inferred() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    g (int64[n] x, float[n] z) => (int64[n] y, float[n] w) {{
        a = Neg(x)  b = Cast<to = {}>(a)  c = Neg(b)  y = ReduceProd<keepdims = 1>(c)
        s = Shape(x)  r = com.microsoft.QuickGelu(z)  f = ConstantOfShape(s)  w = Add(r, f) }}"""
    as_ints = ir.from_onnx_text(text.format(7))
    assert all(value.type is None for node in list(as_ints.graph)[:3] for value in node.outputs)
    assert [str(obstacle) for obstacle in cuda_obstacles(as_ints)] == [
        "ReduceProd '' has no CUDA kernel for int64: what it reads and writes is copied in every "
        "run"
    ]
    assert cuda_obstacles(ir.from_onnx_text(text.format(6))) == []
