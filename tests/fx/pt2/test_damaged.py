"""What a damaged .pt2 file says, one line each."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx.errors import LoraFxError
from lora_fx.passes.verbs.open import load_program
from tests.fx.pt2.edit import CONFIG, JSON, Edit, edited, in_json, refused, write_clean


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch.export.save with a free batch dimension."""
    return write_clean(tmp_path_factory.mktemp("pt2") / "clean.pt2")


def cut(data: bytes) -> bytes:
    return data[:-8]


def resized(config: dict[str, Any]) -> None:
    config["config"]["0.weight"]["tensor_meta"]["sizes"][0] = {"as_int": 800}


def outside(config: dict[str, Any]) -> None:
    config["config"]["0.weight"]["path_name"] = "../../secret"


def negative(config: dict[str, Any]) -> None:
    config["config"]["0.weight"]["tensor_meta"]["storage_offset"] = {"as_int": -4}


def unread(config: dict[str, Any]) -> None:
    del config["config"]["2.bias"]


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({CONFIG: lambda _: None}, "is missing"),
        ({CONFIG: in_json(resized)}, "needs 19200"),
        ({CONFIG: in_json(outside)}, "cannot be the name of a member"),
        ({CONFIG: in_json(negative)}, "the entry of '0.weight' is wrong"),
        ({CONFIG: in_json(unread)}, "2.bias is not in the state dict"),
        ({CONFIG: lambda _: b"[]"}, "not an object"),
        ({"data/weights/weight_0": cut}, "needs"),
        ({"data/weights/weight_0": lambda _: None}, "is missing"),
        ({JSON: lambda _: None}, "holds no program"),
        ({JSON: lambda _: b"{}"}, "is not an exported program"),
        ({JSON: cut}, "not valid JSON"),
        ({"archive_version": lambda _: b"9"}, "archive version"),
        ({"archive_format": lambda _: b"pt3"}, "not a .pt2 archive"),
    ],
)
def test_bad_members(
    clean: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    edits: dict[str, Edit],
    says: str,
) -> None:
    errors = refused(edited(clean, tmp_path / "x.pt2", edits), capsys)
    assert says in errors and "x.pt2" in errors


def test_bad_files(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pt2"
    assert "no such file" in refused(path, capsys)
    path.write_bytes(clean.read_bytes()[:-300])
    assert "not a .pt2 archive" in refused(path, capsys)  # a zip inside ends there
    path.write_bytes(clean.read_bytes()[:200])
    assert "cut" in refused(path, capsys)
    path.write_bytes(b"nothing")
    assert "not a .pt2 file" in refused(path, capsys)
    path.write_bytes(b"")
    assert "not a .pt2 file" in refused(path, capsys)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a/b", "c")
    assert "not a .pt2 archive" in refused(path, capsys)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, zipfile.ZipFile(clean) as old:
        for name in old.namelist():
            z.writestr(name, old.read(name))
    assert "is compressed" in refused(path, capsys)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, zipfile.ZipFile(clean) as old:
        for name in old.namelist():  # not read before it is refused: it may be a bomb
            bomb = name.endswith("/archive_format")
            z.writestr(name, bytes(1 << 20) if bomb else old.read(name))
    assert "is compressed" in refused(path, capsys)


def test_a_flipped_bit_is_seen(clean: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    data = bytearray(clean.read_bytes())
    weight = zipfile.ZipFile(clean).read("clean/data/weights/weight_0")
    data[data.index(weight) + 5] ^= 1
    path.write_bytes(data)
    torch.export.load(str(path))  # torch does not look
    with pytest.raises(LoraFxError, match="weight_0 cannot be read: Bad CRC"):
        load_program(path)
