"""The probe of an adapter: what it holds, who carries it, and what passes over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.adapter_hash import adapter_hash
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.formats.probe_beside import add_probe
from lora_fx.passes.verbs.probe_adapter import add_to_adapter, probe_adapter
from lora_fx.probe.probe import Probe
from tests.fx.train.language_models import rows, write
from tests.probe import folders
from tests.probe.nets import multiplied

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
FILE = "lora_fx_probe.json"
NO_PROBE = "the probe is not written"


@pytest.fixture(scope="module")
def all_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.made(tmp_path_factory.mktemp("all"))


@pytest.fixture
def path(all_files: Path, tmp_path: Path) -> Path:
    """A copy of the adapter."""
    return folders.copy(all_files / "adapter", tmp_path / "copy")


def text_of(adapter: Path) -> str:
    return (adapter / FILE).read_text()


def test_it_holds_what_peft_computes(all_files: Path, path: Path) -> None:
    probe = Probe.from_text(text_of(path), "adapter")
    feeds = {name: torch.from_numpy(array) for name, array in probe.feeds().items()}
    base = AutoModelForCausalLM.from_pretrained(all_files / "base").eval()
    with torch.no_grad():
        without = base(**feeds).logits.numpy()
        model = PeftModel.from_pretrained(base, path).eval()
        logits = model(**feeds).logits.numpy()
    assert probe.mode == "adapter" and probe.base is not None
    gauge = probe.gauge()
    assert (
        gauge.excess(probe.at_points({"logits": logits}, "PEFT"), probe.adapters["adapter"].values)
        <= 1
    )
    assert gauge.excess(probe.at_points({"logits": without}, "PEFT"), probe.base) <= 1


@pytest.mark.parametrize(("number", "factor"), [("half", 0.5), ("double", 2.0)])
def test_other_scales_are_peft_s(number: str, factor: float, all_files: Path, path: Path) -> None:
    probe = Probe.from_text(text_of(path), "adapter")
    config = json.loads((path / "adapter_config.json").read_text())
    config["lora_alpha"] *= factor
    (path / "adapter_config.json").write_text(json.dumps(config))
    base = AutoModelForCausalLM.from_pretrained(all_files / "base")
    feeds = {name: torch.from_numpy(array) for name, array in probe.feeds().items()}
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, path).eval()(**feeds).logits.numpy()
    found = probe.at_points({"logits": logits}, "PEFT")
    assert probe.gauge().excess(found, getattr(probe.adapters["adapter"], number)) <= 1


def test_it_names_the_adapter_as_it_is_read(path: Path) -> None:
    probe = Probe.from_text(text_of(path), "adapter")
    adapter = lora_fx.load_adapter(path)
    assert probe.facts["adapters"] == {"adapter": adapter_hash(adapter)}
    assert adapter.metadata["probe"] == text_of(path)
    assert set(probe.adapters["adapter"].groups) == {"q", "v", "down"}
    assert probe.outputs["logits"].tolerance == 1e-5
    assert 0 < probe.precisions["tf32"] < probe.precisions["bfloat16"] < 0.1


def test_the_tensors_and_the_config_are_those_of_an_adapter_without(
    all_files: Path, tmp_path: Path
) -> None:
    module = folders.module_of(all_files / "base")
    lora_fx.save_adapter(module.adapter(), tmp_path / "plain")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (
            all_files / "adapter" / name
        ).read_bytes()


def test_the_module_is_as_it_was(all_files: Path, tmp_path: Path) -> None:
    module = folders.module_of(all_files / "base").train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    folders.with_probe(module, tmp_path / "a")
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("kind", ["short", "none"])
def test_short_and_none(kind: str, all_files: Path, tmp_path: Path) -> None:
    path = folders.with_probe(folders.module_of(all_files / "base"), tmp_path / "a", kind)
    assert (path / FILE).exists() is (kind == "short")
    if kind == "short":
        assert not Probe.from_text(text_of(path), "a").adapters["adapter"].groups


def test_a_capture_gives_what_the_trained_module_gives(all_files: Path, path: Path) -> None:
    captured = lora_fx.capture(str(all_files / "base"))
    adapter = lora_fx.load_adapter(path)
    bound = adapter.bind(captured)
    probe, notes = probe_adapter(captured, bound, adapter_hash(adapter))
    assert probe is not None and not notes
    expected = Probe.from_text(text_of(path), "adapter")
    found = probe.adapters["adapter"]
    assert probe.gauge().excess(found.values, expected.adapters["adapter"].values) <= 1
    assert probe.facts["adapters"] == expected.facts["adapters"]


# --- who carries it ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "x.safetensors", "kohya", "gguf"])
def test_files_of_the_same_adapter_carry_it(
    form: str, all_files: Path, path: Path, tmp_path: Path
) -> None:
    adapter, out = lora_fx.load_adapter(path), tmp_path / "out"
    text = text_of(path)
    if form == "folder":
        assert not lora_fx.save_adapter(adapter, out)
        assert text_of(out) == text
    elif form == "gguf":
        out = out.with_suffix(".gguf")
        assert not lora_fx.save_adapter(adapter, out, "gguf", base=all_files / "base")
        assert GGUFReader(out).fields["lora_fx.probe"].contents() == text
    else:
        out = out.with_suffix(".safetensors")
        format = "kohya" if form == "kohya" else "peft"
        notes = lora_fx.save_adapter(adapter, out, format)
        assert not [note for note in notes if NO_PROBE in note]
        with safe_open(out, "np") as file:
            assert file.metadata()["lora_fx.probe"] == text
    assert lora_fx.load_adapter(out).metadata["probe"] == text


def test_a_format_without_a_place_says_so(path: Path, tmp_path: Path) -> None:
    adapter = lora_fx.load_adapter(path)
    notes = lora_fx.save_adapter(adapter, tmp_path / "x.onnx_adapter", "onnx_adapter")
    assert f"{NO_PROBE}: format onnx_adapter has no place for it" in notes


CHANGES: dict[str, Callable[[Adapter], Adapter]] = {
    "weighted": lambda adapter: adapter.weighted(0.5),
    "fewer": lambda adapter: adapter.select("q_proj"),
    "other numbers": lambda adapter: multiplied(adapter, 1.5),
    "truncated": lambda adapter: lora_fx.truncate(adapter, rank=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_adapter_leaves_it_behind_with_a_note(
    change: str, path: Path, tmp_path: Path
) -> None:
    notes = lora_fx.save_adapter(CHANGES[change](lora_fx.load_adapter(path)), tmp_path / "out")
    assert [
        note for note in notes if note.startswith(f"{NO_PROBE}: it is of the adapter as it was")
    ]
    assert not (tmp_path / "out" / FILE).exists()
    assert "probe" not in lora_fx.load_adapter(tmp_path / "out").metadata


def test_an_adapter_that_goes_into_a_model_leaves_it_behind(all_files: Path, path: Path) -> None:
    module = lora_fx.insert(str(all_files / "base"), adapter=lora_fx.load_adapter(path))
    assert "probe" not in module.adapter().metadata


def test_a_saved_adapter_of_peft_keeps_the_file_and_merges_tell(
    all_files: Path, path: Path, tmp_path: Path
) -> None:
    """PEFT leaves the file where it saves into the same folder: it is of another adapter then."""
    base = AutoModelForCausalLM.from_pretrained(all_files / "base")
    model = PeftModel.from_pretrained(base, path, is_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    model.save_pretrained(path)
    report = lora_fx.merge(all_files / "base", path, tmp_path / "merged")
    assert [line for line in report.warnings if "no probe is written: that of" in line]


def test_a_file_of_tensors_gets_it_and_its_bytes_stay(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    adapter = lora_fx.load_adapter(path)
    probe = Probe.from_text(adapter.metadata["probe"], "x")
    plain = Adapter(adapter.entries)
    lora_fx.save_adapter(plain, file)
    before = load_file(file)
    add_probe(file, probe)
    after = load_file(file)
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    assert lora_fx.load_adapter(file).metadata["probe"] == probe.to_text()
    with pytest.raises(LoraFxError, match="a probe is added to adapter folders"):
        lora_fx.save_adapter(plain, tmp_path / "x.onnx_adapter", "onnx_adapter")
        add_probe(tmp_path / "x.onnx_adapter", probe)


def test_a_folder_with_it_is_replaced_by_force(path: Path, tmp_path: Path) -> None:
    lora_fx.save_adapter(lora_fx.load_adapter(path), tmp_path / "out")
    other = multiplied(lora_fx.load_adapter(path), 2)
    lora_fx.save_adapter(other, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / FILE).exists()


# --- damaged ones -----------------------------------------------------------------------------

DAMAGED: dict[str, bytes] = {
    "no JSON": b"{",
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "huge": b" " * 70_000,
    "a list": b"[]",
    "a format to come": b'{"format": 2}',
    "deep": b"[" * 60_000,
    "control characters": b'{"format": 1, "mode": "\\u001b[2J"}',
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_one_is_a_note_and_in_verify_one_line(
    case: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path / FILE).write_bytes(DAMAGED[case])
    adapter = lora_fx.load_adapter(path)
    assert "probe" not in adapter.metadata
    assert [note for note in adapter.metadata["notes"] if note.startswith("the probe is not read")]
    code, err = _failed(["verify", str(path)], capsys)
    assert code == 2 and "adapter, which runs" not in err


def test_an_adapter_alone_runs_nothing(
    all_files: Path, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = lora_fx.load_adapter(path)
    gguf = tmp_path / "x.gguf"
    lora_fx.save_adapter(adapter, gguf, "gguf", base=all_files / "base")
    for file in (path, gguf):
        code, err = _failed(["verify", str(file)], capsys)
        assert code == 2 and "is an adapter, which runs only in a model" in err
        assert "lora-fx probe" in err and "--server URL" in err and "verify MODEL" in err
    assert lora_fx.verify(all_files / "base", path), "does it fit?"


def test_a_gguf_model_is_run_by_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    code, err = _failed(["verify", str(file)], capsys)
    assert code == 2 and "its model is run by other programs" in err and "--server URL" in err


# --- train ------------------------------------------------------------------------------------


def test_train_leaves_it(
    all_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.jsonl", rows("prompt", 12))
    argv = ["train", str(all_files / "base"), "data.jsonl", "-r", "2", "--steps", "2"]
    argv += ["--include", "q_proj,v_proj,down_proj", "--lr", "0.05", "--batch-size", "2"]
    argv += ["--gradient-accumulation-steps", "1", "--json"]
    with pytest.raises(SystemExit) as stop:
        main([*argv, "-o", "a"])
    told = json.loads(capsys.readouterr().out)
    assert stop.value.code in (0, None)
    probe = Probe.from_text(text_of(tmp_path / "a"), "a")
    assert told["probe"]["bytes"] == probe.size
    assert told["probe"]["groups"] == {"adapter": 3} and told["probe"]["effects"]["adapter"] > 0
    adapter = lora_fx.load_adapter("a")
    assert probe.facts["adapters"] == {"adapter": adapter_hash(adapter)}
    lora_fx.merge(all_files / "base", "a", "merged")
    assert lora_fx.verify("merged")

    with pytest.raises(SystemExit):
        main([*argv, "-o", "b", "--probe", "none"])
    capsys.readouterr()
    assert not (tmp_path / "b" / FILE).exists()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    code, err = _failed([*argv, "-o", "c", "--probe", "long"], capsys)
    assert code == 2 and "unknown probe 'long'" in err


def test_a_probe_that_cannot_be_made_loses_no_training(
    all_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = folders.module_of(all_files / "base")
    lora_fx.save_adapter(module.adapter(), tmp_path / "a")

    def fails(*args: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("lora_fx.passes.verbs.probe_adapter.make_probe", fails)
    fields, notes = add_to_adapter(str(tmp_path / "a"), module, "full")
    assert not fields and notes == ["no probe is written: out of memory"]
    assert lora_fx.load_adapter(tmp_path / "a")


def _failed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert len([line for line in err.splitlines() if line.startswith("Error:")]) == 1, err
    assert "\x1b" not in err
    return int(stop.value.code or 0), err
