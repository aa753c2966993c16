"""Files of older versions read as they did, and files of later ones are refused by number."""

from __future__ import annotations

import importlib
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_fx
from lora_fx.checkpoint.provenance import METADATA, history
from lora_fx.errors import LoraFxError, check_format, stamp
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.fx.train.state_folder import read_folder
from lora_fx.onnx.adapter_session import Session
from lora_fx.onnx.manifest import PROPERTY, WHOLE_FORMAT, manifest_of
from lora_fx.onnx.session import open_session
from lora_fx.targets.rank_plan import read_plan
from tests.fixtures.old import IDS, net, small

OLD = Path(__file__).parent / "fixtures" / "0.1"
NUMBERS: Mapping[str, Any] = np.load(OLD / "numbers.npz")
TERMS = {
    "qkv": 4,
    "scores": 4,
    "softmax": 5,
    "values": 5,
    "mean": 4,
    "variance": 4,
    "conv": 3 * 4,
    "experts": 4,
    "both experts": 2,
    "score": 6,
}
"""The numbers that each sum of the net adds, from the table to the output."""


def effect(adapter: Any) -> Any:
    """What the net makes of the example under an adapter."""
    return lora_fx.fold(*net(), adapter=adapter)(IDS).detach().numpy()


def assert_near(got: Any, name: str) -> None:
    """Compare with the stored outputs of an adapter, which another processor may have computed.

    Each sum rounds once a term, by half an epsilon at most, in this run and in the stored one.
    """
    want = NUMBERS[name]
    assert got.dtype == want.dtype == np.float32
    gate = sum(TERMS.values()) * np.finfo(want.dtype).eps * np.abs(want).max()
    base = net()[0](IDS).detach().numpy()
    assert np.abs(want - base).max() > 100 * gate, "the adapter decides"
    np.testing.assert_allclose(got, want, rtol=0.0, atol=gate)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        *((n, n) for n in ("parts", "lookup", "dora", "rslora", "frozen", "plus", "trained")),
        ("single.safetensors", "parts"),
        ("kohya.safetensors", "plain"),
        ("diffusers.safetensors", "plain"),
        ("plain", "plain"),
    ],
)
def test_adapters(file: str, name: str) -> None:
    adapter = lora_fx.load_adapter(OLD / file)
    entries = {key.removeprefix("unet."): e for key, e in adapter.entries.items()}
    adapter = replace(adapter, entries=entries)
    assert_near(effect(adapter), name)


def test_a_program_with_branches() -> None:
    captured = lora_fx.capture(str(OLD / "insert.pt2"))
    (low,) = captured.adapter.lowrank.values()
    fresh = lora_fx.insert(*small(), rank=2).adapter().lowrank["weight"]  # of the same seed
    assert (low.layout, low.use, low.origin) == (fresh.layout, fresh.use, fresh.origin)
    assert low.alpha == 4.0 and not low.b.any()
    np.testing.assert_array_equal(low.a, fresh.a)


def test_onnx_files() -> None:
    feeds = {"ids": IDS.numpy()}

    def near(got: Mapping[str, Any], name: str) -> None:
        assert_near(next(iter(got.values())), name)

    for mode in ("switch", "load"):
        assert manifest_of(OLD / f"{mode}.onnx").mode == mode
    session = Session(OLD / "switch.onnx", provider="cpu")
    session.load("plain", OLD / "plain")
    near(session.run(feeds, adapter="plain"), "plain")
    near(Session(OLD / "load.onnx", provider="cpu", adapter=OLD / "plain").run(feeds), "plain")
    rows = {"adapter_ids": np.array([1, 1])}
    near(open_session(OLD / "batch.onnx", "cpu").run({**feeds, **rows}), "conv")
    near(open_session(OLD / "merged.onnx", "cpu").run(feeds), "plain")
    (low,) = lora_fx.load_adapter(OLD / "insert.onnx").lowrank.values()
    assert low.rank == 2 and low.alpha == 4.0 and low.layout is not None and not low.b.any()
    with pytest.raises(LoraFxError, match="already merged into it"):
        lora_fx.merge(OLD / "merged.onnx", [OLD / "plain"], "never.onnx")


def test_merged_weights(tmp_path: Path) -> None:
    merged = OLD / "merged.safetensors"
    lora_fx.merge(OLD / "base.safetensors", [OLD / "plain"], tmp_path / merged.name)
    for name, value in load_file(tmp_path / merged.name).items():
        np.testing.assert_array_equal(value, load_file(merged)[name])
    first, second = history(open_checkpoint(OLD / "again.safetensors"))
    assert first == history(open_checkpoint(tmp_path / merged.name))[0] != second
    with pytest.raises(LoraFxError, match="already merged into it"):
        lora_fx.merge(OLD / "again.safetensors", [OLD / "plain"], tmp_path / "never.safetensors")


def test_plans_and_states(tmp_path: Path) -> None:
    plan = read_plan(OLD / "plan.json")
    assert plan == {k: {"rank": 2, "alpha": 4.0} for k in ("score.weight", "conv.weight")}
    words, tensors = read_folder(str(OLD / "state"))
    assert words["step"] == 2
    low = lora_fx.load_adapter(OLD / "trained").lowrank["score.weight"]
    np.testing.assert_array_equal(tensors["now/score.lora_B.weight"], low.b)


def header(path: Path, field: str) -> None:
    """Give our JSON in the header of a file the number 2."""
    with safe_open(path, "np") as file:
        metadata = dict(file.metadata())
    said = json.loads(metadata[field])
    (said[-1] if isinstance(said, list) else said)["format"] = 2
    save_file(load_file(path), path, {**metadata, field: json.dumps(said)})


def onnx_field(path: Path, field: str) -> None:
    """Give our JSON in the metadata of a model the number after the last one that is read."""
    model = onnx.load(path)
    (row,) = (p for p in model.metadata_props if p.key == field)
    said = json.loads(row.value)
    later = WHOLE_FORMAT + 1 if field == PROPERTY else 2
    (said[-1] if isinstance(said, list) else said)["format"] = later
    row.value = json.dumps(said)
    onnx.save(model, path)


def text(path: Path, field: str) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 2}))


def member(path: Path, name: str) -> None:
    with zipfile.ZipFile(path) as old:
        members = {i: old.read(i) for i in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for info, content in members.items():
            if info.filename.endswith(name):
                content = json.dumps({**json.loads(content), "format": 4}).encode()
            new.writestr(info, content)


def merged_again(path: Path) -> None:
    lora_fx.merge(path, [OLD / "plus"], path.with_name(f"new{path.suffix}"))


Edit = Callable[[Path, str], None]
LATER: dict[str, tuple[str, str, Edit, str, Callable[[Path], object]]] = {
    "PEFT folder": ("parts", "adapter_model.safetensors", header, "lora_fx", lora_fx.load_adapter),
    "PEFT file": ("single.safetensors", "", header, "lora_fx", lora_fx.load_adapter),
    "kohya": ("kohya.safetensors", "", header, "lora_fx_names", lora_fx.load_adapter),
    "diffusers": ("diffusers.safetensors", "", header, "lora_fx_names", lora_fx.load_adapter),
    "pt2": ("insert.pt2", "", member, "lora_fx.json", lambda p: lora_fx.capture(str(p))),
    "switch": ("switch.onnx", "", onnx_field, PROPERTY, manifest_of),
    "load": ("load.onnx", "", onnx_field, PROPERTY, manifest_of),
    "batch": ("batch.onnx", "", onnx_field, PROPERTY, manifest_of),
    "insert": ("insert.onnx", "", onnx_field, PROPERTY, lora_fx.load_adapter),
    "merged ONNX": ("merged.onnx", "", onnx_field, METADATA, merged_again),
    "merged": ("merged.safetensors", "", header, METADATA, merged_again),
    "plan": ("plan.json", "", text, "version", read_plan),
    "state": ("state", "state.json", text, "format", lambda p: read_folder(str(p))),
}


@pytest.mark.parametrize("kind", LATER)
def test_a_later_format_is_refused(kind: str, tmp_path: Path) -> None:
    name, inside, edit, field, read = LATER[kind]
    path = tmp_path / name
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    edit(path / inside, field)
    known = WHOLE_FORMAT if field == PROPERTY else 1
    if kind == "pt2":
        known = 3
    said = f"format {known + 1}; this lora-fx reads formats up to {known}"
    with pytest.raises(LoraFxError, match=said) as caught:
        read(path)
    assert str(path) in caught.value.message and "update lora-fx" in caught.value.hint
    assert caught.value.exit_code == 2


def test_what_is_written_carries_its_format(tmp_path: Path) -> None:
    adapter = lora_fx.load_adapter(OLD / "plain").bind(*net())
    lora_fx.save_adapter(adapter, tmp_path / "peft.safetensors", "peft")
    lora_fx.save_adapter(adapter, tmp_path / "kohya.safetensors", "kohya")
    for file, field in (("peft", "lora_fx"), ("kohya", "lora_fx_names")):
        with safe_open(tmp_path / f"{file}.safetensors", "np") as opened:
            said = json.loads(opened.metadata()[field])
        assert said["format"] == said["version"] == 1


@pytest.mark.parametrize("number", [None, 0, True, "1", 1.0])
def test_no_number(number: object) -> None:
    check_format({**stamp(), "more": 2}, "x")
    check_format({"version": 1}, "x")
    with pytest.raises(LoraFxError, match="expected a whole number from 1 to 1"):
        check_format({"format": number}, "x")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lora_fx.adapter.base", "Variant"),
        ("lora_fx.adapter.lowrank", "FileLayer"),
        ("lora_fx.targets.plan", "Ranked"),
        ("lora_fx.targets.plan", "RankPlan"),
        ("lora_fx.targets.target", "Found"),
        ("lora_fx.targets.target", "Refusal"),
        ("lora_fx.targets.target", "Unreached"),
    ],
)
def test_classes_are_found_where_they_were(module: str, name: str) -> None:
    """Pickles, and variants written outside, name them by their older modules."""
    assert getattr(importlib.import_module(module), name).__name__ == name
    assert not hasattr(importlib.import_module(module), "Missing")
