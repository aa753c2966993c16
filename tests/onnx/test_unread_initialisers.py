"""Every initialiser of a written file has a reader; ONNX Runtime warns at each load otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, draw
from tests.zoo.shared import captured

OPTIONS: dict[str, dict[str, Any]] = {
    "merged": {},
    "float16": {"precision": "float16"},
    "switch": {"mode": "switch"},
    "batch": {"mode": "batch"},
    "load": {"mode": "load"},
    "int4": {"mode": "switch", "quantise": "int4"},
    "train": {"mode": "train"},
}
IN_EVERY_RUN = (
    *(("hf_llama/1", options) for options in ("merged", "batch")),
    ("hf_gpt2/1", "switch"),
    ("tied_head", "merged"),
)


def drawn_adapter(model: Any) -> Adapter:
    entries = {}
    for target in lora_fx.find(model).targets:
        if target.op != "embedding":  # of positions, which are those of every row
            a, b = draw(target.key, target.layout, 2, 1, "probe")
            entries[target.key] = LowRank(a, 0.05 * b, 4.0, target.layout)
    return Adapter(entries)


def unread(path: str) -> set[str]:
    """The initialisers that no node reads, in any body, and that are no output."""
    graph = onnx.load(path, load_external_data=False).graph
    read: set[str] = set()
    graphs = [graph]
    while graphs:
        body = graphs.pop()
        read.update(output.name for output in body.output)
        for node in body.node:
            read.update(node.input)
            graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return {tensor.name for tensor in graph.initializer} - read


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            name, options, marks=() if (name, options) in IN_EVERY_RUN else pytest.mark.slow
        )
        for name in ("hf_llama/1", "hf_gpt2/1", "hf_bert/1", "tied_head")
        for options in OPTIONS
    ],
)
def test_every_initialiser_is_read(name: str, options: str, tmp_path: Path) -> None:
    model, _, _ = captured(name)
    adapter = drawn_adapter(model)
    given = OPTIONS[options]
    adapters: Any = adapter
    if given.get("mode", "train") != "train":
        adapters = {"first": adapter, "second": adapter}
    report = lora_fx.export(model, tmp_path / "m.onnx", adapters=adapters, provider="cpu", **given)
    files = [file for file in report.outputs if file.endswith(".onnx")]
    assert files and not set().union(*map(unread, files))
