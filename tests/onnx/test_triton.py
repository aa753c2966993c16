"""Model repositories: read by Triton's own protobuf, and compared with the session of the model.

The rules are those of the server (tests/onnx/triton_rules.py); no server runs here.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.errors import LoraFxError
from lora_fx.files import atomic
from lora_fx.onnx import Session
from lora_fx.onnx.session import open_session
from lora_fx.onnx.triton import check_repository, write_repository
from lora_fx.passes.verbs import export as pass_export
from tests.onnx.triton_models import IDS, Net, adapter, export, folders
from tests.onnx.triton_rules import loads, proto


def tree(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with m.onnx and the repository `models` made by the same export."""
    folder = tmp_path_factory.mktemp("merged")
    export(folder / "m.onnx", folder / "models", adapters=adapter(1))
    return folder


def test_merged(merged: Path) -> None:
    assert folders(merged / "models") == ["m", "m/1", "m/1/model.onnx", "m/config.pbtxt"]
    model = merged / "models" / "m" / "1" / "model.onnx"
    assert model.read_bytes() == (merged / "m.onnx").read_bytes()
    config = loads(merged / "models" / "m")
    assert (config.name, config.backend, config.max_batch_size) == ("m", "onnxruntime", 0)
    dims = {p.name: list(p.dims) for p in (*config.input, *config.output)}
    assert dims == {"ids": [-1, -1], "logits": [-1, -1, 7], "pooled": [-1, 7], "loss": [1]}
    assert check_repository(merged / "models") == {"m": [1]}


def test_the_rules_find_what_is_wrong(merged: Path, tmp_path: Path) -> None:
    """Each edit is refused by the server's rules and by check_repository, which share no code."""
    home = tmp_path / "models" / "m"
    shutil.copytree(merged / "models", tmp_path / "models")
    config = home / "config.pbtxt"
    right = config.read_text()
    loss = right[right.rindex("output {") :]
    for old, new, why in (
        ('"ids"', '"idz"', "input 'ids' is missing"),
        ("TYPE_INT64", "TYPE_INT32", "'ids' is TYPE_INT32"),
        ("dims: [ -1, -1 ]", "dims: [ -1 ]", "'ids' is TYPE_INT64"),
        ("[ -1, -1, 7 ]", "[ -1, -1, 8 ]", "'logits' is TYPE_FP32"),
        ('"pooled"', '"pooler"', "'pooled' is missing"),
        ("max_batch_size: 0", "max_batch_size: 4", "a batch size needs"),
        (loss, loss.replace("[ 1 ]", "[ 2 ]"), "'loss' is"),
        ('name: "m"', 'name: "n"', "name is 'n'"),
        ("onnxruntime", "tensorrt", "backend is 'tensorrt'"),
        ("TYPE_FP32", "TYPE_NONE", "not a ModelConfig"),
    ):
        assert old in right
        config.write_text(right.replace(old, new, 1))
        with pytest.raises(AssertionError):
            loads(home)
        with pytest.raises(LoraFxError, match=why):
            check_repository(tmp_path / "models")
    config.write_text(right.replace(loss, ""))
    with pytest.raises(LoraFxError, match="'loss' is missing"):
        check_repository(tmp_path / "models")
    config.unlink()
    with pytest.raises(LoraFxError, match="cannot be read"):
        check_repository(tmp_path / "models")


def test_switch_takes_adapters_as_inputs(tmp_path: Path) -> None:
    adapters = {"one": adapter(1, 3), "two": adapter(2, 5)}
    export(tmp_path / "s.onnx", tmp_path / "models", adapters=adapters, mode="switch")
    config = loads(tmp_path / "models" / "s")
    optional = {p.name: list(p.dims) for p in config.input if p.optional}
    assert sorted(optional.values()) == [[-1, 7], [12, -1]]
    model = tmp_path / "models" / "s" / "1" / "model.onnx"
    with_two = Session(tmp_path / "s.onnx", provider="cpu")
    with_two.load("two", adapters["two"])
    feeds = {"ids": IDS.numpy()}
    sent = Session(model, provider="cpu").manifest.tensors(adapters["two"])
    assert sent.keys() == optional.keys()
    got = open_session(model, "cpu").session.run(["logits"], {**feeds, **sent})[0]
    assert np.array_equal(got, with_two.run(feeds, adapter="two")["logits"])
    assert not np.array_equal(got, with_two.run(feeds)["logits"])
    with pytest.raises(LoraFxError, match="no adapters as inputs"):
        write_repository(model, tmp_path / "models", name="b", max_batch=8)
    assert folders(tmp_path / "models") == sorted(["s", "s/1", "s/1/model.onnx", "s/config.pbtxt"])


def test_in_mode_load_a_server_serves_the_base_which_is_said(tmp_path: Path) -> None:
    loaded = export(
        tmp_path / "l.onnx", tmp_path / "models", adapters={"one": adapter(1)}, mode="load"
    )
    assert [line for line in loaded.warnings if "the copy for a server is the base alone" in line]
    apart = export(tmp_path / "n.onnx", None, adapters={"two": adapter(1)}, mode="load")
    assert not [line for line in apart.warnings if "server" in line]


@pytest.mark.parametrize("max_batch", [None, 8])
def test_batch(tmp_path: Path, max_batch: int | None) -> None:
    export(
        tmp_path / "b.onnx", tmp_path / "models", Net(scalar=False), mode="batch", scales=True,
        adapters=[adapter(1), adapter(2)], max_batch=max_batch,
    )  # fmt: skip
    config = loads(tmp_path / "models" / "b")
    ports = {p.name: p for p in config.input}
    assert list(ports) == ["ids", "adapter_ids", "adapter_scales"]
    assert proto().DataType.Name(ports["adapter_ids"].data_type) == "TYPE_INT64"
    assert config.max_batch_size == (max_batch or 0)
    assert config.HasField("dynamic_batching") == bool(max_batch)
    assert list(ports["ids"].dims) == ([-1] if max_batch else [-1, -1])
    assert list(ports["adapter_ids"].dims) == ([1] if max_batch else [-1])
    assert ports["adapter_ids"].HasField("reshape") == bool(max_batch)
    # a later version without --max-batch keeps to the config that is there
    assert write_repository(tmp_path / "b.onnx", tmp_path / "models")[0].parts[-2] == "2"
    assert check_repository(tmp_path / "models") == {"b": [1, 2]}


def test_a_batch_size_needs_a_batch_everywhere(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match=r"loss \[\]"):
        export(tmp_path / "m.onnx", tmp_path / "models", max_batch=8)
    with pytest.raises(LoraFxError, match="is for a Triton repository"):
        export(tmp_path / "m.onnx", None, max_batch=8)
    with pytest.raises(LoraFxError, match="batch size -1; expected 0 or more"):
        export(tmp_path / "m.onnx", tmp_path / "models", max_batch=-1)
    assert not list(tmp_path.iterdir())


def test_data_keeps_its_name(tmp_path: Path) -> None:
    export(tmp_path / "m.onnx", tmp_path / "models", external_over=100)
    shutil.move(tmp_path / "models", tmp_path / "moved")
    for file in ("m.onnx", "m.onnx.data"):
        (tmp_path / file).unlink()  # the copy needs nothing of the original
    version = tmp_path / "moved" / "m" / "1"
    assert folders(version) == ["m.onnx.data", "model.onnx"]
    loads(tmp_path / "moved" / "m")
    got = open_session(version / "model.onnx", "cpu").run({"ids": IDS.numpy()})["logits"]
    assert np.allclose(got, Net()(IDS)["logits"].detach().numpy(), rtol=1e-5, atol=1e-6)


BY_HAND = """
instance_group [ { count: 2 kind: KIND_CPU }, < count: 1 > ];
optimization { execution_accelerators { gpu_execution_accelerator : [ {
  name : 'tensorrt' # { a comment }
  parameters { key: "precision\\x5fmode" value: "FP" "16" } } ] } }
version_policy: { specific: { versions: [ 1, 8 ] } }
"""


def test_versions(merged: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(merged / "models", models)
    config = models / "m" / "config.pbtxt"
    config.write_text("# by hand\n" + BY_HAND + config.read_text().replace("TYPE_INT64", "9"))
    before = config.read_bytes()
    (models / "m" / "7").mkdir()
    report = export(tmp_path / "m.onnx", models, adapters=adapter(2))
    assert str(models / "m" / "8" / "model.onnx") in report.outputs
    assert config.read_bytes() == before
    assert proto_names(models / "m") == {"ids"}
    old, new = (models / "m" / v / "model.onnx" for v in "18")
    assert old.read_bytes() != new.read_bytes() == (tmp_path / "m.onnx").read_bytes()


def proto_names(home: Path) -> set[str]:
    return {p.name for p in loads(home, "8").input}


def other(tmp_path: Path, models: Path, **options: Any) -> None:
    export(tmp_path / "m.onnx", models, Net(scalar=False), **options)


@pytest.mark.parametrize("mode", ["merged", "switch", "batch"])
def test_another_model_is_refused_and_nothing_written(
    mode: str, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(merged / "models", tmp_path / "models")
    before = tree(tmp_path)
    adapters = {"merged": None, "switch": {"one": adapter(1)}, "batch": [adapter(1)]}[mode]
    with pytest.raises(LoraFxError, match=r"config.pbtxt is for another model: (in|out)put '"):
        other(tmp_path, tmp_path / "models", mode=mode, adapters=adapters)
    assert tree(tmp_path) == before
    for text, why in (('backend: "python"', "backend is 'python'"), ("{", "not a ModelConfig")):
        (tmp_path / "models" / "m" / "config.pbtxt").write_text(text)
        with pytest.raises(LoraFxError, match=why):
            monkeypatch.setattr(pass_export, "ExportOptions", None)  # before any work
            other(tmp_path, tmp_path / "models", mode=mode, adapters=adapters)
    assert sorted(tree(tmp_path)) == sorted(before)


def test_no_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, why in (("file", "is not a folder"), ("none/models", "does not exist")):
        with pytest.raises(LoraFxError, match=why):
            export(tmp_path / "m.onnx", tmp_path / folder)
    export(tmp_path / "x.onnx", None)
    with pytest.raises(LoraFxError, match="cannot be the name of a folder"):
        write_repository(tmp_path / "x.onnx", tmp_path / "models", name="../up")
    assert folders(tmp_path) == ["file", "x.onnx"]


@pytest.mark.parametrize("fails", ["m.onnx", "1", "m"])
def test_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Of the file's name after the copy has its own; and of the copy's."""
    there = tmp_path / "models"
    if fails == "1":
        there.mkdir()
        export(tmp_path / "m.onnx", there)
        shutil.rmtree(there / "m" / "1")
        (tmp_path / "m.onnx").unlink()
    before, swap, seen = folders(tmp_path), atomic._swap, []

    def failing(new: Path, target: Path, old: Path) -> None:
        seen.append(target.name)
        if target.name == fails:
            raise OSError(28, "No space left on device")
        swap(new, target, old)

    monkeypatch.setattr(atomic, "_swap", failing)
    with pytest.raises(LoraFxError, match="disk full"):
        export(tmp_path / "m.onnx", there, external_over=100)
    assert seen[-1] == fails and folders(tmp_path) == before
