"""An input that becomes another file while it is read: nothing is written, and the file is named.

On 1358f462 a merge whose base was overwritten in place meanwhile ended with exit code 0 and a mix
of both. The change is made here at a fixed moment: when the output is about to get its name.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.lowrank import LowRank
from lora_fx.cli.group import group
from lora_fx.errors import LoraFxError
from lora_fx.files import atomic
from lora_fx.files.run_files import inputs_are_in_memory, remembering

Change = Callable[[Path], object]


def written_over(file: Path) -> None:
    """Other bytes in place: the inode and the size stay."""
    data = bytearray(file.read_bytes())
    data[-8:] = bytes(reversed(data[-8:]))
    time.sleep(0.02)  # Linux keeps times by its ticks of 4 ms or 10: the file may be newer than one
    with file.open("r+b") as opened:
        opened.write(data)


def replaced(file: Path) -> None:
    """Another file under the name, of the same size and the same time."""
    found = file.stat()
    new = file.with_name("new")
    shutil.copyfile(file, new)
    os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(new, file)


def cut_off(file: Path) -> None:
    found = file.stat()
    os.truncate(file, found.st_size - 4)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def touched(file: Path) -> None:
    found = file.stat()
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def removed(file: Path) -> None:
    file.unlink()


CHANGES: dict[str, tuple[Change, str]] = {
    "written over": (written_over, "it was written to"),
    "replaced": (replaced, "another file has its name"),
    "cut off": (cut_off, "bytes and now has"),
    "touched": (touched, "it was written to"),
    "removed": (removed, "it was removed"),
}


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], object]]]:
    """What is to happen just before the first output gets its name."""
    steps: list[Callable[[], object]] = []
    sync = atomic.sync

    def late(path: Path) -> None:
        sync(path)
        while steps:
            steps.pop()()

    monkeypatch.setattr(atomic, "sync", late)
    yield steps
    assert not steps, "nothing was written to disk"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def scene(folder: Path) -> None:
    """A base of two shards, a tuned one, an adapter, and an .onnx file with its data beside it."""
    generator = torch.Generator().manual_seed(0)
    for name, scale in (("base", 0.0), ("tuned", 0.1)):
        (folder / name).mkdir()
        weights = {f"l{i}.weight": torch.randn(12, 8, generator=generator) for i in range(2)}
        for i, (key, w) in enumerate(weights.items(), 1):
            moved = w + scale * torch.randn(12, 8, generator=generator)
            save_file({key: moved}, folder / name / f"model-0000{i}-of-00002.safetensors")
        index = {k: f"model-0000{i}-of-00002.safetensors" for i, k in enumerate(weights, 1)}
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / name / "model.safetensors.index.json").write_text(text)
        (folder / name / "config.json").write_text('{"model_type": "x"}')
    factors = np.random.default_rng(0)
    low = LowRank(
        factors.standard_normal((2, 8), np.float32), factors.standard_normal((12, 2), np.float32), 4
    )
    lora_fx.save_adapter(lora_fx.Adapter({f"l{i}.weight": low for i in range(2)}), folder / "a")
    lora_fx.save_adapter(lora_fx.Adapter({"layer.weight": low}), folder / "b")


SHARD, INDEX = "base/model-00002-of-00002.safetensors", "base/model.safetensors.index.json"
WEIGHTS, CONFIG = "a/adapter_model.safetensors", "a/adapter_config.json"
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "merge": (["merge", "base", "a", "-o", "out"], (SHARD, INDEX, WEIGHTS, CONFIG)),
    "extract": (
        ["extract", "base", "tuned", "-o", "out"],
        (SHARD, "tuned/model-00001-of-00002.safetensors"),
    ),
    "convert": (["convert", "a", "-o", "out.onnx_adapter"], (WEIGHTS,)),
    "truncate": (["truncate", "a", "-o", "out", "--rank", "1"], (WEIGHTS, CONFIG)),
}


def lines(folder: Path) -> dict[str, Any]:
    return {str(p.relative_to(folder)): p.lstat().st_ino for p in folder.rglob("*")}


ROWS = [
    pytest.param(
        command, name, change,
        marks=[] if command == "merge" or change == "written over" else pytest.mark.slow,
    )
    for command, (_, names) in COMMANDS.items()
    for name in names
    for change in CHANGES
]  # fmt: skip


@pytest.mark.parametrize(("command", "name", "change"), ROWS)
def test_commands(
    command: str,
    name: str,
    change: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: list[Callable[[], object]],
) -> None:
    monkeypatch.chdir(tmp_path)
    scene(tmp_path)
    there = set(lines(tmp_path))
    act, said = CHANGES[change]
    meanwhile.append(lambda: act(tmp_path / name))
    with remembering(), pytest.raises(LoraFxError) as caught:
        CliRunner().invoke(
            group, COMMANDS[command][0], catch_exceptions=False, standalone_mode=False
        )
    assert caught.value.exit_code == 2
    assert f"{name} changed while it was read" in caught.value.message
    assert said in caught.value.message
    assert set(lines(tmp_path)) <= there


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_changes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: what is written beside the inputs, and reading them, are no changes."""
    monkeypatch.chdir(tmp_path)
    scene(tmp_path)
    call = COMMANDS[command][0]
    with remembering():
        CliRunner().invoke(group, call, catch_exceptions=False, standalone_mode=False)
    assert (tmp_path / call[call.index("-o") + 1]).exists()


def test_a_shard_that_appears(tmp_path: Path, meanwhile: list[Callable[[], object]]) -> None:
    scene(tmp_path)
    new = tmp_path / "base/model-00003-of-00003.safetensors"
    meanwhile.append(lambda: shutil.copyfile(tmp_path / SHARD, new))
    with pytest.raises(LoraFxError, match=r"'model-00003-of-00003.safetensors' was added"):
        lora_fx.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_of_the_folder_may_appear(
    tmp_path: Path, meanwhile: list[Callable[[], object]]
) -> None:
    scene(tmp_path)
    meanwhile.append(lambda: (tmp_path / "base/notes.txt").write_text("x"))
    lora_fx.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    # an output in the base's own folder is no change of it
    with remembering():
        lora_fx.merge(tmp_path / "base", tmp_path / "a", tmp_path / "base" / "out")


@pytest.mark.parametrize("change", ["written over", "replaced", "touched"])
@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data", "b/adapter_model.safetensors"])
def test_onnx(
    name: str, change: str, tmp_path: Path, meanwhile: list[Callable[[], object]]
) -> None:
    scene(tmp_path)
    x = torch.randn(2, 8)
    model = Small().eval()
    lora_fx.export(model, tmp_path / "m.onnx", (x,), external_over=0, provider="cpu")
    assert (tmp_path / "m.onnx.data").exists()
    act, said = CHANGES[change]
    meanwhile.append(lambda: act(tmp_path / name))
    with pytest.raises(LoraFxError) as caught:
        lora_fx.merge(tmp_path / "m.onnx", tmp_path / "b", tmp_path / "out.onnx")
    assert name in caught.value.message
    assert said in caught.value.message
    assert not [*tmp_path.glob("out*")]


def test_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is overwritten between its first tensor and its last one, as by a download."""
    from lora_fx.checkpoint.fold import TensorFold

    scene(tmp_path)
    block = TensorFold.block
    done: list[int] = []

    def late(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(1)
            for i in (1, 2):
                written_over(tmp_path / f"base/model-0000{i}-of-00002.safetensors")
        return block(self, *args, **kwargs)

    monkeypatch.setattr(TensorFold, "block", late)
    with pytest.raises(LoraFxError, match="changed while it was read"):
        lora_fx.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38], ids=["NaN", "infinite", "large"])
def test_numbers_that_are_none_in_the_middle(
    number: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with the new numbers is not told of a base that had others."""
    from lora_fx.checkpoint.fold import TensorFold

    scene(tmp_path)
    block = TensorFold.block

    def late(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)  # see written_over
        for i in (1, 2):
            with (tmp_path / f"base/model-0000{i}-of-00002.safetensors").open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(np.float32(number).tobytes())
        return block(self, *args, **kwargs)

    monkeypatch.setattr(TensorFold, "block", late)
    with pytest.raises(LoraFxError, match="changed while it was read"):
        lora_fx.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_verify_and_extract_write_nothing_and_say_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fx.checkpoint import extract, verify

    scene(tmp_path)
    for module, call in (
        (verify, lambda: lora_fx.verify(tmp_path / "base", tmp_path / "tuned")),
        (extract, lambda: lora_fx.extract(tmp_path / "base", tmp_path / "tuned", rank=2)),
    ):
        check = module.check_unchanged

        def late(check: Callable[[], None] = check) -> None:
            written_over(tmp_path / SHARD)
            check()

        monkeypatch.setattr(module, "check_unchanged", late)
        with pytest.raises(LoraFxError, match="changed while it was read"):
            call()


def test_what_is_in_memory_may_change(
    tmp_path: Path, meanwhile: list[Callable[[], object]]
) -> None:
    """A training reads its files first, and may take hours."""
    scene(tmp_path)
    meanwhile.append(lambda: touched(tmp_path / WEIGHTS))
    with remembering():
        adapter = lora_fx.load_adapter(tmp_path / "a")
        inputs_are_in_memory()
        lora_fx.save_adapter(adapter, tmp_path / "out")
    assert (tmp_path / "out").is_dir()
