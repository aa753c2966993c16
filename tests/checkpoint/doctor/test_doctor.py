"""doctor names what is wrong, with the key, and is silent about sound pairs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import lora_fx
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import read_tensors
from tests.checkpoint.doctor import pairs
from tests.checkpoint.doctor.pairs import edited, save_adapter, save_base

LEAD = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
A, B = f"{LEAD}{Q}.lora_A.weight", f"{LEAD}{Q}.lora_B.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pair `base` and `adapter`: a Llama and an adapter of its linears."""
    home = tmp_path_factory.mktemp("pairs")
    model = pairs.llama()
    save_base(model, home / "base")
    save_adapter(model, home / "adapter", target_modules=pairs.LINEAR)
    return home


# --- what is wrong: (case, change of the file and config, check, key that it names) ---------------


def rename(old: str, new: str) -> Callable[[Any, Any], None]:
    def change(tensors: Any, config: Any) -> None:
        for name in [n for n in tensors if old in n]:
            tensors[name.replace(old, new, 1)] = tensors.pop(name)

    return change


def no_layer(tensors: Any, config: Any) -> None:
    for name in [n for n in tensors if f"{Q}." in n]:
        del tensors[name]


def unknown_layer(tensors: Any, config: Any) -> None:
    for half in ("A", "B"):
        tensors[f"{LEAD}model.layers.7.self_attn.q_proj.lora_{half}.weight"] = tensors[
            f"{LEAD}{Q}.lora_{half}.weight"
        ]


def nan(tensors: Any, config: Any) -> None:
    tensors[A] = np.where(np.arange(16) == 3, np.nan, tensors[A]).astype(np.float32)


def int8(tensors: Any, config: Any) -> None:
    tensors[B] = (tensors[B] * 1e4).astype(np.int8)


def empty(tensors: Any, config: Any) -> None:
    tensors[B] = tensors[B][:0]


def magnitudes(tensors: Any, config: Any) -> None:
    tensors[f"{LEAD}{Q}.lora_magnitude_vector"] = np.ones(16, np.float32)


def grown(tensors: Any, config: Any) -> None:
    rows = np.zeros((pairs.VOCABULARY + 2, 16), np.float32)
    tensors[f"{LEAD}model.embed_tokens.weight"] = rows


def zeroed(tensors: Any, config: Any) -> None:
    tensors[B] = np.zeros_like(tensors[B])


def half(tensors: Any, config: Any) -> None:
    del tensors[B]


def wide(tensors: Any, config: Any) -> None:
    tensors[A] = np.ones((4, 20), np.float32)


def huge(tensors: Any, config: Any) -> None:
    tensors[B] = tensors[B] * 1000


def put(**fields: Any) -> Callable[[Any, Any], None]:
    return lambda tensors, config: config.update(fields)


def without(field: str) -> Callable[[Any, Any], None]:
    return lambda tensors, config: config.pop(field)


WRONG = {
    "missing key": (no_layer, "missing keys", f"{Q}.weight", 1),
    "unused key": (unknown_layer, "unused keys", "model.layers.7.self_attn.q_proj.weight", 1),
    "renamed prefix": (rename("model.layers", "decoder.blocks"), "prefix", "decoder.blocks.0", 1),
    "inner prefix": (rename("model.model.", "model."), "prefix", "layers.0", 0),
    "outer prefix": (rename("base_model", "module.base_model"), "names", f"module.{A}", None),
    "no prefix": (rename(LEAD, ""), "names", f"{Q}.lora_A.weight", None),
    "NaN": (nan, "finite numbers", A, 1),
    "int8 tensors": (int8, "dtypes", B, 1),
    "size 0": (empty, "empty tensors", B, 1),
    "alpha missing": (without("lora_alpha"), "alpha", "lora_alpha", 1),
    "rank_pattern typo": (put(rank_pattern={"q_prj": 4}), "patterns", "q_prj", 0),
    "alpha_pattern typo": (put(alpha_pattern={"q_prj": 4}), "patterns", "q_prj", 0),
    "DoRA flag off": (magnitudes, "dora", f"{Q}.weight", 1),
    "DoRA flag on": (put(use_dora=True), "dora", f"{Q}.weight", 1),
    "PiSSA unconverted": (put(init_lora_weights="pissa"), "initialisation", f"{Q}.weight", None),
    "CorDA unconverted": (put(init_lora_weights="corda"), "initialisation", f"{Q}.weight", 1),
    "vocabulary grown": (grown, "vocabulary", "model.embed_tokens.weight", 1),
    "target left out": (
        put(target_modules=[n for n in pairs.LINEAR if n != "q_proj"]),
        "target_modules",
        f"{Q}.weight",
        1,
    ),
    "rank differs": (put(r=8), "ranks", f"{Q}.weight", 1),
    "half a pair": (half, "pairs", f"{Q}.weight", 1),
    "shape": (wide, "shapes", f"{Q}.weight", 1),
    "untrained": (zeroed, "training", f"{Q}.weight", 0),
    "too large": (huge, "effect", f"{Q}.weight", 0),
    "aLoRA": (put(alora_invocation_tokens=[0]), "config", "alora_invocation_tokens", 1),
}


def run(base: Path, adapter: Path) -> tuple[int, dict[str, Any]]:
    out = StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main(["doctor", str(base), str(adapter), "--json"])
    return int(stop.value.code or 0), json.loads(out.getvalue())


def alarms(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [f for f in found["findings"] if f["severity"] != "note"]


@pytest.mark.parametrize("case", WRONG)
def test_names_what_is_wrong(case: str, home: Path, tmp_path: Path) -> None:
    change, check, key, exit_code = WRONG[case]
    bad = edited(home / "adapter", tmp_path / "bad", change)
    code, found = run(home / "base", bad)
    mine = [f for f in alarms(found) if f["check"] == check]
    assert mine and any(key in k for f in mine for k in f["keys"]), found["findings"]
    assert all(f["found"] and f["hint"] for f in mine)
    assert exit_code in (None, code) and found["ok"] == (code == 0)
    other = {f["check"] for f in alarms(found)} - {check}
    assert not other, f"one mistake, one alarm: {other}"


def test_tells_every_mistake_at_once(home: Path, tmp_path: Path) -> None:
    def change(tensors: Any, config: Any) -> None:
        for one in (nan, unknown_layer, without("lora_alpha"), put(rank_pattern={"x": 1})):
            one(tensors, config)

    found = lora_fx.doctor(home / "base", edited(home / "adapter", tmp_path / "bad", change))
    checks = {f["check"] for f in alarms(found.details)}
    assert checks == {"finite numbers", "unused keys", "alpha", "patterns"}
    assert not found


def test_a_tied_head(tmp_path: Path) -> None:
    model = pairs.llama(tied=True)
    base = save_base(model, tmp_path / "base")
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    _, found = run(base, adapter)
    (alarm,) = alarms(found)
    assert alarm["check"] == "tied weights" and alarm["keys"] == ["lm_head.weight"]
    assert "--untie" in alarm["hint"]


def test_a_quantised_and_an_empty_base(home: Path, tmp_path: Path) -> None:
    def packed(tensors: Any) -> None:
        tensors[f"{Q}.weight"] = np.zeros((128, 1), np.uint8)
        tensors[f"{Q}.weight.absmax"] = np.zeros(4, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((0,), np.float32)

    base = pairs.copied(home / "base", tmp_path / "base", packed)
    _, found = run(base, home / "adapter")
    named = {f["check"]: f["keys"] for f in alarms(found)}
    assert named["quantised base"] == [f"{Q}.weight"]
    assert named["empty tensors"] == ["model.layers.1.mlp.up_proj.weight"]


def test_an_adapter_that_is_merged_already(home: Path, tmp_path: Path) -> None:
    lora_fx.merge(home / "base", home / "adapter", tmp_path / "merged")
    _, found = run(tmp_path / "merged", home / "adapter")
    assert [f["check"] for f in alarms(found)] == ["merged before"]


# --- what is right -------------------------------------------------------------------------------


def test_the_numbers_of_every_target(home: Path) -> None:
    rows = {r["key"]: r for r in run(home / "base", home / "adapter")[1]["updates"]}
    tensors = read_tensors(home / "adapter" / pairs.WEIGHTS)[0]
    weight = read_tensors(home / "base" / "model.safetensors")[0][f"{Q}.weight"]
    row = rows[f"{Q}.weight"]
    assert (row["rank"], row["scale"]) == (4, 1.5)
    delta = 1.5 * tensors[B].astype(np.float64) @ tensors[A].astype(np.float64)
    assert row["ratio"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(weight), rel=0.05)


def test_a_bf16_adapter_and_our_own_file(home: Path, tmp_path: Path) -> None:
    def narrow(tensors: Any, config: Any) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    bf16 = edited(home / "adapter", tmp_path / "bf16", narrow)
    lora_fx.save_adapter(lora_fx.load_adapter(bf16), tmp_path / "own.safetensors")
    for path in (bf16, tmp_path / "own.safetensors"):
        assert not alarms(run(home / "base", path)[1])


def test_files_that_cannot_be_read(home: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(LoraFxError):
        lora_fx.doctor(home / "base", tmp_path)
    with pytest.raises(LoraFxError):
        lora_fx.doctor(tmp_path / "nothing", home / "adapter")
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(home / "base"), str(tmp_path)])
    assert stop.value.code == 2


def test_no_torch(home: Path) -> None:
    code = (
        "import sys, lora_fx\n"
        f"assert lora_fx.doctor({str(home / 'base')!r}, {str(home / 'adapter')!r})\n"
        "print(sorted({'torch', 'onnx', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
