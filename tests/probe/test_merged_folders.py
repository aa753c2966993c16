"""The probe of a merged folder, and verify of the folder alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.probe_in_header import probe_of_merge
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.passes.verbs import verify_checkpoint
from lora_fx.passes.verbs.probe_adapter import add_to_adapter
from lora_fx.probe.probe import Probe
from tests.probe import folders
from tests.probe.folders import SHARD, SPOILT
from tests.probe.nets import multiplied, verdicts


@pytest.fixture(scope="module")
def all_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its adapter, and the merge of both."""
    path = folders.made(tmp_path_factory.mktemp("all"))
    report = lora_fx.merge(path / "base", path / "adapter", path / "merged")
    assert not [line for line in report.warnings if "probe" in line]
    return path


@pytest.mark.parametrize("case", SPOILT)
def test_wrong_weights_are_found(case: str, all_files: Path, tmp_path: Path) -> None:
    spoilt, expected = SPOILT[case]
    merged = folders.copy(all_files / "merged", tmp_path / "merged")
    folders.put(spoilt(all_files), merged)
    report = lora_fx.verify(merged)
    assert verdicts(report) == {"adapter": expected}
    assert report.ok is (expected == "right")


def test_transformers_gives_what_the_probe_expects(all_files: Path) -> None:
    probe = Probe.from_text(folders.text_of(all_files / "merged"), "merged")
    feeds = {name: torch.from_numpy(array) for name, array in probe.feeds().items()}
    for name, expected in (("merged", probe.adapters["adapter"].values), ("base", probe.base)):
        model = AutoModelForCausalLM.from_pretrained(all_files / name).eval()
        with torch.no_grad():
            logits = model(**feeds).logits.numpy()
        assert set(probe.outputs) == {"logits"} and expected is not None
        assert probe.gauge().excess(probe.at_points({"logits": logits}, name), expected) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_folder_is_told_within_its_dtype(
    dtype: torch.dtype, all_files: Path, tmp_path: Path
) -> None:
    merged = folders.copy(all_files / "merged", tmp_path / "merged")
    folders.cast(merged, dtype)
    assert verdicts(lora_fx.verify(merged)) == {"adapter": "right"}
    folders.put(SPOILT["the base alone"][0](all_files), merged)
    folders.cast(merged, dtype)
    report = lora_fx.verify(merged)
    assert verdicts(report) == {"adapter": "no effect"} and not report


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 4 * 2.0**-7), (torch.float16, 16 * 2.0**-10)]
)
def test_a_narrow_base_has_a_probe_of_its_dtype(
    dtype: torch.dtype, tolerance: float, all_files: Path, tmp_path: Path
) -> None:
    base = folders.copy(all_files / "base", tmp_path / "base")
    folders.cast(base, dtype)
    module = folders.module_of(base)
    lora_fx.save_adapter(module.adapter(), tmp_path / "adapter")
    add_to_adapter(str(tmp_path / "adapter"), module, "full")
    lora_fx.merge(base, tmp_path / "adapter", tmp_path / "merged")
    probe = probe_of_merge(open_checkpoint(tmp_path / "merged"))
    assert probe.outputs["logits"].tolerance == pytest.approx(tolerance, rel=1e-2)
    assert not probe.precisions
    assert verdicts(lora_fx.verify(tmp_path / "merged")) == {"adapter": "right"}
    folders.put(folders.base_tensors(all_files), tmp_path / "merged")
    folders.cast(tmp_path / "merged", dtype)
    assert verdicts(lora_fx.verify(tmp_path / "merged")) == {"adapter": "no effect"}


def test_codes_are_told_only_where_they_are_right(
    all_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_checkpoint, "_precision_of", lambda model: "int8")
    assert verdicts(lora_fx.verify(all_files / "merged")) == {"adapter": "right"}
    merged = folders.copy(all_files / "merged", tmp_path / "merged")
    for case, expected in (("another base", "cannot tell"), ("not a number", "not finite")):
        folders.put(SPOILT[case][0](all_files), merged)
        report = lora_fx.verify(merged)
        assert verdicts(report) == {"adapter": expected}
        assert report.ok is (expected == "cannot tell")


def test_the_first_shard_that_is_written_has_it_alone(all_files: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(all_files / "base")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    lora_fx.merge(tmp_path / "base", all_files / "adapter", tmp_path / "merged")
    shards = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(shards) > 2
    having = []
    for shard in shards:
        with safe_open(shard, "np") as file:
            if "lora_fx.probe" in (file.metadata() or {}):
                having.append(shard.name)
                assert "lora_fx.merge" in file.metadata()
    assert len(having) == 1
    assert verdicts(lora_fx.verify(tmp_path / "merged")) == {"adapter": "right"}


def test_merges_of_something_else_have_none_and_say_why(all_files: Path, tmp_path: Path) -> None:
    base, path = all_files / "base", all_files / "adapter"
    adapter = lora_fx.load_adapter(path)
    other = folders.module_of(base, seed=3).adapter()
    twice = multiplied(adapter, 2)
    cases: dict[str, tuple[Path, object]] = {
        "the adapter is merged with weight 0.5": (base, (path, 0.5)),
        "several adapters are merged": (base, [path, other]),
        "the base has an adapter merged into it already": (tmp_path / "first", path),
        "that of the adapter is of the adapter as it was before a change": (base, twice),
    }
    lora_fx.merge(base, other, tmp_path / "first")
    for number, (reason, (of, adapters)) in enumerate(cases.items()):
        given = [adapters] if isinstance(adapters, tuple) else adapters
        report = lora_fx.merge(of, given, tmp_path / f"m{number}")
        assert [line for line in report.warnings if "probe" in line] == [
            f"no probe is written: {reason}"
        ]
        with pytest.raises(LoraFxError, match="it has no probe"):
            lora_fx.verify(tmp_path / f"m{number}")


def test_an_adapter_without_a_probe_is_no_reason_for_a_line(
    all_files: Path, tmp_path: Path
) -> None:
    adapter = folders.module_of(all_files / "base", seed=3).adapter()
    report = lora_fx.merge(all_files / "base", adapter, tmp_path / "m")
    assert not [line for line in report.warnings if "probe" in line]


def test_a_second_merge_takes_the_first_one_s_probe_away(all_files: Path, tmp_path: Path) -> None:
    other = folders.module_of(all_files / "base", seed=3).adapter()
    lora_fx.merge(all_files / "merged", other, tmp_path / "m")
    with pytest.raises(LoraFxError, match="it has no probe"):
        lora_fx.verify(tmp_path / "m")


def test_a_second_merge_that_leaves_the_first_shard_alone(all_files: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(all_files / "base")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    lora_fx.merge(tmp_path / "base", all_files / "adapter", tmp_path / "one")
    adapter = folders.module_of(all_files / "base", seed=3).adapter()
    last = Adapter({key: low for key, low in adapter.items() if "layers.1.mlp.down" in key})
    lora_fx.merge(tmp_path / "one", last, tmp_path / "two")
    with pytest.raises(LoraFxError, match=r"no probe|not of the merge that it records"):
        lora_fx.verify(tmp_path / "two")


def test_the_adapter_is_the_same_in_another_order(all_files: Path, tmp_path: Path) -> None:
    adapter = folders.renamed(lora_fx.load_adapter(all_files / "adapter"))
    lora_fx.merge(all_files / "base", adapter, tmp_path / "m")
    assert verdicts(lora_fx.verify(tmp_path / "m")) == {"adapter": "right"}


def test_tensors_are_compared_as_before(all_files: Path) -> None:
    report = lora_fx.verify(all_files / "merged", all_files / "base", adapter=all_files / "adapter")
    assert report.ok


def test_weights_alone_do_not_run(all_files: Path) -> None:
    with pytest.raises(LoraFxError, match="it holds weights alone"):
        lora_fx.verify(all_files / "merged" / SHARD)


@pytest.mark.parametrize(("tol", "expected"), [(1e-9, "right"), (0.5, "too small to tell")])
def test_a_tolerance_of_the_caller(tol: float, expected: str, all_files: Path) -> None:
    assert verdicts(lora_fx.verify(all_files / "merged", tol=tol)) == {"adapter": expected}


def test_options_without_effect(all_files: Path) -> None:
    for options in ({"provider": "cpu"}, {"run": True}, {"adapter": all_files / "adapter"}):
        with pytest.raises(LoraFxError, match="no effect"):
            lora_fx.verify(all_files / "merged", **options)


def test_the_command(all_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _verified(all_files / "merged", capsys)[0] == 0
    code, out, _ = _verified(all_files / "merged", capsys, "--json")
    told = json.loads(out)
    assert code == 0 and told["mode"] == "adapter" and told["provider"] == "torch"
    code, out, err = _verified(all_files / "base", capsys)
    assert code == 2 and "base: it has no probe" in err and not out


HASH = '"adapters": {"adapter": "'
FILLED = '"shape": [2, 5], "fill"'
HOSTILE: dict[str, Callable[[str], str]] = {
    "no JSON": lambda text: "{",
    "too long": lambda text: text + " " * 70_000,
    "control characters": lambda text: text.replace('"adapter"', '"\\u001b[2J"', 1),
    "of another adapter": lambda text: text.replace(HASH, f"{HASH}0"),
    "no hash": lambda text: text.replace('"facts": {', '"facts": {"adapters": 5, "was": {'),
    "NaN": lambda text: text.replace('"base": [', '"base": [NaN, '),
    "another input": lambda text: text.replace('"input_ids": {', '"input_idx": {'),
    "another output": lambda text: text.replace('"logits"', '"logitz"'),
    "ids out of range": lambda text: re.sub(
        r'"values": \[\d+', '"values": [9999999', text, count=1
    ),
    "an input of floats": lambda text: text.replace('"int64"', '"float16"', 1),
    "a huge input": lambda text: text.replace(FILLED, '"shape": [2000000, 2000000], "fill"'),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_probe_is_one_line(
    case: str, all_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = folders.copy(all_files / "merged", tmp_path / "merged")
    text = folders.text_of(merged)
    assert HOSTILE[case](text) != text
    folders.put_text(merged, HOSTILE[case](text))
    code, out, err = _verified(merged, capsys)
    assert code == 2 and not out, err
    assert len([line for line in err.splitlines() if line.startswith("Error:")]) == 1
    assert "\x1b" not in err and "report this" not in err


def test_the_probe_is_read_without_a_model(all_files: Path) -> None:
    probe = probe_of_merge(open_checkpoint(all_files / "merged"))
    assert probe.size < 1 << 16 and np.isfinite(probe.effect("adapter"))


def _verified(
    path: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(path), *options])
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err
