"""Hostile .onnx files and data: every one is refused in one line, and nothing is written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import save_adapter
from lora_fx.onnx.load import load
from lora_fx.onnx.validity import blaming
from lora_fx.passes.verbs.merge import merge

W = np.arange(192, dtype=np.float32).reshape(8, 24)


def external(folder: Path, **entries: str) -> Path:
    """A good file with its weight in w.data; `entries` replace what the tensor says of it."""
    tensor = numpy_helper.from_array(W, "w")
    (folder / "w.data").write_bytes(W.tobytes())
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    said = {"location": "w.data", "offset": "0", "length": str(W.nbytes)} | entries
    for key, value in said.items():
        tensor.external_data.add(key=key, value=value)
    return write(folder, tensor)


def write(folder: Path, tensor: TensorProto) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 24])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def inline(folder: Path, change: Callable[[TensorProto], None]) -> Path:
    tensor = numpy_helper.from_array(W, "w")
    change(tensor)
    return write(folder, tensor)


def dims(*sizes: int) -> Callable[[Path], Path]:
    def change(tensor: TensorProto) -> None:
        tensor.dims[:] = sizes

    return lambda folder: inline(folder, change)


def linked(folder: Path) -> Path:
    path = external(folder)
    os.link(folder / "w.data", folder / "other.data")
    return path


def escaping(folder: Path) -> Path:
    path = external(folder)
    outside = folder.parent / "outside.data"
    outside.write_bytes(W.tobytes())
    (folder / "w.data").unlink()
    (folder / "w.data").symlink_to(outside)
    return path


def absolute(folder: Path) -> Path:
    return external(folder, location=str(folder / "w.data"))


def traversal(folder: Path) -> Path:
    (folder.parent / "up.data").write_bytes(W.tobytes())
    return external(folder, location="../up.data")


def missing(folder: Path) -> Path:
    path = external(folder)
    (folder / "w.data").unlink()
    return path


def pointer(folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return path


def bytes_of(data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "m.onnx").write_bytes(data)
        return folder / "m.onnx"

    return make


def cut(folder: Path) -> Path:
    path = external(folder)
    path.write_bytes(path.read_bytes()[:-30])
    return path


def lfs_data(folder: Path) -> Path:
    path = external(folder)
    (folder / "w.data").write_text("version https://git-lfs.github.com/spec/v1\n" + "x" * 200)
    return path


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "traversal": (traversal, "outside the folder"),
    "absolute path": (absolute, "outside the folder"),
    "link that leaves": (escaping, "outside the folder"),
    "empty location": (lambda f: external(f, location=""), "outside the folder"),
    "missing": (missing, "missing"),
    "hard link": (linked, "2 hard links"),
    "offset below 0": (lambda f: external(f, offset="-4"), "bytes -4"),
    "past the end": (lambda f: external(f, offset="4096"), "which has 768"),
    "offset no number": (lambda f: external(f, offset="x"), "expected whole numbers"),
    "too short": (lambda f: external(f, length="96"), "96 bytes.*needs 768"),
    "too long": (lambda f: external(f, length="9999"), "9999 bytes.*needs 768"),
    "unknown key": (lambda f: external(f, colour="red"), "unknown external key 'colour'"),
    "huge sizes": (dims(2**60, 24), "needs"),
    "sizes that are not the bytes": (dims(8, 7), "768 bytes.*needs 224"),
    "sizes below 0": (dims(-8, -6), "expected no negative sizes"),
    "unknown dtype": (lambda f: inline(f, lambda t: setattr(t, "data_type", 99)), "unknown dtype"),
    "cut": (cut, "damaged|not an ONNX model"),
    "random": (bytes_of(bytes(range(256))), "damaged"),
    "empty": (bytes_of(b""), "not an ONNX model"),
    "git-lfs": (pointer, "git-LFS pointer"),
    "git-lfs data": (lfs_data, "git-LFS pointer"),
}


def adapter() -> Adapter:
    return Adapter({"w": LowRank(np.ones((2, 8), np.float32), np.ones((24, 2), np.float32), 1.0)})


@pytest.mark.parametrize("case", CASES)
def test_refused_and_nothing_written(case: str, tmp_path: Path) -> None:
    make, words = CASES[case]
    folder = tmp_path / "in"
    folder.mkdir()
    path = make(folder)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(LoraFxError, match=words) as error:
        merge(path, adapter(), folder / "out.onnx")
    assert error.value.hint and "\n" not in error.value.message
    assert str(folder) in error.value.message
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_good_file_is_read(tmp_path: Path) -> None:
    model = load(external(tmp_path))
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), W)


def test_good_data_beside_the_file_stays_beside_it(tmp_path: Path) -> None:
    path = external(tmp_path)
    merge(path, adapter(), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size >= W.nbytes
    proto = onnx.load(tmp_path / "out.onnx")
    (got,) = (numpy_helper.to_array(t) for t in proto.graph.initializer)
    np.testing.assert_array_equal(got, W + 1.0)
    assert (tmp_path / "w.data").read_bytes() == W.tobytes()


WAYS = {  # MODEL in every command that reads one
    "targets": "targets M",
    "optimise": "export M -o OUT --optimise",
    "precision": "export M -o OUT --precision int8",
    "merged": "export M A -o OUT",
    "switch": "export M A -o OUT --mode switch",
    "load": "export M -o OUT --mode load",
    "batch": "export M A -o OUT --mode batch",
    "insert": "insert M -o OUT",
    "merge": "merge M A -o OUT",
    "delta": "merge M A -o OUT --delta",
    "plan": "merge M A -o OUT --dry-run",
    "verify": "verify M GOOD",
    "verify as the reference": "verify GOOD M",
    "read as an adapter": "convert M -o OUT.safetensors --format peft",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_every_command_that_reads_a_file_checks_it_first(
    case: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = CASES[case]
    folder = tmp_path / "in"
    folder.mkdir()
    path = str(make(folder))
    save_adapter(adapter(), tmp_path / "adapter")
    (tmp_path / "good").mkdir()
    before = ["m.onnx", "w.data", *(p.name for p in tmp_path.rglob("*"))]
    names = {
        "GOOD": str(external(tmp_path / "good")),
        "M": path,
        "A": str(tmp_path / "adapter"),
        "OUT": f"{folder}/o.onnx",
    }
    line = [names.get(w, w.replace("OUT", names["OUT"])) for w in WAYS[way].split()]
    with pytest.raises(SystemExit) as end:
        main(line)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.startswith("Error: ") and str(folder) in err.splitlines()[0]
    assert len(err.splitlines()) == 2 and "please report" not in err, err
    assert re.search(words, err), err
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(before)


def test_only_an_invalid_file_is_blamed(tmp_path: Path) -> None:
    """Not one with somebody's own operators, nor for an error of the system."""

    @blaming
    def verb(path: str, error: Exception) -> None:
        raise error

    node = onnx.helper.make_node("Mine", ["x"], ["y"], domain="my.ops")
    x, y = (onnx.helper.make_tensor_value_info(n, 1, ["N", 4]) for n in "xy")
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    opset = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("my.ops", 1)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "a.onnx"
    )
    (tmp_path / "b.onnx").write_bytes(b"no model")
    for name, error in (("a", KeyError("k")), ("b", OSError(28, "full")), ("b", MemoryError())):
        with pytest.raises(type(error)):
            verb(path=str(tmp_path / f"{name}.onnx"), error=error)
    with pytest.raises(LoraFxError, match="not a valid ONNX model"):
        verb(path=str(tmp_path / "b.onnx"), error=KeyError("k"))
