"""A short part of each attack; SECURITY.md has the commands of the whole."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from lora_fx import Adapter, LowRank, save_adapter
from tests.hostile import child, disk, kills, mutate

SPOOF = "\x1b]0;title\x07\x1b[2J\u202egnp.\r\nError: x\x9b1A"
"""What sets a terminal's title, clears it, turns the direction of reading and begins a line."""


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    child.prepare()


def _loop(argv: list[str]) -> None:
    while True:
        pass


def test_a_command_without_end_is_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_fx.cli.main", _loop)
    monkeypatch.setattr(child, "WAITS", 60)
    got = child.command(["targets"], tmp_path, seconds=1.0)
    assert got.hung and got.raw and got.code == -signal.SIGXCPU


def test_changed_files(memory: Path) -> None:
    kinds = [k for k in mutate.READERS if k not in mutate.SLOW]
    *failed, counts = mutate.rounds(20261127, range(25), kinds, memory)
    assert not failed and sum(json.loads(counts[1]).values()) == 25


def test_killed_commands(memory: Path) -> None:
    lines = {n: kills.WRITERS[n] for n in ("merge a folder", "merge with data", "export load")}
    *failed, counts = kills.rounds(lines, 2, 0, memory)
    assert not failed and sum(json.loads(counts[1]).values()) == 18


def test_failing_disks(memory: Path) -> None:
    lines = {n: kills.WRITERS[n] for n in ("merge with data", "convert", "a page")}
    *failed, counts = disk.rounds(lines, 4, 0, memory)
    assert not failed and sum(json.loads(counts[1]).values()) == 24


def test_a_disk_that_is_full_at_a_write(memory: Path) -> None:
    lines = {"merge .onnx": kills.WRITERS["merge .onnx"]}
    *failed, counts = disk.rounds(lines, 12, 0, memory, ["disk full"])
    assert not failed and json.loads(counts[1])["disk full: 2"] > 8


def spoofing(folder: Path, spoof: str) -> tuple[str, ...]:
    """Files whose names and whose content try to speak to the terminal."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 4)).astype("f4")
    key = f"fc{spoof}.weight"
    save_file({key: weight}, folder / f"base{spoof}.safetensors", {"x": spoof})
    low = LowRank(rng.standard_normal((2, 4)).astype("f4"), np.ones((6, 2), "f4"), 3.0)
    save_adapter(Adapter({key: low}), folder / f"good{spoof}")
    save_adapter(Adapter({f"other{spoof}.weight": low}), folder / "other")
    config = folder / "other" / "adapter_config.json"
    told: dict[str, Any] = json.loads(config.read_text())
    config.write_text(json.dumps({**told, spoof: spoof, "init_lora_weights": spoof}))
    w = onnx.numpy_helper.from_array(weight.T.copy(), key)
    node = onnx.helper.make_node("MatMul", ["x", key], ["y"], name=spoof)
    x, y = (onnx.helper.make_tensor_value_info(n, 1, ["N", d]) for n, d in (("x", 4), ("y", 6)))
    graph = onnx.helper.make_graph([node], spoof, [x], [y], [w])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "m.onnx")
    (folder / "d.csv").write_text(f"{spoof!r},y\n1,2\n")
    (folder / "p.json").write_text(json.dumps({"targets": {spoof: {"rank": 2}}, spoof: 1}))
    base, good = f"base{spoof}.safetensors", f"good{spoof}"
    return (
        f"targets|{base}", "targets|m.onnx", f"merge|{base}|{good}|-o|out{spoof}",
        f"merge|{base}|other|-o|out", f"merge|{base}|{good}|-o|out|--dry-run",
        f"merge-all|{base}|{good}|other|-o|outs", f"verify|{base}|{good}", f"verify|{base}|other",
        f"doctor|{base}|other", f"convert|{good}|-o|out.safetensors|--format|kohya",
        f"truncate|{good}|-o|out{spoof}|--rank|1", f"extract|{base}|{base}|-o|out",
        "merge|m.onnx|other|-o|out.onnx", f"export|m.onnx|{good}|-o|out.onnx|--mode|switch",
        "insert|m.onnx|-o|out.onnx|-r|2", f"insert|m.onnx|-o|out.onnx|--include|{spoof}",
        "insert|m.onnx|-o|out.onnx|--plan|p.json", f"plan|{spoof}|-o|out", f"bench|{spoof}.onnx",
        f"train|{spoof}.py:f|d.csv|-o|out", f"demo|-o|{base}", f"{spoof}", f"merge|--{spoof}",
    )  # fmt: skip


@pytest.mark.parametrize("spoof", [SPOOF, SPOOF.replace("\r\n", "")], ids=["lines", "line"])
def test_no_name_speaks_to_the_terminal(
    tmp_path: Path, spoof: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")  # "Error:" itself is red
    for line in spoofing(tmp_path, spoof):
        for more in ([], ["--json"]):
            argv = ["-q", *line.split("|"), *more]
            got = child.command(argv, tmp_path, seconds=60, terminal=True)
            odd = {c for c in got.out if not c.isprintable() and c not in "\r\n"}
            assert not odd, (line, odd, got.out[:300])
            assert "\nError: x" not in got.out, got.out
            for out in tmp_path.glob("out*"):
                shutil.rmtree(out) if out.is_dir() else out.unlink()


def test_json_is_valid_whatever_the_names_are(tmp_path: Path) -> None:
    for line in spoofing(tmp_path, SPOOF):
        got = child.command([*line.split("|"), "--json"], tmp_path, seconds=60)
        if got.out:
            assert json.loads(got.out.encode().decode("utf-8", "strict"))
        for out in tmp_path.glob("out*"):
            shutil.rmtree(out) if out.is_dir() else out.unlink()
