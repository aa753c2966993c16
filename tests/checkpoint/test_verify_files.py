"""verify on tensor files: what is right passes, and each kind of difference is told by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import lora_fx
from lora_fx.checkpoint.verify import lines
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import read_tensors, write_tensors
from tests.checkpoint.doctor import pairs

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `adapter` of its q and up projections, and `merged`."""
    home = tmp_path_factory.mktemp("verify")
    model = pairs.llama()
    pairs.save_base(model, home / "base")
    pairs.save_adapter(model, home / "adapter", target_modules=["q_proj", "up_proj"])
    pairs.save_adapter(model, home / "other", target_modules=["q_proj", "v_proj"], r=3)
    lora_fx.merge(home / "base", home / "adapter", home / "merged")
    return home


def changed(source: Path, target: Path, name: str, at: int = 5, by: float = 1e-3) -> Path:
    """A copy with one element moved."""

    def change(tensors: Any) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[at] += by

    return pairs.copied(source, target, change)


def run(*argv: str) -> tuple[int, dict[str, Any], str]:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main(["verify", *argv, "--json"])
    return int(stop.value.code or 0), json.loads(out.getvalue()), err.getvalue()


def test_a_merge_is_what_it_says(home: Path) -> None:
    for rows in (4, None):
        report = lora_fx.verify(home / "merged", home / "base", adapter=home / "adapter", rows=rows)
        assert report and report.details["touched"] == 4
        assert report.details["equal"] == report.details["tensors"] == 21
    assert lines(report).startswith("verify: ok: 21 of 21 tensors are as expected; 4 hold")


def test_a_gate_is_said(tmp_path: Path) -> None:
    numbers = np.linspace(-1.0, 2.0, 12, dtype="f4").reshape(3, 4)
    write_tensors(tmp_path / "a.safetensors", {"w": numbers}, {})
    write_tensors(tmp_path / "b.safetensors", {"w": numbers + np.float32(0.1)}, {})
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    text = "verify: ok: 1 of 1 tensors are equal within 0.125 of their largest element (--tol)"
    assert lines(lora_fx.verify(*files, tol=0.125)) == text
    assert lora_fx.verify(*files, tol=0.125).details["tol"] == 0.125
    assert lines(lora_fx.verify(files[0], files[0])) == "verify: ok: 1 of 1 tensors are equal"


def test_what_peft_merges_is_right_too(home: Path, tmp_path: Path) -> None:
    merged = pairs.peft_merge(pairs.llama(), home / "adapter")
    write_tensors(tmp_path / "merged.safetensors", dict(merged), {})
    assert lora_fx.verify(
        tmp_path / "merged.safetensors", home / "base", adapter=home / "adapter", rows=None
    )


def test_an_untouched_tensor_that_moved(home: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    bad = changed(home / "merged", tmp_path / "bad", name)
    code, found, _ = run(str(bad), str(home / "base"), "--adapter", str(home / "adapter"))
    assert code == 1 and [d["key"] for d in found["differences"]] == [name]


def test_a_row_that_a_sample_may_miss_and_all_does_not(home: Path, tmp_path: Path) -> None:
    bad = changed(home / "merged", tmp_path / "bad", UP, at=11 * 16 + 3, by=1e-6)
    argv = (str(bad), str(home / "base"), "--adapter", str(home / "adapter"), "--all")
    code, found, _ = run(*argv)
    assert code == 1 and [d["key"] for d in found["differences"]] == [UP]
    assert found["differences"][0]["ratio"] > 1 and found["rows"] == "all"


def test_nan_in_one_sampled_row_of_several(tmp_path: Path) -> None:
    weight = np.ones((5, 3), np.float32)
    low = lora_fx.LowRank(np.ones((1, 3), np.float32), np.ones((5, 1), np.float32), alpha=1)
    write_tensors(tmp_path / "base.safetensors", {"x.weight": weight}, {})
    bad = weight + 1
    bad[:3] = np.nan  # the last of the four that are looked at is right
    write_tensors(tmp_path / "bad.safetensors", {"x.weight": bad}, {})
    files = tmp_path / "bad.safetensors", tmp_path / "base.safetensors"
    assert not lora_fx.verify(*files, adapter=lora_fx.Adapter({"x.weight": low}))


def test_the_wrong_weight_and_the_wrong_adapter(home: Path) -> None:
    merged, base = home / "merged", home / "base"
    assert not lora_fx.verify(merged, base, adapter=[(home / "adapter", 0.5)])
    report = lora_fx.verify(merged, base, adapter=home / "other")
    assert not report and any("has no record" in w for w in report.warnings)
    assert not lora_fx.verify(base, base, adapter=home / "adapter")


def test_weights_and_dtype_are_those_of_the_output(home: Path, tmp_path: Path) -> None:
    both = [(home / "adapter", 0.7), (home / "other", -1.5)]
    lora_fx.merge(home / "base", both, tmp_path / "m", dtype="bfloat16")
    found = lora_fx.verify(
        tmp_path / "m", home / "base", adapter=[home / "adapter", home / "other"]
    )
    assert found and found.details["touched"] == 6
    assert lora_fx.verify(tmp_path / "m", home / "base", adapter=both, rows=None)
    swapped = [(home / "adapter", -1.5), (home / "other", 0.7)]
    assert not lora_fx.verify(tmp_path / "m", home / "base", adapter=swapped)


def test_a_mix_is_recorded(home: Path, tmp_path: Path) -> None:
    both = [home / "adapter", home / "other"]
    lora_fx.merge(home / "base", both, tmp_path / "m", how="svd", rank=2)
    assert lora_fx.verify(tmp_path / "m", home / "base", adapter=both, rows=None)


def test_an_untied_head(tmp_path: Path) -> None:
    model = pairs.llama(tied=True)
    base = pairs.save_base(model, tmp_path / "base")
    adapter = pairs.save_adapter(model, tmp_path / "a", target_modules=["lm_head", "q_proj"])
    lora_fx.merge(base, adapter, tmp_path / "m", untie=True)
    assert lora_fx.verify(tmp_path / "m", base, adapter=adapter, rows=None)
    report = lora_fx.verify(base, base, adapter=adapter)
    assert "lm_head.weight" in {d["key"] for d in report.details["differences"]}


def test_another_base_is_told(home: Path, tmp_path: Path) -> None:
    other = changed(home / "base", tmp_path / "b", Q)
    report = lora_fx.verify(home / "merged", other, adapter=home / "adapter", rows=None)
    assert not report and any("another base" in w for w in report.warnings)


# --- two files, no adapter -----------------------------------------------------------------------


def test_equal_files_in_other_shards_and_order(home: Path, tmp_path: Path) -> None:
    tensors = read_tensors(home / "base" / FILE)[0]
    names = sorted(tensors, reverse=True)
    home_of = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
    for file in set(home_of.values()):
        write_tensors(tmp_path / file, {n: tensors[n] for n in names if home_of[n] == file}, {})
    index = {"metadata": {}, "weight_map": home_of}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    report = lora_fx.verify(tmp_path, home / "base")
    assert report and report.details["equal"] == 21


def test_differences_worst_first(home: Path, tmp_path: Path) -> None:
    first = changed(home / "base", tmp_path / "one", Q, by=1e-4)
    bad = changed(first, tmp_path / "two", UP, by=1e-2)
    code, found, _ = run(str(bad), str(home / "base"))
    assert code == 1 and [d["key"] for d in found["differences"]] == [UP, Q]
    tensors = read_tensors(home / "base" / FILE)[0]
    row = found["differences"][1]
    moved = abs(np.float64(np.float32(tensors[Q].reshape(-1)[5] + np.float32(1e-4))))
    assert row["elements"] == 1
    assert row["max_abs"] == pytest.approx(abs(moved - abs(tensors[Q].reshape(-1)[5])), rel=1e-3)
    assert row["rel"] == pytest.approx(row["max_abs"] / np.abs(tensors[Q]).max(), rel=1e-6)
    assert run(str(bad), str(home / "base"), "--tol", "1")[0] == 0


def test_names_shapes_and_dtypes(home: Path, tmp_path: Path) -> None:
    def change(tensors: Any) -> None:
        tensors["new.weight"] = tensors.pop(UP)
        tensors[Q] = tensors[Q][:8]
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)

    bad = pairs.copied(home / "base", tmp_path / "bad", change)
    report = lora_fx.verify(bad, home / "base")
    said = {d["key"]: d["what"] for d in report.details["differences"]}
    assert said == {
        UP: "is missing in A",
        "new.weight": "is missing in B",
        Q: "is [8, 16]; expected [16, 16]",
        "model.norm.weight": "is bfloat16; expected float32",
    }
    wide = lora_fx.verify(bad, home / "base", tol=1e-2)
    assert "model.norm.weight" not in {d["key"] for d in wide.details["differences"]}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_on_one_side_is_no_small_difference(tmp_path: Path, value: float) -> None:
    a, b = np.ones(7, np.float32), np.ones(7, np.float32)
    a[2] = value
    write_tensors(tmp_path / "a.safetensors", {"x": a}, {})
    write_tensors(tmp_path / "b.safetensors", {"x": b}, {})
    assert not lora_fx.verify(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tol=1e9)
    assert lora_fx.verify(tmp_path / "a.safetensors", tmp_path / "a.safetensors")


def test_large_integers_are_compared_exactly(tmp_path: Path) -> None:
    for name, value in (("a", 2**62), ("b", 2**62 + 1)):
        write_tensors(tmp_path / f"{name}.safetensors", {"x": np.array([value, 0])}, {})
    report = lora_fx.verify(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not report and report.details["differences"][0]["elements"] == 1


# --- an adapter as B -----------------------------------------------------------------------------


def test_does_an_adapter_fit(home: Path, tmp_path: Path) -> None:
    code, found, _ = run(str(home / "base"), str(home / "adapter"))
    assert code == 0 and (found["fits"], found["whole"]) == (4, 0)
    assert "model.layers.0.self_attn.k_proj.weight" in found["untouched"]
    smaller = pairs.save_base(pairs.llama(layers=1), tmp_path / "smaller")
    assert run(str(smaller), str(home / "adapter"))[0] == 2
    assert lora_fx.verify(home / "base", lora_fx.load_adapter(home / "adapter"))


def test_run_compares_outputs(home: Path) -> None:
    code, found, _ = run(str(home / "base"), str(home / "base"), "--run", "--tol", "0")
    assert code == 0 and len(found["parity"]) == 4 and "tensors" not in found


# --- an adapter that lacks layers of its own config ----------------------------------------------


def test_missing_layers_are_refused(home: Path, tmp_path: Path) -> None:
    def change(tensors: Any, config: Any) -> None:
        for name in [n for n in tensors if "layers.1.mlp.up_proj" in n]:
            del tensors[name]

    part = pairs.edited(home / "adapter", tmp_path / "part", change)
    with pytest.raises(LoraFxError, match=r"model.layers.1.mlp.up_proj.*target_modules 'up_proj'"):
        lora_fx.merge(home / "base", part, tmp_path / "m")
    deeper = pairs.save_base(pairs.llama(layers=3), tmp_path / "deeper")
    with pytest.raises(LoraFxError, match=r"model.layers.2"):
        lora_fx.merge(deeper, home / "adapter", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    report = lora_fx.merge(home / "base", part, tmp_path / "m", allow_missing=True)
    assert any("no update for it" in w for w in report.warnings)
    assert lora_fx.verify(tmp_path / "m", home / "base", adapter=part)


def test_layers_beside_the_model_are_not_missing(home: Path, tmp_path: Path) -> None:
    """A head of pre-training, another tower: names that match, in a place of their own."""

    def change(tensors: Any) -> None:
        tensors["vision.layers.0.self_attn.q_proj.weight"] = np.ones((4, 4), np.float32)
        tensors["cls.predictions.up_proj.weight"] = np.ones((4, 4), np.float32)

    base = pairs.copied(home / "base", tmp_path / "base", change)
    lora_fx.merge(base, home / "adapter", tmp_path / "m")


def test_no_torch(home: Path) -> None:
    merged, base, adapter = (str(home / n) for n in ("merged", "base", "adapter"))
    code = f"""
import sys
from lora_fx.cli import main
for argv in (["verify", {merged!r}, {base!r}, "--adapter", {adapter!r}],
             ["verify", {base!r}, {base!r}], ["verify", {base!r}, {adapter!r}]):
    try:
        main(argv)
    except SystemExit as e:
        assert not e.code, argv
import lora_fx
assert lora_fx.verify({base!r}, {adapter!r})
print(sorted({{'torch', 'onnx', 'onnxruntime', 'transformers'}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("[]"), done.stderr


def test_damaged_metadata_is_an_error(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "merged", tmp_path / "m")
    tensors, header = read_tensors(home / "merged" / FILE)
    header["lora_fx.merge"] = '[{"adapters": [3]}]'
    write_tensors(tmp_path / "m" / FILE, tensors, header)
    with pytest.raises(LoraFxError, match="not a list of merges"):
        lora_fx.verify(tmp_path / "m", home / "base", adapter=home / "adapter")
