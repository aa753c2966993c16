"""The forms of a graph for a device: what each rewrite takes and leaves, one small graph a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import lora_fx
from lora_fx.dtypes import Array
from lora_fx.onnx.candidate_error import open_model
from lora_fx.onnx.cuda_obstacles import cuda_obstacles
from lora_fx.onnx.made_for import DEVICE_FORMS, PROPERTY, make_for
from lora_fx.onnx.rewrites.pad_to_concat import PadToConcat
from lora_fx.onnx.rewrites.range_from_size import RangeFromSize

ZERO_TO_N = """rows = Shape<start = 0, end = 1>(x)  axes = Constant<value_ints = [0]>()
    n = Squeeze(rows, axes)  columns = Shape<start = 1, end = 2>(x)  m = Squeeze(columns, axes)
    zero = Constant<value_int = 0>()  one = Constant<value_int = 1>()
    two = Constant<value_int = 2>()  three = Constant<value_int = -3>()
    """
RANGES = {
    "a range and a size": ("r = Range(zero, n, one)  y = Add(r, m)", True),
    "a size and a range": ("r = Range(zero, n, one)  y = Add(m, r)", True),
    "a size of shape [1]": ("r = Range(zero, n, one)  y = Add(r, columns)", True),
    "other bounds and steps": ("r = Range(three, n, two)  y = Add(r, m)", True),
    "downwards": ("r = Range(n, three, three)  y = Add(r, m)", True),
    "without numbers": ("r = Range(n, three, one)  y = Add(r, m)", True),
    "a bound of shape [1]": ("r = Range(axes, n, one)  y = Add(r, m)", False),
    "bounds and a size of shape [1]": ("r = Range(axes, rows, one)  y = Add(r, columns)", False),
    "two sizes": ("r = Range(zero, n, one)  s = Add(r, m)  y = Add(n, s)", True),
    "a range that others read": ("r = Range(zero, n, one)  s = Add(r, m)  y = Mul(s, r)", True),
    "a constant": ("r = Range(zero, n, one)  y = Add(r, two)", False),
    "a number of the device": (
        "z = Squeeze(i)  d = Mul(z, z)  r = Range(zero, n, one)  y = Add(r, d)", False,
    ),
    "no range": ("r = Expand(two, rows)  y = Add(r, m)", False),
    "a difference": ("r = Range(zero, n, one)  y = Sub(r, m)", False),
}  # fmt: skip
"""Nodes, and whether they change. What a constant adds is on the device already."""
STAY = ("no range", "a difference", "a bound of shape [1]", "bounds and a size of shape [1]")
"""Sums that stay, although they are in the way."""
PADS = {
    "after the last axis": ("a = Constant<value_ints = [0, 0, 0, 1]>()  y = Pad(d, a, v)", True),
    "all around": ("a = Constant<value_ints = [1, 2, 3, 4]>()  y = Pad(d, a, v)", True),
    "with zeros": ("a = Constant<value_ints = [1, 0, 0, 2]>()  y = Pad(d, a)", True),
    "one axis from the end": (
        "a = Constant<value_ints = [2, 1]>()  e = Constant<value_ints = [-1]>()"
        "  y = Pad(d, a, v, e)", True,
    ),
    "by nothing": ("a = Constant<value_ints = [0, 0, 0, 0]>()  y = Pad(d, a, v)", False),
    "a cut": ("a = Constant<value_ints = [0, -1, 0, 1]>()  y = Pad(d, a, v)", False),
    "by copies of the edge": (
        "a = Constant<value_ints = [0, 0, 0, 1]>()  y = Pad<mode = \"edge\">(d, a)", False,
    ),
    "by computed amounts": ("s = Shape(x)  a = Concat<axis = 0>(s, s)  y = Pad(d, a, v)", False),
    "floats": (
        "a = Constant<value_ints = [0, 0, 0, 1]>()  f = Cast<to = 1>(d)  p = Pad(f, a)"
        "  y = Cast<to = 7>(p)", False,
    ),
    "sizes": (
        "s = Shape(x)  a = Constant<value_ints = [0, 1]>()  p = Pad(s, a, v)  t = Expand(d, p)"
        "  y = Neg(t)", False,
    ),
}  # fmt: skip


def model_of(nodes: str, y: str, opset: int = 20) -> ir.Model:
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
    g (int64[a, b] x, int64[1] i) => ({y}) {{ {nodes} }}"""
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def result(model: ir.Model, shape: tuple[int, int]) -> Array:
    numbers = np.random.default_rng(0).integers(-9, 9, shape)
    return open_model(model.clone(), "cpu").run({"x": numbers, "i": np.array([2])})["y"]


def check_rewrite(rewrite: ir.passes.InPlacePass, model: ir.Model, *, changes: bool) -> None:
    """A rewrite changes a graph or leaves it, and its numbers are the same to the last bit."""
    shapes = [(2, 3), (4, 1), (1, 5), (0, 3)]
    text = str(model.graph)
    before = [result(model, shape) for shape in shapes]
    assert rewrite(model).modified is changes
    assert (str(model.graph) != text) is changes
    assert not rewrite(model).modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for shape, expected in zip(shapes, before, strict=True):
        np.testing.assert_array_equal(result(model, shape), expected)


@pytest.mark.parametrize("name", RANGES)
def test_ranges_and_sizes(name: str) -> None:
    nodes, changes = RANGES[name]
    model = model_of(ZERO_TO_N + nodes, "int64[k] y")
    assert bool(cuda_obstacles(model)) is (changes or name in STAY)
    check_rewrite(RangeFromSize(), model, changes=changes)
    if changes:
        assert cuda_obstacles(model) == []


@pytest.mark.parametrize("name", PADS)
def test_pads_of_integers(name: str) -> None:
    nodes, changes = PADS[name]
    value = "v = Constant<value_int = -100>()  d = Mul(x, x)  "
    model = model_of(value + nodes, "int64[k, l] y")
    if name != "sizes":
        check_rewrite(PadToConcat(), model, changes=changes)
    assert not PadToConcat()(model).modified
    if changes:
        assert cuda_obstacles(model) == []


def nodes_of(model: ir.Model) -> list[str]:
    """The nodes of a graph as text, without constants."""
    return [
        f"{', '.join(str(y.name) for y in node.outputs)} = {node.op_type}"
        f"({', '.join(str(x.name) for x in node.inputs if x is not None)})"
        for node in model.graph
        if node.op_type != "Constant"
    ]


def test_the_positions_of_a_decoder() -> None:
    model = model_of(ZERO_TO_N + RANGES["a range and a size"][0], "int64[k] y")
    RangeFromSize()(model)
    assert nodes_of(model) == [
        "rows = Shape(x)",
        "n = Squeeze(rows, axes)",
        "columns = Shape(x)",
        "m = Squeeze(columns, axes)",
        "y_limit = Add(n, m)",
        "y = Range(m, y_limit, one)",
    ]


def test_the_labels_of_a_step() -> None:
    value = "v = Constant<value_int = -100>()  d = Mul(x, x)  "
    model = model_of(value + PADS["after the last axis"][0], "int64[k, l] y")
    PadToConcat()(model)
    assert nodes_of(model) == [
        "d = Mul(x, x)",
        "y_after_1_sizes_to = Shape(d)",
        "y_after_1_sizes_from = Shape(d)",
        "y_after_1_sizes = Concat(y_after_1_sizes_to, y_after_1_length, y_after_1_sizes_from)",
        "y_after_1 = Expand(v, y_after_1_sizes)",
        "y = Concat(d, y_after_1)",
    ]


REWRITTEN: dict[str, tuple[ir.passes.InPlacePass, str, str]] = {
    "ranges": (
        RangeFromSize(), "int64[k] y", ZERO_TO_N + "r = Range(three, n, one)  y = Add(r, columns)",
    ),
    "pads": (
        PadToConcat(), "int64[k, l] y",
        "a = Constant<value_ints = [1, 2, 3, 4]>()  d = Mul(x, x)  y = Pad(d, a)",
    ),
}  # fmt: skip
TAKEN_BY = {
    "an input": ("int64[1] {name}", "", "z = Add({name}, i)"),
    "an initialiser": ("", "int64[1] {name} = {{7}}", "z = Add({name}, i)"),
    "a result": ("", "", "{name} = Neg(i)  z = Add({name}, i)"),
    "a result of an inner graph": (
        "", "",
        "yes = Constant<value = bool {{1}}>()  z = If(yes) <"
        "then_branch = t () => (int64[1] u) {{ {name} = Neg(i)  u = Neg({name}) }}, "
        "else_branch = e () => (int64[1] v) {{ v = Identity(i) }}>",
    ),
}  # fmt: skip
"""What has a name already: its input, its initialiser, and nodes that make z of it."""


def names_of(model: ir.Model) -> set[str]:
    results = {str(value.name) for node in model.graph.all_nodes() for value in node.outputs}
    return results | set(model.graph.initializers)


@pytest.mark.parametrize("taken_by", TAKEN_BY)
@pytest.mark.parametrize("rewritten", REWRITTEN)
def test_new_values_have_names_that_no_value_has(rewritten: str, taken_by: str) -> None:
    rewrite, y, nodes = REWRITTEN[rewritten]
    model = model_of(nodes, y)
    names = names_of(model)
    rewrite(model)
    new_names = names_of(model) - names
    assert new_names

    feeds = {"x": np.arange(6).reshape(2, 3), "i": np.array([2])}
    for name in sorted(new_names):
        taken = [text.format(name=name) for text in TAKEN_BY[taken_by]]
        inputs, initialisers, readers = taken
        all_inputs = ", ".join(filter(None, ["int64[a, b] x", "int64[1] i", inputs]))
        text = f"""<ir_version: 10, opset_import: ["" : 20]>
        g ({all_inputs}) => ({y}, int64[1] z) <{initialisers}> {{ {nodes}  {readers} }}"""
        proto = onnx.parser.parse_model(text)
        if not initialisers:
            proto.graph.ClearField("initializer")
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        if inputs:
            feeds[name] = np.array([5])
        expected = open_model(model.clone(), "cpu").run(feeds)
        assert rewrite(model).modified
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        after = open_model(model, "cpu").run(feeds)
        for output, numbers in expected.items():
            np.testing.assert_array_equal(after[output], numbers)
        feeds.pop(name, None)


OLD_FORMS = {
    "ranges": (
        RangeFromSize(), 11, "int64[k] y",
        """s = Shape(x)  zero = Constant<value = int64 {0}>()  one = Constant<value = int64 {1}>()
        last = Constant<value = int64[1] {1}>()  n = Gather(s, zero)  columns = Gather(s, last)
        r = Range(zero, n, one)  y = Add(r, columns)""",
    ),
    "pads": (
        PadToConcat(), 15, "int64[k, l] y",
        "a = Constant<value = int64[4] {0, 0, 0, 1}>()  d = Mul(x, x)  y = Pad(d, a)",
    ),
}  # fmt: skip
"""A rewrite, the first opset that has its operators, and nodes that older opsets have as well."""


@pytest.mark.parametrize("opset", [11, 13, 14, 15, 20])
@pytest.mark.parametrize("name", OLD_FORMS)
def test_forms_have_operators_that_the_opset_has(name: str, opset: int) -> None:
    """Where it has none, the graph stays, and its obstacle is reported."""
    rewrite, first, y, nodes = OLD_FORMS[name]
    model = model_of(nodes, y, opset=opset)
    check_rewrite(rewrite, model, changes=opset >= first)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert bool(cuda_obstacles(model)) is (opset < first)


def test_a_file_for_the_cpu_keeps_its_forms() -> None:
    model = model_of(ZERO_TO_N + RANGES["a range and a size"][0], "int64[k] y")
    text = str(model)
    make_for(model, "cpu")
    assert str(model) == text


def test_forms_of_a_file_that_is_written_again_are_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run comes after them there, so each is a stage, and one that differs is rolled back."""
    model = model_of(ZERO_TO_N + "r = Range(zero, n, one)  y = Add(r, m)", "int64[k] y")
    ir.save(model, tmp_path / "a.onnx")

    options = {"optimise": True, "provider": "cpu", "target": "cuda"}
    report = lora_fx.export(tmp_path / "a.onnx", tmp_path / "b.onnx", **options)
    stages = {stage["name"]: stage["kept"] for stage in report.details["stages"]}
    assert stages["ranges from sizes"] and all(stages.values())
    assert not any("rolled back" in warning for warning in report.warnings)
    assert report.details["cuda"]["capturable"]
    written = ir.load(tmp_path / "b.onnx")
    assert written.metadata_props[PROPERTY] == "cuda"

    def wrong(self: object, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph:
            if node.op_type == "Add":
                node.replace_input_with(1, node.inputs[0])
        return ir.passes.PassResult(model, True)

    monkeypatch.setattr(type(DEVICE_FORMS["ranges from sizes"]), "call", wrong)
    report = lora_fx.export(tmp_path / "a.onnx", tmp_path / "c.onnx", **options)
    stages = {stage["name"]: stage["kept"] for stage in report.details["stages"]}
    assert not stages["ranges from sizes"]
    (warning,) = [text for text in report.warnings if "rolled back" in text]
    assert "'ranges from sizes' for cuda" in warning and "output 'y'" in warning
    assert [node.op_type for node in ir.load(tmp_path / "c.onnx").graph].count("Add") == 1
    assert not report.details["cuda"]["capturable"]
