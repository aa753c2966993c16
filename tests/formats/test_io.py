"""save_adapter and load_adapter: what is where, and never half an output."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.formats.peft import file as peft
from lora_fx.formats.registry import FORMATS

Same = Callable[[Adapter, Adapter], None]
Write = Callable[..., Path]


def small(value: float) -> Adapter:
    """One constant update."""
    ones = np.full((2, 2), value, np.float32)
    return Adapter({"x.weight": LowRank(ones, ones, 2.0)})


def listing(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("name", ["deep/er/x", "x.safetensors"])
def test_round_trip(mixed: Adapter, same: Same, tmp_path: Path, name: str) -> None:
    notes = save_adapter(mixed, tmp_path / name)
    same(load_adapter(tmp_path / name), mixed)
    assert any("gconv.weight" in note for note in notes)
    assert listing(tmp_path) == [name.partition("/")[0]]


def test_a_file_finds_its_config_beside_it(plain: Write) -> None:
    folder = plain()
    want = load_adapter(folder).lowrank["m.fc.weight"].matrix()
    for name in (peft.WEIGHTS, peft.CONFIG):
        np.testing.assert_array_equal(load_adapter(folder / name).deltas()["m.fc.weight"], want)


@pytest.mark.parametrize("name", ["x", "x.safetensors"])
def test_existing_output(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_adapter(small(1), path)
    with pytest.raises(LoraFxError, match="exists") as caught:
        save_adapter(small(2), path)
    assert "--force" in caught.value.hint
    assert load_adapter(path).lowrank["x.weight"].a[0, 0] == 1
    save_adapter(small(2), path, force=True)
    assert load_adapter(path).lowrank["x.weight"].a[0, 0] == 2
    assert listing(tmp_path) == [name]


def test_force_never_takes_other_things_away(tmp_path: Path) -> None:
    save_adapter(small(1), tmp_path / "x")
    (tmp_path / "x" / "thesis.tex").write_text("years")
    with pytest.raises(LoraFxError, match=r"thesis\.tex"):
        save_adapter(small(2), tmp_path / "x", force=True)
    (tmp_path / "y.safetensors").mkdir()
    (tmp_path / "z").write_text("years")
    for name, word in (
        ("y.safetensors", "is a folder"),
        ("z", "lora-fx does not write files of this kind"),
    ):
        with pytest.raises(LoraFxError, match=word):
            save_adapter(small(2), tmp_path / name, force=True)
    assert (tmp_path / "z").read_text() == "years"


def test_an_empty_folder_and_a_link_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_adapter(small(1), tmp_path / "empty")
    (tmp_path / "link").symlink_to("empty")
    save_adapter(small(2), tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert load_adapter(tmp_path / "empty").lowrank["x.weight"].a[0, 0] == 2


@pytest.mark.parametrize("name", ["x", "x.safetensors"])
def test_a_failure_leaves_the_old_output(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    save_adapter(small(1), path)

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_fx.files.atomic.sync", broken)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(small(2), path, force=True)
    assert listing(tmp_path) == [name]
    assert load_adapter(path).lowrank["x.weight"].a[0, 0] == 1


def test_a_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(small(1), tmp_path / "x")
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if self.parent.suffix == ".tmp" and self.name != "replaced":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    monkeypatch.setattr("lora_fx.files.atomic._exchange", lambda *_: False)
    with pytest.raises(LoraFxError, match="x: no"):
        save_adapter(small(2), tmp_path / "x", force=True)
    assert listing(tmp_path) == ["x"]
    assert load_adapter(tmp_path / "x").lowrank["x.weight"].a[0, 0] == 1


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"PK\x03\x04" + bytes(60), "pickle"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS"),
        (b"\x18\0\0\0TORT" + bytes(60), "ONNX Runtime"),
        (b"GGUF" + bytes(60), "the GGUF adapter cannot be read"),
        (b"", "not a safetensors"),
        (b"\x40\0\0\0\0\0\0\0{" + bytes(20), "damaged"),
    ],
)
def test_content_that_is_something_else(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoraFxError, match=word) as caught:
        load_adapter(path)
    assert str(path) in caught.value.message and caught.value.hint


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="no such file"):
        load_adapter(tmp_path / "gone")
    save_adapter(small(1), tmp_path / "other")
    with pytest.raises(LoraFxError, match="in this folder") as caught:
        load_adapter(tmp_path)
    assert "other" in caught.value.hint
    (tmp_path / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(LoraFxError, match=r"adapter_model\.bin: a pickle") as caught:
        load_adapter(tmp_path)
    assert "safetensors" in caught.value.hint


def test_unknown_format(tmp_path: Path) -> None:
    for name in ("ggml", "torchtune"):
        with pytest.raises(LoraFxError, match=name) as caught:
            save_adapter(small(1), tmp_path / "x", name)
        assert ", ".join(FORMATS.writers()) in caught.value.hint


def test_neither_torch_nor_peft_is_imported() -> None:
    code = "import lora_fx.formats.io, sys; print({'torch', 'peft', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
