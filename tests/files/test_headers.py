"""Headers of safetensors files: what is read, and every damage that is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save, save_file

from lora_fx.checkpoint.file_targets import file_targets
from lora_fx.dtypes import DTYPES
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import tensors
from lora_fx.files.safetensors import TensorInfo, read_header
from lora_fx.files.strict_json import MAX_JSON
from lora_fx.fx.load.weights_file import check_fit

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
W = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
INT64 = 1 << 63


def made(header: object, data: int = 24) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def refused(path: Path, *texts: str) -> LoraFxError:
    with pytest.raises(LoraFxError) as caught:
        tensors(path)
    error = caught.value
    assert "\n" not in error.message and len(error.message) < 600
    for text in texts:
        assert text in str(error)
    return error


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.int64),
        "none": np.zeros((0, 3), np.float16),
        "scalar": np.array(7.0),
    }
    file = tmp_path / "x.safetensors"
    save_file(arrays, file, {"format": "pt"})
    assert read_header(file).metadata == {"format": "pt"}
    found = tensors(file)
    assert set(found) == set(arrays)
    for name, info in found.items():
        raw = file.read_bytes()[info.start : info.stop]
        assert np.array_equal(np.frombuffer(raw, info.dtype).reshape(info.shape), arrays[name])


@pytest.mark.parametrize("length", [0x180, 0x4B50])
def test_a_header_whose_length_begins_as_a_pickle(tmp_path: Path, length: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(made(json.dumps({"w": W}).encode().ljust(length)))
    assert read_header(file).tensors["w"].shape == (2, 3)


def test_needs_no_torch() -> None:
    names = "lora_fx.files.checkpoint, lora_fx.checkpoint.merge, lora_fx.checkpoint.doctor"
    code = f"import sys, {names}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "at least 8"),
    "seven bytes": (b"1234567", "at least 8"),
    "header cut": (made({"w": W})[:40], "header alone needs"),
    "data cut": (made({"w": W}, 23), "cut off"),
    "trailing": (made({"w": W}, 25), "belong to no tensor"),
    "header bomb": ((1 << 60).to_bytes(8, "little") + bytes(64), f"at most {MAX_JSON}"),
    "too large": ((MAX_JSON + 1).to_bytes(8, "little") + bytes(64), f"at most {MAX_JSON}"),
    "git-LFS": (LFS, "git-LFS pointer"),
    "zip pickle": (b"PK\x03\x04" + bytes(60), "PyTorch pickle"),
    "bad JSON": (made(b'{"w": '), "not valid JSON"),
    "not UTF-8": (made(b'{"\xff": 1}'), "not valid JSON"),
    "deep JSON": (made(b"[" * 100_000), "not valid JSON"),
    "NaN": (made(b'{"w": NaN}'), "NaN is not JSON"),
    "long number": (made(b'{"w": ' + b"1" * 5000 + b"}"), "not valid JSON"),
    "list": (made([1]), "not an object"),
    "key twice": (made(b'{"w": 1, "w": 2}'), "'w' appears twice"),
    "metadata": (made({"__metadata__": {"a": 1}, "w": W}), "__metadata__"),
    "no dtype": (made({"w": {"shape": [2, 3], "data_offsets": [0, 24]}}), "expected dtype"),
    "extra field": (made({"w": W | {"x": 1}}), "expected dtype"),
    "dtype": (made({"w": W | {"dtype": "F31"}}), "'F31' is unknown"),
    "dtype list": (made({"w": W | {"dtype": [1]}}), "is unknown"),
    "negative": (made({"w": W | {"shape": [-2, -3]}}), "sizes from 0"),
    "bool size": (made({"w": W | {"shape": [True, 6]}}), "sizes from 0"),
    "float size": (made({"w": W | {"shape": [2.0, 3]}}), "sizes from 0"),
    "overflow": (made({"w": W | {"shape": [INT64, 3]}}), "sizes from 0"),
    "many axes": (made({"w": W | {"shape": [1] * 65}}), "at most 64"),
    "size": (made({"w": W | {"shape": [2, 4]}}), "F32 [2, 4] needs 32"),
    "half byte": (made({"w": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}, 1), "needs 1"),
    "reversed": (made({"w": W | {"data_offsets": [24, 0]}}), "expected [start, stop]"),
    "three offsets": (made({"w": W | {"data_offsets": [0, 8, 24]}}), "expected [start, stop]"),
    "overlap": (made({"v": W, "w": W | {"data_offsets": [20, 44]}}, 44), "overlaps tensor 'v'"),
    "alias": (made({"v": W, "w": W}), "overlaps"),
    "hole": (made({"v": W, "w": W | {"data_offsets": [28, 52]}}, 52), "leaves a hole"),
    "name": (made({"w\n" * 500: W | {"shape": [1]}}), "needs 4"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    content, text = HOSTILE[name]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    refused(file, "x.safetensors", text)


BASE = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int64)}, {"x": "y"})


@settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(st.integers(0, len(BASE) - 1), st.binary(max_size=3)), max_size=3))
def test_agrees_with_the_library(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    content = BASE
    for at, new in changes:
        content = content[:at] + new + content[at + 1 :]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    try:
        load(content)
    except SafetensorError:
        refused(file)
    else:
        assert set(tensors(file)) == set(load(content))


def test_missing_and_strange_paths(tmp_path: Path) -> None:
    refused(tmp_path / "no.safetensors", "cannot be read")
    refused(tmp_path, "no .safetensors file")
    refused(Path("/dev/null"), "not a regular file")


# --- folders -------------------------------------------------------------------------------------


def folder(path: Path, shards: dict[str, dict[str, int]], index: dict[str, Any] | None) -> Path:
    for file, names in shards.items():
        save_file({n: np.full((2, 2), v, np.float32) for n, v in names.items()}, path / file)
    if index is not None:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (path / "model.safetensors.index.json").write_text(text)
    return path


def test_folder_with_one_file_or_shards(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert set(tensors(folder(one, {"model.safetensors": {"a": 1, "b": 2}}, None))) == {"a", "b"}
    shards = {"m-1.safetensors": {"a": 1, "extra": 9}, "m-2.safetensors": {"b": 2}}
    found = tensors(folder(two, shards, {"a": "m-1.safetensors", "b": "m-2.safetensors"}))
    assert {n: t.file.name for n, t in found.items()} == {
        "a": "m-1.safetensors",
        "extra": "m-1.safetensors",
        "b": "m-2.safetensors",
    }


def test_index_decides_between_shards(tmp_path: Path) -> None:
    shards = {"1.safetensors": {"a": 1, "b": 1}, "2.safetensors": {"b": 2}}
    found = tensors(folder(tmp_path, shards, {"a": "1.safetensors", "b": "2.safetensors"}))
    assert found["b"].file.name == "2.safetensors"


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors",
             "C:x.safetensors", "x\0.safetensors"],
)  # fmt: skip
def test_index_that_points_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    folder(tmp_path, {"x.safetensors": {"a": 1}}, None)
    refused(folder(tmp_path / "in", {}, {"a": name}), "inside the folder", "do not use")


def test_index_with_pickled_shards(tmp_path: Path) -> None:
    refused(folder(tmp_path, {}, {"a": "model-1.bin"}), "expected a .safetensors", "convert")


def test_missing_shard_and_tensor(tmp_path: Path) -> None:
    index = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    refused(folder(tmp_path, {"1.safetensors": {"a": 1}}, index), "2.safetensors", "(2 tensors)")
    folder(tmp_path, {"2.safetensors": {"b": 1}}, None)
    refused(tmp_path, "'c' is missing")


def test_same_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = {"1.safetensors": {"a": 1, "x": 1}, "2.safetensors": {"b": 1, "x": 2}}
    refused(folder(tmp_path, shards, {"a": "1.safetensors", "b": "2.safetensors"}), "two shards")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_bad_index(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "model.safetensors.index.json")


def test_lfs_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.safetensors").write_bytes(LFS)
    refused(folder(tmp_path, {}, {"a": "1.safetensors"}), "1.safetensors", "git-LFS", "lfs pull")


def test_pickles_and_adapters_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    folder(tmp_path, {"adapter_model.safetensors": {"a": 1}}, None)
    refused(tmp_path, "an adapter")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    refused(tmp_path, "pytorch_model.bin", "are not read", "convert it to safetensors")


def test_several_files_without_an_index(tmp_path: Path) -> None:
    refused(
        folder(tmp_path, {"a.safetensors": {"a": 1}, "b.safetensors": {"b": 1}}, None), "2 cand"
    )


# --- targets -------------------------------------------------------------------------------------


def test_file_targets(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    layer = "model.layers.0.self_attn"
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "model.embed_tokens.weight": np.ones((1200, 4), np.float32),
        f"{layer}.q_proj.weight": np.ones((6, 4), np.float16),
        f"{layer}.q_proj.bias": np.ones(6, np.float16),
        "conv.weight": np.ones((8, 2, 3, 3), np.float32),
        "output.weight": np.ones((1200, 4), np.float32),
        "position_ids": np.ones((1, 16), np.int64),
    }
    save_file(arrays, file)
    found = file_targets(file)
    by_key = found.by_key
    assert set(by_key) == {n for n, a in arrays.items() if a.ndim > 1} - {"position_ids"}
    assert {t.op for t in found.targets} == {"tensor"} and not any(t.sites for t in found.targets)
    q, conv = by_key[f"{layer}.q_proj.weight"], by_key["conv.weight"]
    assert (q.role, q.default, q.parameter.dtype) == ("q", True, "float16")
    assert (conv.layout.out_size, conv.layout.in_size) == (8, 18)
    assert by_key["model.embed_tokens.weight"].role == "embedding"
    assert (by_key["output.weight"].role, by_key["output.weight"].default) == ("head", False)
    assert [r.key for r in found.refusals] == ["position_ids"]
    json.dumps(found.to_json())


def test_dtype_names_are_numpys() -> None:
    from lora_fx.dtypes import numpy_dtype

    for name, bits, *_ in DTYPES.values():
        dtype = numpy_dtype(name)
        assert dtype.itemsize * 8 == max(8, bits)


# --- fit -----------------------------------------------------------------------------------------


def info(shape: tuple[int, ...], dtype: str = "float32") -> TensorInfo:
    return TensorInfo(dtype, shape, Path("f"), 0, 0)


def test_fit_names_everything_that_differs() -> None:
    wanted = {n: ((2, 3), "float32") for n in ("a", "b", "tied", "i")} | {"n": ((), "int64")}
    ties = {n: n for n in wanted} | {"tied": "a"}
    found = {"a": info((2, 3)), "b": info((2, 3), "float16"), "i": info((2, 3))}
    assert check_fit(found, wanted, ties, "F", ["n"]) == ("F: cast from float16 to float32: b",)
    with pytest.raises(LoraFxError) as caught:
        check_fit(
            {"a": info((3, 2)), "x": info((1,)), "i": info((2, 3), "uint8")}, wanted, ties, "F"
        )
    for text in ("2 missing: b, n", "1 unexpected: x", "a [3, 2] (expected [2, 3])", "i uint8"):
        assert text in caught.value.message


def test_fit_suggests_a_prefix() -> None:
    wanted = {"model.a": ((2,), "float32")}
    with pytest.raises(LoraFxError) as caught:
        check_fit({"a": info((2,))}, wanted, {}, "F")
    assert "lack the prefix 'model.'" in caught.value.hint


def test_a_stack_has_the_entries_of_its_first_axis_and_no_more() -> None:
    stack = TensorInfo("float32", (2, 3), Path("f"), 8, 32)
    entries = [TensorInfo("float32", (3,), Path("f"), at, at + 12) for at in (8, 20)]
    assert [stack[0], stack[1]] == entries
    with pytest.raises(IndexError):
        stack[2]
    assert list(stack) == entries  # type: ignore[call-overload]
