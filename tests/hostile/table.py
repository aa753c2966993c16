"""Hostile files: what makes each, and every command that could read it.

Each row is red where the command does not end with exit 2, one line of error and one of hint, or
writes anything, changes an input or its mode, takes more than 10 s or 1 GB. Where another end is
right, the row says so.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

EXTERNAL = TensorProto.EXTERNAL


@dataclass(frozen=True)
class Case:
    """A hostile file among valid ones (see mutate.make).

    Attributes:
        make: What makes it, in the folder of the valid ones.
        lines: Commands.
        codes: Exit codes that are right.
        seconds: That it may take, where a declared limit is another.
        say: What the error has to name.
    """

    make: Callable[[Path], object]
    lines: tuple[str, ...]
    codes: frozenset[int] = field(default_factory=lambda: frozenset({2}))
    seconds: float = 10.0
    say: str = ""


READ_ONNX = (
    "targets bad.onnx", "merge bad.onnx peft -o out.onnx", "insert bad.onnx -o out.onnx -r 2",
    "export bad.onnx peft -o out.onnx", "export bad.onnx peft -o out.onnx --mode switch",
    "verify bad.onnx graph.onnx", "verify graph.onnx bad.onnx", "bench bad.onnx",
    "export graph.onnx bad.onnx -o out.onnx", "convert bad.onnx -o out",
    "export bad.onnx peft -o out.onnx --triton repository",
)  # fmt: skip
READ_ADAPTER = (
    "merge base.safetensors {0} -o out.safetensors", "merge-all base.safetensors {0} -o out",
    "convert {0} -o out.safetensors --format kohya", "truncate {0} -o out --rank 1",
    "verify base.safetensors {0}", "doctor base.safetensors {0}",
    "export graph.onnx {0} -o out.onnx", "merge graph.onnx {0} -o out.onnx",
)  # fmt: skip
READ_FOLDER = (
    "merge {0} peft -o out", "merge-all {0} peft -o out", "verify {0} peft", "doctor {0} peft",
    "extract {0} base.safetensors -o out --rank 1", "targets {0}",
    "verify {0} base.safetensors --adapter peft",
)  # fmt: skip


def of(lines: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The commands with a name in the place of {0}."""
    return tuple(line.format(name) for line in lines)


# .onnx


def graph_with(change: Callable[[Any, Path], object]) -> Callable[[Path], None]:
    """bad.onnx: graph.onnx with a change of its protobuf."""

    def make(folder: Path) -> None:
        model = onnx.load(folder / "graph.onnx")
        change(model, folder)
        (folder / "bad.onnx").write_bytes(model.SerializeToString())

    return make


def place(location: str, *, mark: bool = True, dtype: int = TensorProto.FLOAT) -> Any:
    """A change: one more tensor that is said to lie somewhere."""

    def change(model: Any, folder: Path) -> None:
        made = model.graph.initializer.add(name="far", data_type=dtype, dims=[4])
        made.data_location = EXTERNAL if mark else 0
        if not mark and dtype == TensorProto.STRING:
            made.string_data.extend([b"x"] * 4)  # whole by itself: who copies places takes the file
        elif not mark:
            made.raw_data = bytes(16)
        for key, value in (("location", location), ("offset", "0"), ("length", "16")):
            made.external_data.add(key=key, value=value)

    return change


def in_a_body(model: Any, folder: Path) -> None:
    """The same in the attribute of a node."""
    node = model.graph.node.add(op_type="Constant", output=["c"], name="c")
    tensor = TensorProto(name="far", data_type=1, dims=[4], data_location=EXTERNAL)
    tensor.external_data.add(key="location", value="../../../../../etc/passwd")
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)


def in_a_function(model: Any, folder: Path) -> None:
    """The same in the body of a function that nothing calls."""
    in_a_body(model, folder)
    node = model.graph.node.pop()
    made = helper.make_function("f", "F", [], ["c"], [node], [helper.make_opsetid("", 18)])
    model.functions.append(made)


def linked_data(model: Any, folder: Path) -> None:
    """Data beside the model that is a link to a file outside."""
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_bytes(bytes(16))
    (folder / "w.data").symlink_to(outside / "secret")
    place("w.data")(model, folder)


def functions(depth: int, *, loop: bool = False) -> Any:
    """A change: functions of which each calls the next twice, or one another in a circle."""

    def change(model: Any, folder: Path) -> None:
        opset = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
        for i in range(depth):
            last = i + 1 == depth and not loop
            name = "Identity" if last else f"F{(i + 1) % depth}"
            domain = "" if last else "f"
            nodes = [helper.make_node(name, ["x"], ["m"], domain=domain),
                     helper.make_node(name, ["m"], ["y"], domain=domain)]  # fmt: skip
            model.functions.append(helper.make_function("f", f"F{i}", ["x"], ["y"], nodes, opset))
        model.opset_import.append(helper.make_opsetid("f", 1))
        model.graph.node[0].input[0] = "z"
        model.graph.node.insert(0, helper.make_node("F0", ["x"], ["z"], domain="f"))

    return change


def nodes(count: int) -> Any:
    """A change: a chain of nodes before the product."""

    def change(model: Any, folder: Path) -> None:
        names = ["x", *(f"v{i + 1}" for i in range(count))]
        chain = [helper.make_node("Identity", [names[i]], [names[i + 1]]) for i in range(count)]
        model.graph.node[0].input[0] = f"v{count}"
        last = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*chain, *last])

    return change


def typed(count: int) -> Any:
    """A change: a weight with numbers one by one, of another count than its sizes."""

    def change(model: Any, folder: Path) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.float_data.extend([1.0] * count)

    return change


def twice(model: Any, folder: Path) -> None:
    """Two initialisers of one name."""
    model.graph.initializer.append(model.graph.initializer[0])


def checksum(model: Any, folder: Path) -> None:
    """A data file whose sum is another than the model says."""
    (folder / "w.data").write_bytes(bytes(16))
    place("w.data")(model, folder)
    model.graph.initializer[-1].external_data.add(key="checksum", value="0" * 40)


def not_utf8(folder: Path) -> None:
    """Metadata that protobuf reads and does not write."""
    model = onnx.load(folder / "graph.onnx")
    model.metadata_props.add(key="k", value="AAAA")
    data = model.SerializeToString().replace(b"AAAA", b"A\x8dAA")
    (folder / "bad.onnx").write_bytes(data)


def sparse(name: str, size: int, head: bytes = b"\x08\x0a") -> Callable[[Path], None]:
    """A file of so many bytes that takes no room."""

    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(size)

    return make


ONNX: dict[str, Case] = {
    "outside, marked": Case(graph_with(place("../../../../../etc/passwd")), READ_ONNX),
    "outside, not marked": Case(
        graph_with(place("../../../../../etc/passwd", mark=False)), READ_ONNX
    ),
    "outside, texts": Case(
        graph_with(place("../../../../../etc/passwd", dtype=TensorProto.STRING)), READ_ONNX
    ),
    "outside, texts, not marked": Case(
        graph_with(place("../../etc/passwd", mark=False, dtype=TensorProto.STRING)), READ_ONNX
    ),
    "outside, absolute": Case(graph_with(place("/etc/passwd")), READ_ONNX),
    "outside, in a node": Case(graph_with(in_a_body), READ_ONNX),
    "outside, in a function": Case(graph_with(in_a_function), READ_ONNX),
    "outside, by a link": Case(graph_with(linked_data), READ_ONNX),
    "a location with NUL": Case(graph_with(place("w\0data")), READ_ONNX),
    "a location too long": Case(graph_with(place("w" * 5000)), READ_ONNX),
    "functions that double": Case(graph_with(functions(40)), READ_ONNX, say="nodes"),
    "functions that call each other": Case(
        graph_with(functions(3, loop=True)), READ_ONNX, say="calls itself"
    ),
    "65,536 calls": Case(graph_with(functions(16)), READ_ONNX, say="nodes"),
    "32,768 calls": Case(graph_with(functions(15)), READ_ONNX, say="at most 20"),
    "functions of great depth": Case(graph_with(functions(3000)), READ_ONNX),
    "typed data, too few": Case(graph_with(typed(23)), READ_ONNX, say="23 numbers"),
    "typed data, too many": Case(graph_with(typed(25)), READ_ONNX, say="25 numbers"),
    "two of one name": Case(graph_with(twice), READ_ONNX, say="'fc.weight'"),
    "a wrong sum": Case(graph_with(checksum), READ_ONNX, say="SHA-1"),
    "20 GB that take no room": Case(sparse("bad.onnx", 20 << 30), READ_ONNX, say="2147483648"),
    "a pipe": Case(lambda folder: os.mkfifo(folder / "bad.onnx"), READ_ONNX),
    "a device": Case(lambda folder: (folder / "bad.onnx").symlink_to("/dev/zero"), READ_ONNX),
    "texts that are not UTF-8": Case(not_utf8, READ_ONNX[1:4], say="not a valid ONNX model"),
    "empty": Case(lambda folder: (folder / "bad.onnx").write_bytes(b""), READ_ONNX),
}
SLOW_ONNX = {
    "a million nodes": Case(graph_with(nodes(1_000_000)), READ_ONNX, seconds=60.0, say="1000002"),
}


# Checkpoint folders.


def folder_with(change: Callable[[Path, Path], object]) -> Callable[[Path], None]:
    """bad: a copy of sharded with a change; outside it lies a file that only its owner may read."""

    def make(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        secret = outside / "secret"
        secret.write_text("the secret")
        secret.chmod(0o600)
        bad = folder / "bad"
        bad.mkdir()
        for file in (folder / "sharded").iterdir():
            (bad / file.name).write_bytes(file.read_bytes())
        change(bad, outside)

    return make


def shard_outside(bad: Path, outside: Path) -> None:
    """A shard that is a link."""
    shard = bad / "model-00001-of-00002.safetensors"
    (outside / "shard.safetensors").write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(outside / "shard.safetensors")


def index_of(name: str) -> Callable[[Path, Path], None]:
    """An index that names a shard so."""

    def change(bad: Path, outside: Path) -> None:
        shard = bad / "model-00001-of-00002.safetensors"
        (outside / "shard.safetensors").write_bytes(shard.read_bytes())
        file = bad / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"]["fc.weight"] = name
        file.write_text(json.dumps(index))

    return change


def deep(name: str) -> Callable[[Path, Path], object]:
    """A file of JSON of great depth."""
    return lambda bad, outside: (bad / name).write_text('{"a":' * 100_000)


def linked(bad: Path, outside: Path) -> None:
    """A companion that is a link to a link."""
    (bad / "a").symlink_to("b")
    (bad / "b").symlink_to(outside / "secret")


def device(bad: Path, outside: Path) -> None:
    """A config that never ends."""
    (bad / "config.json").unlink()
    (bad / "config.json").symlink_to("/dev/zero")


MERGES = ("merge bad peft -o out", "merge-all bad peft -o out")
READS = of(READ_FOLDER[:4], "bad")
FOLDERS: dict[str, Case] = {
    "a companion that is a link outside": Case(
        folder_with(lambda bad, outside: (bad / "tokenizer.json").symlink_to(outside / "secret")),
        MERGES,
        say="tokenizer.json",
    ),
    "a companion that is a link to a link": Case(folder_with(linked), MERGES),
    "a shard that is a link outside": Case(folder_with(shard_outside), READS),
    "an index that leads outside": Case(
        folder_with(index_of("../../outside/shard.safetensors")), READS
    ),
    "an index with an absolute name": Case(folder_with(index_of("/etc/passwd")), MERGES),
    "a deep index": Case(folder_with(deep("model.safetensors.index.json")), of(READ_FOLDER, "bad")),
    "a deep config": Case(folder_with(deep("config.json")), READS),
    "a huge config": Case(
        folder_with(lambda bad, outside: sparse("config.json", 20 << 30)(bad)), READS
    ),
    "a config without end": Case(
        folder_with(device),
        ("merge bad peft -o out",),
        frozenset({0, 2}),  # a device is no config
    ),
}


# Adapters.


def adapter_with(**fields: Any) -> Callable[[Path], None]:
    """bad: a PEFT folder with fields in its config."""

    def make(folder: Path) -> None:
        bad = folder / "bad"
        bad.mkdir()
        for file in (folder / "peft").iterdir():
            (bad / file.name).write_bytes(file.read_bytes())
        weights = bad / "adapter_model.safetensors"
        save_file(load_file(weights), weights)  # without what lora-fx knows of it
        config = bad / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))

    return make


EVIL = "(([a-z._0-9])+)+X"
EVIL_ENDS = "(x?){4000}[a-z.]{4000}"


def pickled(value: object, *, cut: int = 0) -> Callable[[Path], None]:
    """bad: a PEFT folder with a pickle in the place of its weights."""

    def make(folder: Path) -> None:
        adapter_with()(folder)
        (folder / "bad" / "adapter_model.safetensors").unlink()
        data = pickle.dumps(value)
        (folder / "bad" / "adapter_model.bin").write_bytes(data[: len(data) - cut])

    return make


def large_adapter(folder: Path) -> None:
    """bad: an adapter of 8 GB of zeros that take no room."""
    adapter_with()(folder)
    rows = (8 << 30) // 4 // 8
    header: dict[str, Any] = {}
    at = 0
    for name, shape in (("A", [2, 4]), ("B", [rows, 8])):
        size = 4 * shape[0] * shape[1]
        header[f"base_model.model.fc.lora_{name}.weight"] = {
            "dtype": "F32", "shape": shape, "data_offsets": [at, at + size]
        }  # fmt: skip
        at += size
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    sparse("bad/adapter_model.safetensors", len(head) + at, head)(folder)


TRUSTED = tuple(f"{line} --trust" for line in of(READ_ADAPTER[:2], "bad"))
NUMBERS: dict[str, tuple[Any, ...]] = {
    "qalora_group_size": (10**30, 2**62, 10**8, 0, -1, True, "16", 1.5, [16], None),
    "r": (10**30, -1, 1.5, True, [2], {}),
    "lora_dropout": (10**30, -1, "0", [0]),
}
"""Of a config, that are none of the numbers that it may have."""
ADAPTERS: dict[str, Case] = {
    **{
        f"a pattern without end in {name}": Case(
            adapter_with(**{name: value}), of(READ_ADAPTER, "bad"), frozenset({0, 1, 2})
        )
        for name, value in {
            "target_modules": EVIL, "exclude_modules": EVIL, "rank_pattern": {EVIL: 2},
            "alpha_pattern": {EVIL: 2}, "modules_to_save": [EVIL], "layers_pattern": EVIL,
            "target_modules, long": EVIL_ENDS,
        }.items()
    },
    "r too large for a float": Case(adapter_with(r=10**400), of(READ_ADAPTER, "bad")),
    "alpha too large for a float": Case(adapter_with(lora_alpha=10**400), of(READ_ADAPTER, "bad")),
    "alpha of many digits": Case(adapter_with(lora_alpha=10**4000), of(READ_ADAPTER, "bad")),
    "r of another type": Case(adapter_with(r="2"), of(READ_ADAPTER, "bad")),
    **{
        f"{field} of {value!r:.20}": Case(
            adapter_with(**{"use_qalora": True, field: value}), of(READ_ADAPTER, "bad")
        )
        for field, values in NUMBERS.items()
        for value in values
    },
    "a list for an object": Case(adapter_with(rank_pattern=[1]), of(READ_ADAPTER, "bad")),
    "8 GB of zeros": Case(
        large_adapter,
        (*of(READ_ADAPTER[:2], "bad"), *of(READ_ADAPTER[4:6], "bad")), say="elements",
    ),
    "a pickle of no tensors": Case(pickled({"a": 1}), TRUSTED),
    "a pickle of a list": Case(pickled([1]), TRUSTED),
    "a pickle that is cut": Case(pickled({"a": np.ones(3)}, cut=5), TRUSTED),
    "a pickle that runs code": Case(pickled(os.system), TRUSTED),
}  # fmt: skip


# Inputs and data.


def npz(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """bad.npz: inputs.npz with its bytes changed."""
    return lambda folder: (folder / "bad.npz").write_bytes(
        change((folder / "inputs.npz").read_bytes())
    )


def broken_sum(data: bytes) -> bytes:
    """The last byte of the first member turned, so that its sum is wrong."""
    with zipfile.ZipFile(__import__("io").BytesIO(data)) as archive:
        first = archive.infolist()[0]
    at = first.header_offset + 30 + len(first.filename) + first.file_size
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


READ_NPZ = ("verify graph.onnx apart.onnx --inputs bad.npz",
            "merge graph.onnx peft -o out.onnx --run --inputs bad.npz",
            "export net.py:build -o out.onnx --inputs bad.npz")  # fmt: skip
INPUTS: dict[str, Case] = {
    "empty": Case(npz(lambda data: b""), READ_NPZ[:1]),
    "cut": Case(npz(lambda data: data[:60]), READ_NPZ[:1]),
    "a wrong sum": Case(npz(broken_sum), READ_NPZ[:1]),
    "no zip": Case(npz(lambda data: b"x" * 100), READ_NPZ[:1]),
    "a deep line": Case(
        lambda folder: (folder / "bad.jsonl").write_text('{"x":' + "[" * 100_000),
        ("plan net.py:build bad.jsonl -o out.json --method eva",), seconds=30.0,
    ),
    "a wide table": Case(
        lambda folder: (folder / "bad.csv").write_text(
            ",".join(f"c{i}" for i in range(300_000)) + "\n" + ",".join("1" * 300_000) + "\n"
        ),
        ("plan net.py:build bad.csv -o out.json --method eva",), seconds=30.0,
    ),
    "a deep plan": Case(
        lambda folder: (folder / "bad.json").write_text('{"targets":' * 100_000),
        ("insert net.py:build -o out.pt2 --plan bad.json",), seconds=30.0,
    ),
    "a plan that is a pipe": Case(
        lambda folder: os.mkfifo(folder / "bad.json"),
        ("insert net.py:build -o out.pt2 --plan bad.json",), seconds=30.0,
    ),
}  # fmt: skip


# Outputs: an input, what holds one, and what is somebody's work.


def thesis(folder: Path) -> None:
    """mine: a folder with years of work, and what it could look like."""
    mine = folder / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    (folder / "mine.json").write_text('{"name": "package", "version": "1.0"}')
    (folder / "mine.html").write_text("<html>mine</html>")
    (folder / "mine").chmod(0o755)
    repository = folder / "tree"
    (repository / ".git").mkdir(parents=True)
    (repository / ".git" / "config").write_text("x")
    listed = folder / "listed"
    listed.mkdir()
    (listed / "model.safetensors").write_bytes(b"x" * 9)
    (listed / "lora_fx.json").write_text(
        json.dumps({"format": 1, "files": {"model.safetensors": 8}})
    )
    (folder / "hard.safetensors").hardlink_to(folder / "base.safetensors")
    (folder / "soft.safetensors").symlink_to("base.safetensors")
    (folder / "null").symlink_to("/dev/null")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(folder)  # names of sockets are short
        made.bind("socket")
        os.chdir(here)


FORCED = tuple(
    f"{line} --force"
    for line in """
merge base.safetensors peft -o base.safetensors
merge base.safetensors peft -o hard.safetensors
merge base.safetensors peft -o soft.safetensors
merge soft.safetensors peft -o base.safetensors
merge base.safetensors peft -o peft/adapter_model.safetensors
merge base.safetensors kohya.safetensors -o kohya.safetensors
merge base.safetensors peft -o peft
merge sharded peft -o sharded
merge sharded peft -o .
merge sharded peft -o sharded/model-00001-of-00002.safetensors
merge graph.onnx peft -o graph.onnx
merge apart.onnx peft -o graph.data
merge apart.onnx x.onnx_adapter -o x.onnx_adapter
merge graph.onnx peft -o out.onnx --run --inputs inputs.npz --report inputs.npz
insert graph.onnx -o graph.onnx
insert net.py:build -o net.pt2 --plan plan.json --weights net.pt2
export graph.onnx peft -o graph.onnx
export net.pt2 -o net.pt2
convert peft -o peft
convert kohya.safetensors -o kohya.safetensors --format kohya
truncate peft -o peft --rank 1
truncate kohya.safetensors -o kohya.safetensors --rank 1
extract merged.safetensors base.safetensors -o base.safetensors --format kohya --rank 1
extract merged.safetensors base.safetensors -o merged.safetensors --format kohya --rank 1
plan net.py:build data.npz -o data.npz
plan net.py:build -o net.py
merge sharded peft -o mine
merge sharded peft -o tree
merge sharded peft -o listed
merge base.safetensors peft -o net.py
merge sharded peft -o pipe
merge sharded peft -o socket
merge base.safetensors peft -o null
merge base.safetensors peft -o mine
convert peft -o mine
truncate peft -o mine --rank 1
extract merged.safetensors base.safetensors -o mine --rank 1
merge-all sharded peft -o mine.json
plan net.py:build -o mine.json
plan net.py:build -o mine
export graph.onnx peft -o mine
verify base.safetensors merged.safetensors --report mine.html
doctor base.safetensors peft --report mine.html
merge base.safetensors peft -o out.safetensors --report mine.html
train net.py:build data.npz -o mine --steps 1
train net.py:build data.npz -o peft --steps 1 --save-state mine
""".strip().splitlines()
)
"""Outputs that are an input by one of its names, or somebody's work."""
