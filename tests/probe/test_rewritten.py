"""A file made of another one has a probe of its own, or the other's where it still holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

import lora_fx
from lora_fx.compare import Report
from lora_fx.onnx.probe_runs import probe_of
from tests.probe.model import adapters, encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.onnx without a probe, and merged.onnx with one."""
    path = tmp_path_factory.mktemp("sources")
    model, ids = encoder()
    lora_fx.export(model, path / "base.onnx", (ids,), probe="none")
    lora_fx.export(model, path / "merged.onnx", (ids,), adapters=adapters()["de"])
    return path


def properties(path: Path) -> list[str]:
    return [entry.key for entry in onnx.load(path, load_external_data=False).metadata_props]


def verdicts(report: Report) -> dict[str, str]:
    return {row["adapter"] or "base": row["verdict"] for row in report.details["verdicts"]}


REWRITES: dict[str, dict[str, Any]] = {
    "optimised": {"optimise": True},
    "float16": {"precision": "float16"},
    "int8": {"precision": "int8"},
    "cuda": {"target": "cuda"},
}


@pytest.mark.parametrize("rewrite", REWRITES)
def test_a_rewritten_file_keeps_the_probe_that_it_passes(
    folder: Path, tmp_path: Path, rewrite: str
) -> None:
    out = tmp_path / "m.onnx"
    report = lora_fx.export(folder / "merged.onnx", out, **REWRITES[rewrite])
    assert report.details["probe"]["groups"] == {"adapter": 13}
    assert properties(out).count("lora_fx.probe") == 1
    assert verdicts(lora_fx.verify(out)) == {"adapter": "right"}
    before = probe_of(folder / "merged.onnx")
    assert probe_of(out).base is not None and before.base is not None
    assert (probe_of(out).base == before.base).all()


@pytest.mark.parametrize("rewrite", REWRITES)
def test_a_rewritten_file_of_another_program_knows_its_base(
    folder: Path, tmp_path: Path, rewrite: str
) -> None:
    out = tmp_path / "m.onnx"
    lora_fx.export(folder / "base.onnx", out, **REWRITES[rewrite])
    assert verdicts(lora_fx.verify(out)) == {"base": "right"}


def test_a_merged_and_rewritten_file_knows_its_adapter(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    lora_fx.export(folder / "base.onnx", out, adapters=adapters()["de"], optimise=True)
    assert verdicts(lora_fx.verify(out)) == {"adapter": "right"}


def test_a_merge_leaves_no_stale_probe(folder: Path, tmp_path: Path) -> None:
    """A second adapter makes another model of a file, whose probe would call it wrong."""
    out = tmp_path / "m.onnx"
    lora_fx.merge(folder / "merged.onnx", [adapters()["fr"]], out)
    assert "lora_fx.probe" not in properties(out)
    run = tmp_path / "run.onnx"
    lora_fx.merge(folder / "merged.onnx", [adapters()["fr"]], run, run=True)
    assert verdicts(lora_fx.verify(run)) == {"adapter": "right"}


def test_other_modes_of_a_file_have_probes_of_their_own(folder: Path, tmp_path: Path) -> None:
    for mode in ("switch", "load", "batch"):
        out = tmp_path / f"{mode}.onnx"
        lora_fx.export(folder / "merged.onnx", out, adapters=adapters(), mode=mode, force=True)
        assert set(verdicts(lora_fx.verify(out)).values()) == {"right"}
        assert probe_of(out).mode == mode


def test_no_probe_is_written_where_none_is_asked_for(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    for options in ({"optimise": True}, {"adapters": adapters()["de"]}):
        lora_fx.export(folder / "base.onnx", out, probe="none", force=True, **options)
        assert "lora_fx.probe" not in properties(out)


def test_a_short_probe_has_no_groups(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    for source in ("base", "merged"):
        given = adapters()["de"] if source == "base" else None
        lora_fx.export(
            folder / f"{source}.onnx", out, adapters=given, optimise=True, probe="short", force=True
        )
        assert probe_of(out).adapters["adapter"].groups == {}


@pytest.mark.parametrize("mode", ["switch", "batch"])
def test_a_rewritten_file_that_takes_adapters(folder: Path, tmp_path: Path, mode: str) -> None:
    """It keeps what is known of its adapters; a probe that knew none would prove nothing."""
    source = tmp_path / "source.onnx"
    lora_fx.export(folder / "base.onnx", source, adapters=adapters(), mode=mode)
    out = tmp_path / "m.onnx"
    lora_fx.export(source, out, optimise=True)
    assert verdicts(lora_fx.verify(out)) == {"base": "right", "de": "right", "fr": "right"}

    lora_fx.export(
        folder / "base.onnx", source, adapters=adapters(), mode=mode, probe="none", force=True
    )
    report = lora_fx.export(source, out, optimise=True, force=True)
    assert "lora_fx.probe" not in properties(out)
    assert any("takes adapters, and has none that would know them" in w for w in report.warnings)
