"""Headers and folders that are refused for what they say, and with what words."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save, save_file

from lora_fx.checkpoint.file_targets import EMPTY, file_targets
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import tensors
from lora_fx.files.safetensors import parse_header, read_header
from lora_fx.files.strict_json import MAX_JSON, read_json
from lora_fx.formats.io import load_adapter

FILE = Path("x.safetensors")


def made(text: str, data: bytes = b"") -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def tensor(shape: str, offsets: str = "[0,24]") -> str:
    return f'{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'


@pytest.mark.parametrize("n", [128, 384, 0x4B50, 0x54524F54 & 0xFFFFFF])
def test_a_length_that_looks_like_a_pickle(n: int) -> None:
    """0x80 and PK begin pickles and archives, and lengths too."""
    content = made(tensor("[2,3]").ljust(n), bytes(24))
    assert set(parse_header(content, len(content), FILE).tensors) == {"w"}
    assert len(deserialize(content)) == 1


LOOSE_JSON = {
    "-0": (tensor("[2,3]", "[-0,24]"), "-0 is not a size"),
    "half a surrogate pair": (tensor("[2,3]").replace("w", "\\ud800"), "surrogates not allowed"),
    "product over 2^64": (tensor("[3,9223372036854775807,0]", "[0,0]"), "stays below 2^64"),
    "product over floats": (tensor(str([1 << 62] * 60)), "its range holds 24 bytes"),
    "byte order mark": ("\ufeff" + tensor("[2,3]"), "not valid JSON"),
}


@pytest.mark.parametrize("name", LOOSE_JSON)
def test_what_python_takes_and_the_library_does_not(name: str) -> None:
    text, words = LOOSE_JSON[name]
    content = made(text, b"" if "[0,0]" in text else bytes(24))
    with pytest.raises(SafetensorError):
        deserialize(content)
    with pytest.raises(LoraFxError) as caught:
        parse_header(content, len(content), FILE)
    assert words in caught.value.message and len(caught.value.message) < 600


def test_null_is_no_metadata_and_minus_zero_may_be_a_name() -> None:
    text = tensor("[2,3]").replace('{"w"', '{"__metadata__":null,"model-0\\u0041"')
    content = made(text, bytes(24))
    assert len(deserialize(content)) == 1
    header = parse_header(content, len(content), FILE)
    assert set(header.tensors) == {"model-0A"} and header.metadata == {}


def test_bytes_may_end_with_the_header() -> None:
    content = save({"a": np.ones((2, 3), np.float32)})
    n = 8 + int.from_bytes(content[:8], "little")
    assert parse_header(content[:n], len(content), FILE) == parse_header(
        content, len(content), FILE
    )
    for size in (len(content) - 1, len(content) + 1):
        with pytest.raises(LoraFxError, match="bytes, but its tensors end at"):
            parse_header(content[:n], size, FILE)


@pytest.mark.parametrize("name", ["m.safetensors", "m.json"])
def test_a_large_header_is_refused_unread(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    with file.open("wb") as f:
        f.write((MAX_JSON + 1).to_bytes(8, "little") + b"{")
        f.truncate(4 * MAX_JSON)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(LoraFxError, match=f"expected at most {MAX_JSON}"):
            read_json(file) if name.endswith("json") else read_header(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("read", [read_header, read_json, tensors, load_adapter])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, read: Any) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(LoraFxError, match=r"(?i)git.lfs pointer") as caught:
        read(file)
    assert "lfs pull" in caught.value.hint and str(file) in caught.value.message


@pytest.mark.parametrize(
    "name", ["../m.safetensors", "/m.safetensors", "C:\\m.safetensors", "c:m.safetensors",
             "\\\\host\\m.safetensors", "m\0.safetensors", "a/../../m.safetensors"],
)  # fmt: skip
def test_an_index_never_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    for folder in (tmp_path, tmp_path / "in"):
        save_file({"w": np.ones((2, 3), np.float32)}, folder / "m.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(LoraFxError, match="inside the folder"):
        tensors(tmp_path / "in")


@pytest.mark.parametrize("name", ["n" * 300 + ".safetensors", "\\ud800.safetensors"])
def test_a_shard_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"w": "{name}"}}}}')
    with pytest.raises(LoraFxError, match=r"missing|not valid JSON|inside the folder"):
        tensors(tmp_path)
    with pytest.raises(LoraFxError, match="cannot be read"):
        read_header(tmp_path / name)


# --- saved under ZeRO-3: tensors without elements ------------------------------------------------


def test_empty_tensors_of_a_base_are_explained(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "q.weight": np.ones(0, np.float32),
        "k.weight": np.ones((0, 4), np.float16),
        "v.weight": np.ones((3, 4), np.float16),
        "v.bias": np.ones(3, np.float16),
    }
    save_file(arrays, tmp_path / "m.safetensors")
    found = file_targets(tmp_path / "m.safetensors")
    assert {r.key: r.reason for r in found.refusals} == {"q.weight": EMPTY, "k.weight": EMPTY}
    assert [t.key for t in found.targets] == ["v.weight"] and "ZeRO-3" in EMPTY


@pytest.mark.parametrize("shape", [(0,), (0, 4)])
def test_empty_tensors_of_an_adapter_are_explained(tmp_path: Path, shape: tuple[int, ...]) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lead, a = "base_model.model.fc.lora_", np.ones(shape, np.float32)
    arrays = {f"{lead}A.weight": a, f"{lead}B.weight": np.ones((3, 2), np.float32)}
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoraFxError, match=r"lora_A\.weight' has shape \[0") as caught:
        load_adapter(tmp_path)
    assert "ZeRO-3" in caught.value.hint
