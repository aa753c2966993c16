"""What WebGPU's provider computes wrongly: a reproduction of each fault, and that none reaches us.

A reproduction that fails says that the package has mended the fault: its rule can go.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import lora_fx
from lora_fx.compare import ORT_TOL, rel
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.onnx import webgpu_faults
from lora_fx.onnx.session import open_session
from lora_fx.onnx.webgpu_faults import cpu_nodes
from tests.providers import GPU, ON_GPU

ON_WEBGPU = [*ON_GPU, pytest.mark.skipif(GPU != "webgpu", reason="faults of WebGPU's provider")]
ROOT = Path(__file__).parents[2]
Feeds = dict[str, Any]


def floats(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype("f")


def truths(*shape: int) -> Any:
    return np.random.default_rng(0).random(shape) > 0.5


def one_node(
    operator: str, feeds: Feeds, weights: Feeds | None = None, **attributes: Any
) -> onnx.ModelProto:
    """A model of one node, of which every input size is free."""
    weights = weights or {}
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
        )
        for name, array in feeds.items()
    ]
    dtype = TensorProto.BOOL if operator == "And" else TensorProto.FLOAT
    rank = next(iter(feeds.values())).ndim
    node = helper.make_node(operator, [*feeds, *weights], ["y"], name="one", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", dtype, [None] * rank)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def on_cpu(model: onnx.ModelProto, feeds: Feeds) -> Any:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def plainly(model: onnx.ModelProto, runs: Sequence[Feeds], folder: Path) -> list[Any]:
    """The first output of each run on WebGPU in any program; fewer where the process ends."""
    path = folder / "m.onnx"
    onnx.save(model, path)
    names = []
    for number, feeds in enumerate(runs):
        np.savez(folder / f"{number}.npz", **feeds)
        names.append(str(folder / f"{number}.npz"))
    command = [sys.executable, "-m", "tests.onnx.webgpu_plain", str(path), *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if result.returncode > 0:
        raise AssertionError(result.stderr[-500:])
    return [np.array(json.loads(line)[0]) for line in result.stdout.splitlines()]


def conv(groups: int, of_group: int, out: int, operator: str = "Conv") -> tuple[Any, Feeds]:
    """A convolution of so many channels in a group, and out of all groups."""
    feeds = {"x": floats(2, groups * of_group, 4, 5)}
    shape = (out, of_group, 3, 3)
    if operator == "ConvTranspose":
        shape = (groups * of_group, out // groups, 3, 3)
    return one_node(operator, feeds, {"w": floats(*shape)}, group=groups), feeds


WRONG = {
    "input channels in threes": (1, 6, 8),
    "input channels in threes, nine": (1, 9, 4),
    "groups of six": (2, 4, 12),
    "groups of five": (2, 2, 10),
    "transposed groups of one": (2, 2, 2, "ConvTranspose"),
}
RIGHT = {"three channels": (1, 3, 8), "a depthwise one": (4, 1, 4), "groups of four": (2, 3, 8)}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_a_convolution_that_would_be_wrong_runs_on_the_cpu(case: Any) -> None:
    model, _ = conv(*case)
    nodes = cpu_nodes(model)
    assert nodes.names == ["one"]
    operator = model.graph.node[0].op_type
    expected = (
        "on the CPU, as onnxruntime-ep-webgpu 0.4.0 computes such nodes wrongly or not at all"
    )
    assert nodes.note == f"{expected}: 1 {operator}"


@pytest.mark.parametrize("case", RIGHT.values(), ids=RIGHT)
def test_another_convolution_stays_on_the_device(case: Any) -> None:
    model, _ = conv(*case)
    assert cpu_nodes(model) == webgpu_faults.CpuNodes()


def test_a_maximum_with_its_places_runs_on_the_cpu() -> None:
    model = pool()
    assert cpu_nodes(model).names == ["one"]
    del model.graph.node[0].output[1]
    assert cpu_nodes(model).names == ()


def test_a_weight_that_is_computed(tmp_path: Path) -> None:
    """W + A·B has the shape of W; where no shape is known, the node runs on the CPU."""
    for channels, wrong in ((6, True), (8, False)):
        module = nn.Sequential(nn.Conv1d(channels, 8, 3), nn.ReLU()).eval()
        path = tmp_path / f"{channels}.onnx"
        lora_fx.export(module, path, (torch.randn(2, channels, 9),), mode="switch", provider="cpu")
        model = onnx.load(path)
        found = list(cpu_nodes(model).names)
        assert found == [node.name for node in model.graph.node if node.op_type == "Conv"] * wrong

    both = {"x": floats(1, 4, 5, 5), "w": floats(4, 4, 3, 3)}
    assert cpu_nodes(one_node("Conv", both)).names == ["one"]


def test_a_node_inside_of_another_and_one_without_a_name(tmp_path: Path) -> None:
    inner, _ = conv(1, 6, 8)
    branch = helper.make_graph(inner.graph.node, "branch", [], inner.graph.output)
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    inner.graph.ClearField("node")
    inner.graph.node.append(node)
    assert cpu_nodes(inner).names == ["one", "one"]

    model, _ = conv(1, 6, 8)
    model.graph.node[0].name = ""
    with pytest.raises(LoraFxError, match="a node Conv without a name of its own"):
        cpu_nodes(model)


def on_webgpu(test: Any) -> Any:
    for mark in ON_WEBGPU:
        test = mark(test)
    return test


MENDED = "the package has mended it: this rule of webgpu_faults can go"


@on_webgpu
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_the_provider_computes_a_convolution_wrongly(case: Any, tmp_path: Path) -> None:
    model, feeds = conv(*case)
    (found,) = plainly(model, [feeds], tmp_path)
    assert rel(found, on_cpu(model, feeds)) > 0.1, MENDED


@on_webgpu
def test_no_convolution_is_wrong_in_our_sessions(tmp_path: Path) -> None:
    """Group and channel counts around those that are wrong, and kernels of other strides."""
    plain = itertools.product([1], [1, 3, 4, 6, 7, 9, 12, 15, 24], [3, 4, 8, 12])
    grouped = ((g, i, g * o) for g, i, o in itertools.product([2, 3, 4], [1, 2, 3], [1, 4, 5, 6]))
    transposed = (
        (g, i, g * o, "ConvTranspose") for g, i, o in itertools.product([1, 2], [2, 3], [1, 3, 4])
    )
    cases: list[Any] = [*plain, *grouped, *transposed]
    for case in cases:
        model, feeds = conv(*case)
        onnx.save(model, tmp_path / "m.onnx")
        session = open_session(tmp_path / "m.onnx", GPU)
        assert rel(session.run(feeds)["y"], on_cpu(model, feeds)) <= ORT_TOL, case


AND_RUNS = [
    {"x": truths(1, 1, 1, 1), "z": truths(3, 1, 1, 4)},
    {"x": truths(1, 1, 4, 4), "z": np.ones((3, 1, 1, 4), bool)},
]


@on_webgpu
def test_the_provider_leaves_a_wrong_program_of_and(tmp_path: Path) -> None:
    model = one_node("And", AND_RUNS[0])
    alone = plainly(model, AND_RUNS[1:], tmp_path)
    after_another = plainly(model, AND_RUNS, tmp_path)
    expected = on_cpu(model, AND_RUNS[1])
    np.testing.assert_array_equal(alone[0], expected)
    assert not np.array_equal(after_another[1], expected), MENDED


@on_webgpu
def test_and_is_right_in_our_sessions(tmp_path: Path) -> None:
    model = one_node("And", AND_RUNS[0])
    onnx.save(model, tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx", GPU)
    for feeds in AND_RUNS:
        np.testing.assert_array_equal(session.run(feeds)["y"], on_cpu(model, feeds))


def pool() -> onnx.ModelProto:
    model = one_node("MaxPool", {"x": floats(1, 2, 4, 4)}, kernel_shape=[2, 2], strides=[2, 2])
    model.graph.node[0].output.append("at")
    model.graph.output.append(
        helper.make_tensor_value_info("at", TensorProto.INT64, [None, None, None, None])
    )
    return model


@on_webgpu
def test_the_provider_fails_at_the_places_of_a_maximum(tmp_path: Path) -> None:
    feeds = {"x": floats(1, 2, 4, 4)}
    with pytest.raises(AssertionError, match=r"pool\.cc"):
        plainly(pool(), [feeds], tmp_path)
    session = open_session(tmp_path / "m.onnx", GPU)
    np.testing.assert_array_equal(session.run(feeds)["y"], on_cpu(pool(), feeds))


class Stack(nn.Module):
    """A product with a stack of weights, whose branch is no Gemm: that operator takes rank 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@on_webgpu
@pytest.mark.parametrize(("target", "outputs"), [("cpu", 0), ("webgpu", 1)])
def test_a_rank_of_zero_ends_another_program(target: Any, outputs: int, tmp_path: Path) -> None:
    """And --target webgpu makes a file that does not."""
    path = tmp_path / "s.onnx"
    x = torch.randn(3, 2, 4)
    lora_fx.export(Stack().eval(), path, (x,), mode="switch", provider="cpu", target=target)
    feeds = {"x": x.numpy()}
    found = plainly(onnx.load(path), [feeds], tmp_path)
    assert len(found) == outputs, MENDED
    expected = open_session(path, "cpu").run(feeds)["output"]
    assert all(rel(array, expected) <= ORT_TOL for array in found)
    assert rel(open_session(path, GPU).run(feeds)["output"], expected) <= ORT_TOL


@on_webgpu
def test_a_proof_refuses_what_no_rule_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webgpu_faults, "_may_be_wrong", lambda *_: False)
    module = nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU()).eval()
    with pytest.raises(NoEffectError, match="ONNX Runtime differs from torch"):
        lora_fx.export(module, tmp_path / "m.onnx", (torch.randn(2, 6, 9),), provider=GPU)
    assert not (tmp_path / "m.onnx").exists()


@on_webgpu
def test_an_export_says_which_nodes_run_on_the_cpu(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU()).eval()
    path = tmp_path / "m.onnx"
    report = lora_fx.export(module, path, (torch.randn(2, 6, 9),), provider=GPU)
    assert any(
        "computes such nodes wrongly or not at all: 1 Conv" in line for line in report.warnings
    )


@on_webgpu
@pytest.mark.skipif(sys.platform != "linux", reason="the drivers are Vulkan's on Linux alone")
def test_a_machine_without_a_driver_has_no_webgpu() -> None:
    """Its provider lists a device all the same, on which no session can be made."""
    code = """if True:
        from lora_fx.errors import LoraFxError
        from lora_fx.onnx.session import open_session, providers
        print(providers())
        for _ in range(2):
            try:
                open_session("any.onnx", "webgpu")
            except LoraFxError as error:
                print(error.message)
    """
    no_driver = dict.fromkeys(("VK_ICD_FILENAMES", "VK_DRIVER_FILES"), "/nonexistent.json")
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, **no_driver},
    )
    refusal = "WebGPU was requested, but cannot be used: it finds no GPU"
    assert result.stdout.splitlines() == ["['cpu']", refusal, refusal]
