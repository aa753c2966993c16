"""The probe of a .pt2 file: torch passes over it, and verify asks the file alone."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lora_fx
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.files.program_manifest import add_member
from lora_fx.formats.graph_inputs import write_inputs
from lora_fx.onnx.manifest import manifest_of
from lora_fx.probe.in_program import MEMBER, probe_of_program
from tests.fx.pt2.edit import edited
from tests.probe.nets import IDS, SPOILT, adapter, adapters, net, verdicts


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    lora_fx.export(net(), folder / "m.pt2", (IDS,), mode="switch", adapters=adapters())
    return folder


@pytest.fixture
def file(exported: Path, tmp_path: Path) -> Path:
    """A copy of the file and its adapters."""
    return Path(shutil.copytree(exported, tmp_path / "copy")) / "m.pt2"


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_adapter_is_found(case: str, file: Path) -> None:
    spoil, expected = SPOILT[case]
    write_inputs(spoil(adapter(1)), manifest_of(file), file.with_name("de.safetensors"))
    report = lora_fx.verify(file)
    assert verdicts(report) == {"": "right", "de": expected, "fr": "right"}
    assert report.ok is (expected == "right")
    assert report.details["provider"] == "torch"


def test_the_file_of_the_base_as_an_adapter_has_no_effect(file: Path) -> None:
    shutil.copy(file.with_name("m.base.safetensors"), file.with_name("de.safetensors"))
    assert verdicts(lora_fx.verify(file)) == {"": "right", "de": "no effect", "fr": "right"}


def test_an_adapter_that_is_gone_is_said(file: Path) -> None:
    file.with_name("de.safetensors").unlink()
    report = lora_fx.verify(file)
    assert not report.ok and verdicts(report) == {"": "right", "fr": "right"}
    assert f"{file.with_name('de.safetensors')} does not exist" in report.warnings[0]


@pytest.mark.parametrize(("change", "expected"), [(1.01, "differs"), (np.nan, "not finite")])
def test_another_base_is_found(change: float, expected: str, file: Path, tmp_path: Path) -> None:
    def in_weight(data: bytes) -> bytes:
        return (np.frombuffer(data, np.float32) * np.float32(change)).tobytes()

    config = json.loads(_member(file, "data/weights/model_weights_config.json"))["config"]
    member = f"data/weights/{config['q_proj.weight']['path_name']}"
    other = edited(file, file.with_name("other.pt2"), {member: in_weight})
    assert verdicts(lora_fx.verify(other)) == {"": expected, "de": expected, "fr": expected}


def test_torch_loads_the_file_and_gives_what_the_probe_expects(file: Path) -> None:
    probe = probe_of_program(file)
    program = torch.export.load(str(file)).module()
    ids = torch.from_numpy(probe.feeds()["ids"])
    for name, expected in (("m.base", probe.base), ("de", probe.adapters["de"].values)):
        with torch.no_grad():
            logits = program(ids, **load_file(file.with_name(f"{name}.safetensors")))
        found = probe.at_points({next(iter(probe.outputs)): logits.numpy()}, "torch")
        assert expected is not None and probe.gauge().excess(found, expected) <= 1


def test_the_probe_lies_beside_the_manifest_below_the_root(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
        roots = {name.partition("/")[0] for name in archive.namelist()}
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert names.count("data/extra/lora_fx_probe.json") == 1 and len(roots) == 1


def test_equal_exports_give_equal_files(file: Path, tmp_path: Path) -> None:
    lora_fx.export(net(), tmp_path / "m.pt2", (IDS,), mode="switch", adapters=adapters())
    assert _member(file, MEMBER) == _member(tmp_path / "m.pt2", MEMBER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_has_its_own_tolerance(dtype: torch.dtype, tmp_path: Path) -> None:
    model = net().to(dtype)
    path = tmp_path / "m.pt2"
    lora_fx.export(model, path, (IDS,), mode="switch", adapters={"de": adapter(1, size=0.6)})
    probe = probe_of_program(path)
    assert {output.tolerance > 1e-3 for output in probe.outputs.values()} == {True}
    assert verdicts(lora_fx.verify(path)) == {"": "right", "de": "right"}


def test_short_and_none(tmp_path: Path) -> None:
    lora_fx.export(
        net(), tmp_path / "s.pt2", (IDS,), mode="switch", adapters=adapters(), probe="short"
    )
    assert not probe_of_program(tmp_path / "s.pt2").adapters["de"].groups
    assert lora_fx.verify(tmp_path / "s.pt2")
    lora_fx.export(net(), tmp_path / "n.pt2", (IDS,), mode="switch", probe="none")
    with pytest.raises(LoraFxError, match=r"n\.pt2: it has no probe"):
        lora_fx.verify(tmp_path / "n.pt2")


def test_a_provider_has_no_effect(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LoraFxError, match=r"no effect when no \.onnx"):
        lora_fx.verify(file, provider="cpu")
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(file), "--provider", "cpu"])
    assert stop.value.code == 2


def test_exit_codes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for expected in (0, 1):
        with pytest.raises(SystemExit) as stop:
            main(["verify", str(file)])
        assert stop.value.code == expected
        output = capsys.readouterr().out
        assert ("de: takes effect (expected 0.43, found 0.43)" in output) is (expected == 0)
        shutil.copy(file.with_name("fr.safetensors"), file.with_name("de.safetensors"))
    assert "de: the outputs are those of the adapter fr" in output


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no number": lambda data: data["base"].__setitem__(0, None),
    "too few numbers": lambda data: data["base"].pop(),
    "another mode": lambda data: data.update(mode="merged"),
    "an unknown mode": lambda data: data.update(mode="\x1b[2J"),
    "a format to come": lambda data: data.update(format=2),
    "another input": lambda data: data["inputs"].update(mask=data["inputs"].pop("ids")),
    "another dtype": lambda data: data["inputs"]["ids"].update(dtype="int32"),
    "a float for ids": lambda data: data["inputs"].update(
        ids={"dtype": "float32", "shape": [2, 5], "fill": 1}
    ),
    "more axes": lambda data: data["inputs"]["ids"].update(shape=[2, 5, 1]),
    "ids out of range": lambda data: data["inputs"].update(
        ids={"dtype": "int64", "shape": [2, 5], "fill": 1 << 40}
    ),
    "a huge input": lambda data: data["inputs"].update(
        ids={"dtype": "int64", "shape": [1 << 20, 1 << 20], "fill": 1}
    ),
    "another output": lambda data: data["outputs"].update(
        logits=data["outputs"].pop(next(iter(data["outputs"]))), points=[["logits", 0]]
    ),
    "a point outside": lambda data: data["points"].__setitem__(0, [data["points"][0][0], 1 << 40]),
    "a path": lambda data: data["adapters"]["de"].update(file="../de.safetensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_probe_is_one_line(
    case: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(data: bytes) -> bytes:
        value = json.loads(data)
        HOSTILE[case](value)
        return json.dumps(value).encode()

    _refused(edited(file, file.with_name("h.pt2"), {MEMBER: change}), capsys)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\xfe", b" " * 70_000, b'{"format": 1e400}', b"[" * 60_000]
)
def test_a_damaged_probe_is_one_line(
    text: bytes, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _refused(edited(file, file.with_name("h.pt2"), {MEMBER: lambda _: text}), capsys)


def test_a_bomb_is_not_unpacked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        member = zipfile.ZipInfo(f"{root}/data/extra/b")
        archive.writestr(member, b" " * 1_000_000, zipfile.ZIP_DEFLATED)
    _refused(file, capsys)


def test_two_probes_are_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        add_member(file, MEMBER, b"{}")
    _refused(file, capsys)


def test_an_adapter_that_is_no_tensor_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.with_name("de.safetensors").write_bytes(b"no tensors")
    _refused(file, capsys)


def _refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(file)])
    output = capsys.readouterr()
    assert stop.value.code == 2, output
    assert not output.out
    assert len([line for line in output.err.splitlines() if line.startswith("Error:")]) == 1
    assert "\x1b" not in output.err and "report this" not in output.err


def _member(file: Path, member: str) -> bytes:
    with zipfile.ZipFile(file) as archive:
        root = archive.namelist()[0].partition("/")[0]
        return archive.read(f"{root}/{member}")
