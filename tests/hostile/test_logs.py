"""Names with control characters, and what else writes to the terminal: ONNX Runtime's own log.

A node that fails is quoted by the runtime on stderr, as it is called: a name with a line break is a
second "Error:" line, one with an escape sequence repaints the screen. Here every place of a graph
that has a name has such a one, where the graph runs and where it fails as it is loaded, as it is
run, and as ONNX's own checker looks at it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lora_fx
from tests.hostile import child

FAKE = "Error: fake"
NAMES = {
    "line": f"a\n{FAKE}\nHint: fake",
    "return": f"a\r{FAKE}",
    "escape": f"\x1b[2J\x1b[31m{FAKE}",
    "one-byte escape": f"\x9b2J{FAKE}",
    "line separator": f"a\u2028{FAKE}",
    "bell and backspaces": f"a\x07{8 * chr(8)}{FAKE}",
    "next line": f"a\x85{FAKE}",
    "right to left": f"\u202e{FAKE}",
}
ENDS = {
    "runs": ("MatMul", "Relu"),
    "fails as it is run": ("MatMul", "Reshape"),
    "fails as it is loaded": ("MatMul", "Unknown"),
    "has an index out of range": ("Gather", "Relu"),
    "has sizes that do not fit": ("MatMul", "Add"),
}
PLACES = ("node", "value", "input", "output", "initialiser", "op", "domain", "graph", "metadata",
          "document", "size", "function")  # fmt: skip
COMMANDS = (
    "targets bad.onnx", "insert bad.onnx -o out.onnx -r 2", "verify bad.onnx bad.onnx",
    "bench bad.onnx --rounds 3", "export bad.onnx -o out.onnx --optimise",
    "export bad.onnx -o out.onnx --precision float16",
    "export bad.onnx -o out.onnx --precision int8",
    "export bad.onnx -o out.onnx --mode switch", "export bad.onnx one -o out.onnx --mode batch",
    "export bad.onnx one -o out.onnx", "merge bad.onnx one -o out.onnx",
)  # fmt: skip


def model(place: str, name: str, end: str) -> onnx.ModelProto:
    """y = op(x W) with the name in one place."""

    def called(where: str, plain: str) -> str:
        return name if where == place else plain

    first, last = ENDS[end]
    x, y, w = called("input", "x"), called("output", "y"), called("initialiser", "w")
    middle = called("value", "a")
    shape = {
        "Reshape": np.array([7, -1]),
        "Add": np.ones((1, 1, 7, 7), "f4"),
        "Gather": np.array([5, 99]),
    }
    tensors = [numpy_helper.from_array(np.linspace(-1, 1, 24, dtype="f4").reshape(4, 6), w)]
    inputs, nodes = [middle], []
    if last in shape:
        tensors.append(numpy_helper.from_array(shape[last], called("initialiser", "s") + "s"))
        inputs.append(tensors[-1].name)
    nodes.append(helper.make_node("MatMul", [x, w], [middle], name=called("node", "n")))
    if first == "Gather":
        tensors.append(numpy_helper.from_array(shape["Gather"], called("initialiser", "i") + "i"))
        picked = called("value", "p") + "p"
        nodes.append(
            helper.make_node("Gather", [middle, tensors[-1].name], [picked], name=name, axis=1)
        )
        inputs[0] = picked
    op, domain = called("op", last), called("domain", "")
    nodes.append(helper.make_node(op, inputs, [y], name=called("node", "m") + "m", domain=domain))
    batch = called("size", "batch")
    graph = helper.make_graph(
        nodes,
        called("graph", "g"),
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
        tensors,
        doc_string=called("document", ""),
    )
    opsets = [helper.make_opsetid("", 17)]
    if place == "domain":
        opsets.append(helper.make_opsetid(name, 1))
    functions = []
    if place == "function":
        opsets.append(helper.make_opsetid("own", 1))
        body = [helper.make_node("Identity", ["p"], ["q"], name=name)]
        functions.append(
            helper.make_function("own", name, ["p"], ["q"], body, [helper.make_opsetid("", 17)])
        )
        graph.node.append(helper.make_node(name, [y], [f"{y}{name}"], domain="own"))
        graph.output[0].name = f"{y}{name}"
    made = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)
    if place == "metadata":
        helper.set_model_props(made, {name: name, "lora_fx.ranges": name})
    return made


def faults(outcome: child.Outcome) -> Iterator[str]:
    """What a terminal would take for something else, and what the user would."""
    text = outcome.out + outcome.err
    for found in set(re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", text)):
        yield f"{found!r}"
    lines = [line.strip() for line in text.splitlines()]
    if any(line.startswith((FAKE, "Hint: fake")) for line in lines):
        yield "a fake line"
    if sum(line.startswith("Error:") for line in lines) > 1:
        yield "two errors"
    if any("[E:onnxruntime" in line or "[W:onnxruntime" in line for line in lines):
        yield "the runtime's own log"
    if outcome.raw:
        yield f"raw: {outcome.err[-400:]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    child.prepare()
    made: Path = tmp_path_factory.mktemp("logs")
    a, b = np.ones((2, 4), "f4"), np.ones((6, 2), "f4")
    lora_fx.save_adapter(lora_fx.Adapter({"w": lora_fx.LowRank(a, b, 2.0)}), made / "one")
    return made


def check(folder: Path, made: onnx.ModelProto, commands: tuple[str, ...] = COMMANDS) -> None:
    (folder / "bad.onnx").write_bytes(made.SerializeToString())
    before = sorted(p.name for p in folder.iterdir())
    for line in commands:
        outcome = child.command(line.split(), folder, seconds=20)
        assert not [*faults(outcome)], (line, [*faults(outcome)], outcome.err)
        assert outcome.code in (0, 1, 2)
        for path in folder.iterdir():
            if path.name not in before:
                assert outcome.code == 0, (line, path)
                path.unlink()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_node_is_quoted_in_one_line(name: str, end: str, folder: Path) -> None:
    """The commands that run a graph."""
    check(folder, model("node", NAMES[name], end), ("verify bad.onnx bad.onnx", COMMANDS[7]))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("end", ENDS)
def test_every_place_of_a_name(place: str, end: str, folder: Path) -> None:
    check(folder, model(place, "".join(NAMES.values()), end))


QUICK = [("value", "has an index out of range"), ("initialiser", "fails as it is run"),
         ("op", "fails as it is loaded"), ("output", "has sizes that do not fit"),
         ("domain", "runs"), ("function", "runs"), ("input", "fails as it is run"),
         ("metadata", "runs"), ("size", "has an index out of range")]  # fmt: skip


@pytest.mark.parametrize("place, end", QUICK)
def test_a_place_of_a_name(place: str, end: str, folder: Path) -> None:
    check(folder, model(place, NAMES["line"] + NAMES["escape"], end), (*COMMANDS[2:4], COMMANDS[8]))


def test_a_plain_failure_is_still_told(folder: Path) -> None:
    """Nothing is lost with the log: the error names the node and what the runtime says."""
    (folder / "bad.onnx").write_bytes(
        model("node", "the node", "fails as it is run").SerializeToString()
    )
    outcome = child.command(["verify", "bad.onnx", "bad.onnx"], folder, seconds=20)
    assert outcome.refused and "the nodem" in outcome.err and "Reshape" in outcome.err
