"""The doctor against a table of pairs: no false alarm, all that is wrong named, merge's verdict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.files.read import trusting
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.stored_tensors import stored_bytes
from tests.checkpoint.doctor.sound import SOUND
from tests.checkpoint.doctor.tiny import Options, base, lora
from tests.checkpoint.doctor.wrong import WRONG


def given(folder: Path) -> tuple[Path, Path]:
    (adapter,) = (p for p in folder.iterdir() if p.name.startswith("adapter"))
    (base,) = (p for p in folder.iterdir() if p.name.startswith("base"))
    return base, adapter


def merged(base: Path, adapter: Path, out: Path, options: Options) -> LoraFxError | None:
    """Why merge refuses the pair; None where it has written it."""
    target = out if base.is_dir() else out.with_suffix(".safetensors")
    try:
        lora_fx.merge(base, adapter, target, **options)
    except LoraFxError as error:
        assert not target.exists()
        return error
    return None


@pytest.mark.parametrize("name", SOUND)
def test_sound_pairs(name: str, tmp_path: Path) -> None:
    """No error, no warning; and what merge then writes has changed."""
    options = SOUND[name](tmp_path) or {}
    base, adapter = given(tmp_path)
    report = lora_fx.doctor(base, adapter, **options)
    found = report.details["findings"]
    assert [f for f in found if f["severity"] != "note"] == []
    assert report and report.details["merge"] == ""
    notes = [*report.warnings, *(f["found"] for f in found)]
    assert not any("no tensor" in n and "'score'" in n for n in notes), notes
    assert merged(base, adapter, tmp_path / "out", options) is None
    out = tmp_path / "out" if base.is_dir() else tmp_path / "out.safetensors"
    assert changed(base, out)


def changed(base: Path, out: Path) -> list[str]:
    """Names of tensors of the output that the base has not, or has with other bytes."""
    with trusting():
        old, new = (open_checkpoint(path).tensors for path in (base, out))
    return [n for n, t in new.items() if n not in old or _bytes(t) != _bytes(old[n])]


def _bytes(info: TensorInfo) -> bytes:
    return stored_bytes(info, 0, info.stop - info.start).tobytes()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pairs(name: str, tmp_path: Path) -> None:
    """An error that names it, of a pair that merge refuses; one mistake is told once."""
    build, texts = WRONG[name]
    options = build(tmp_path) or {}
    base, adapter = given(tmp_path)
    refused = merged(base, adapter, tmp_path / "out", options)
    assert refused is not None
    try:
        report = lora_fx.doctor(base, adapter, **options)
    except LoraFxError as error:  # a file that cannot be read at all
        assert all(t in f"{error.message} {error.hint}" for t in texts), error
        assert (error.message, error.hint) == (refused.message, refused.hint)
        return
    errors = [f for f in report.details["findings"] if f["severity"] == "error"]
    assert not report and len(errors) == (2 if name == "two mistakes" else 1), errors
    assert all(t in str(errors[-1]) for t in texts), (errors, refused)
    if name == "two mistakes":
        assert "--dequantise" in errors[0]["hint"]
    sampled = report.details["merge"] == "" or "requantise" in options
    assert sampled or report.details["merge"] == refused.message


OTHER: tuple[Options, ...] = (
    {},
    {"allow_unused": True, "allow_missing": True},
    {"untie": True, "add": True, "again": True, "any_base": True},
    {"dequantise": True},
    {"requantise": True},
    {"dtype": "float16"},
    {"trust": True, "allow_unused": True, "add": True, "allow_missing": True},
)
ROWS = {f"sound: {name}": build for name, build in SOUND.items()}
ROWS |= {f"wrong: {name}": build for name, (build, _) in WRONG.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_the_verdict_is_merges(name: str, tmp_path: Path) -> None:
    """Under the options of the row and others: healthy if and only if merge writes the pair."""
    own = ROWS[name](tmp_path) or {}
    base, adapter = given(tmp_path)
    for i, more in enumerate(OTHER):
        options = {**own, **more}
        if options.get("dequantise") and options.get("requantise"):
            continue
        refused = merged(base, adapter, tmp_path / f"out{i}", options)
        try:
            healthy = bool(lora_fx.doctor(base, adapter, **options))
        except LoraFxError:
            healthy = False
        assert healthy == (refused is None), (options, refused)


def test_the_range_is_that_of_the_dtype_that_is_written(tmp_path: Path) -> None:
    """A merge with --dtype float32 holds what float16 cannot: a warning of its size remains."""
    base(tmp_path, dtype=np.float16)
    lora(tmp_path, "llama", "q_proj", lora_alpha=1e7)
    pair = tmp_path / "base", tmp_path / "adapter"
    assert not lora_fx.doctor(*pair)
    assert lora_fx.doctor(*pair, dtype="float32")
    assert lora_fx.merge(*pair, tmp_path / "out", dtype="float32")
