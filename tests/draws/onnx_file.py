"""Draws what lora_fx.onnx.load checks of a file: stored tensors, and functions that call others."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import onnx
from onnx import TensorProto, helper

FOLDER = Path(tempfile.gettempdir()) / "lora_fx_draws"
SIZES = {"w.data": 96, "short.data": 20, "linked.data": 96}
SHA1 = hashlib.sha1(bytes(96)).hexdigest()
PLACES = ("w.data", "w.data", "w.data", "short.data", "linked.data", "../w.data", "gone.data", "")


def tensor(rng: Random) -> tuple[Path, onnx.TensorProto, dict[Path, str]]:
    """A file's name, a tensor of it, and no sums yet; most tensors are nearly right."""
    _write_data()
    drawn = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 6])
    if rng.random() < 0.4:
        drawn.data_type = rng.choice((*range(26), 77))
    if rng.random() < 0.3:
        drawn.dims[:] = [rng.choice((-1, 0, 1, 2, 3, 4, 24)) for _ in range(rng.randint(0, 4))]
    if rng.random() < 0.02:
        drawn.dims[:] = [1] * rng.choice((8, 32, 33, 65))
    if rng.random() < 0.5:
        _fill(rng, drawn)
    else:
        _place(rng, drawn)
    if rng.random() < 0.05:
        drawn.data_location = rng.choice((0, 1))
    return FOLDER / "m.onnx", drawn, {}


def _write_data() -> None:
    if (FOLDER / "linked.data").exists():
        return
    FOLDER.mkdir(exist_ok=True)
    for name, size in SIZES.items():
        (FOLDER / name).write_bytes(bytes(size))
    (FOLDER / "second.data").hardlink_to(FOLDER / "linked.data")


def _fill(rng: Random, drawn: onnx.TensorProto) -> None:
    count = rng.choice((96, 96, 48, 24, 24, 12, 6, 0))
    field = rng.choice(("raw_data", "raw_data", "float_data", "int32_data", "string_data"))
    if field == "raw_data":
        drawn.raw_data = bytes(count)
    elif field == "string_data":
        drawn.string_data.extend([b"text"] * count)
    else:
        getattr(drawn, field).extend([0] * count)


def _place(rng: Random, drawn: onnx.TensorProto) -> None:
    drawn.data_location = 1
    entries: dict[str, Any] = {"location": rng.choice(PLACES)}
    if rng.random() < 0.7:
        entries["offset"] = rng.choice(("0", "0", "8", "-1", "", "x", "9" * 30))
    if rng.random() < 0.7:
        entries["length"] = rng.choice(("96", "96", "96", "95", "", "1.5"))
    if rng.random() < 0.3:
        entries["checksum"] = rng.choice((SHA1, "a" * 90, "\n"))
    if rng.random() < 0.05:
        entries["odd"] = "1"
    for key, value in entries.items():
        drawn.external_data.add(key=key, value=value)
    if rng.random() < 0.05:
        drawn.external_data.add(key="location", value="w.data")


def functions(rng: Random) -> tuple[Path, onnx.ModelProto]:
    """A file's name, and a model whose functions call others, some of them themselves."""
    names = [f"f{number}" for number in range(rng.randint(0, 6))]
    bodies = []
    for number, name in enumerate(names):
        later = names[number + 1 :] if rng.random() < 0.95 else names
        bodies.append(
            helper.make_function(
                "own", name, [], [], _nodes(rng, later), [helper.make_opsetid("own", 1)]
            )
        )
    graph = helper.make_graph(_nodes(rng, names), "g", [], [])
    return Path("m.onnx"), helper.make_model(graph, functions=bodies)


def _nodes(rng: Random, names: list[str], depth: int = 0) -> list[onnx.NodeProto]:
    nodes = []
    for _ in range(rng.randint(1, 5)):
        if names and rng.random() < 0.6:
            nodes.append(helper.make_node(rng.choice(names), [], [], domain="own"))
        elif depth < 3 and rng.random() < 0.3:
            body = helper.make_graph(_nodes(rng, names, depth + 1), "body", [], [])
            nodes.append(helper.make_node("Loop", [], [], body=body))
        else:
            nodes.append(helper.make_node("Add", [], []))
    return nodes
