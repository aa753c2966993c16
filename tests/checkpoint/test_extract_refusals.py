"""extract: what does not fit is refused by name, or left out by name where that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_fx
from lora_fx.checkpoint.extract import extraction
from lora_fx.checkpoint.extract_options import ExtractOptions
from lora_fx.checkpoint.extract_scope import scope_of
from lora_fx.errors import LoraFxError

Arrays = dict[str, np.ndarray[Any, Any]]


def model(seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (1000, 6),
        "model.layers.0.self_attn.q_proj.weight": (8, 6),
        "model.layers.0.mlp.up_proj.weight": (12, 6),
        "model.norm.weight": (6,),
        "lm_head.weight": (1000, 6),
    }
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def written(folder: Path, base: Arrays, tuned: Arrays) -> tuple[Path, Path]:
    for name, arrays in (("base", base), ("tuned", tuned)):
        save_file(arrays, folder / f"{name}.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


def refused(files: tuple[Path, Path], *texts: str, **options: Any) -> LoraFxError:
    with pytest.raises(LoraFxError) as caught:
        extraction(*files, ExtractOptions(**options))
    error = caught.value
    assert "\n" not in error.message and error.exit_code == 2
    for text in texts:
        assert text in str(error), str(error)
    return error


def test_a_grown_vocabulary(tmp_path: Path) -> None:
    tuned = model(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = np.concatenate([tuned[name], tuned[name][:4]])
    files = written(tmp_path, model(), tuned)
    refused(
        files,
        "model.embed_tokens.weight [1000, 6] and [1004, 6]",
        "lm_head.weight",
        "allow_missing=True",
        "vocabulary",
    )
    result = extraction(*files, ExtractOptions(allow_missing=True))
    assert len(result.rows) == 2
    assert "lm_head.weight [1000, 6] and [1004, 6]" in result.adapter.metadata["notes"][0]
    result = extraction(*files, ExtractOptions(exclude="embed_tokens,lm_head"))
    assert len(result.rows) == 2 and result.skipped == 2
    result = extraction(*files, ExtractOptions(include="q_proj"))
    assert [r.key for r in result.rows] == ["model.layers.0.self_attn.q_proj.weight"]
    assert result.left_out == ("model.norm.weight",) and result.skipped == 3


def test_missing_and_extra_tensors(tmp_path: Path) -> None:
    tuned = model(1)
    tuned["score.weight"] = tuned.pop("lm_head.weight")
    files = written(tmp_path, model(), tuned)
    refused(files, "1 only in", "base.safetensors: lm_head.weight", "score.weight")
    result = extraction(*files, ExtractOptions(allow_missing=True))
    assert "score.weight" in " ".join(result.adapter.metadata["notes"])
    assert len(extraction(*files, ExtractOptions(exclude=["lm_head", "score"])).rows) == 3


def test_names_with_a_prefix(tmp_path: Path) -> None:
    tuned = {f"base.{k}": v for k, v in model(1).items()}
    refused(written(tmp_path, model(), tuned), "lack the prefix"[4:], "'base.'")
    files = written(tmp_path, tuned, model())
    assert "lack the prefix 'base.'" in refused(files).hint


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_values_that_are_not_finite(tmp_path: Path, value: float, side: str) -> None:
    base, tuned = model(), model(1)
    (base if side == "base" else tuned)["model.layers.0.mlp.up_proj.weight"][3, 2] = value
    files = written(tmp_path, base, tuned)
    refused(files, f"{side}.safetensors", "up_proj", "1 NaN or infinite")
    assert len(extraction(*files, ExtractOptions(exclude="up_proj")).rows) == 3


def test_nan_that_both_sides_share_is_no_change(tmp_path: Path) -> None:
    base, tuned = model(), model(1)
    for side in (base, tuned):
        side["lm_head.weight"] = np.full((1000, 6), np.nan, np.float32)
    assert (
        "lm_head.weight" in extraction(*written(tmp_path, base, tuned), ExtractOptions()).unchanged
    )


def test_a_difference_that_overflows(tmp_path: Path) -> None:
    base, tuned = model(), model(1)
    base["lm_head.weight"][0, 0], tuned["lm_head.weight"][0, 0] = -3e38, 3e38
    with np.errstate(over="ignore"):
        refused(written(tmp_path, base, tuned), "lm_head.weight", "overflows")


def test_the_hint_leaves_out_every_counter_of_a_batch_norm(tmp_path: Path) -> None:
    base, tuned = model(), model(1)
    for layer in ("one", "two"):
        name = f"{layer}.bn.num_batches_tracked"
        base[name], tuned[name] = np.array(0), np.array(9)
    files = written(tmp_path, base, tuned)
    refused(files, "num_batches_tracked", "pass exclude num_batches_tracked")
    assert len(extraction(*files, ExtractOptions(exclude="num_batches_tracked")).rows) == 4


@pytest.mark.parametrize("dtype", ["int8", "int64", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(4, 6), (6,), ()])
def test_integers_and_quantised_values(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    base, tuned = model(), model(1)
    base["steps.q"] = tuned["steps.q"] = np.ones(shape, np.float32).astype(kind)
    files = written(tmp_path, base, tuned)
    assert "steps.q" in extraction(*files, ExtractOptions()).unchanged
    tuned["steps.q"] = np.full(shape, 2, np.float32).astype(kind)
    files = written(tmp_path, base, tuned)
    refused(files, "steps.q", dtype, "exclude='steps.q'")
    refused(files, "steps.q", also_full=True)
    assert len(extraction(*files, ExtractOptions(exclude="steps.q")).rows) == 4
    base["steps.q"] = np.ones(shape, np.float32)
    refused(written(tmp_path, base, tuned), "steps.q", dtype)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 2.5}, "rank 2.5"),
        ({"energy": 1.0}, "energy 1.0"),
        ({"energy": 0.0}, "energy 0.0"),
        ({"rank": 2, "energy": 0.5}, "exclude each other"),
        ({"max_rank": 3}, "max_rank applies only"),
        ({"include": "q_prj"}, "matches no target"),
        ({"exclude": "q_prj"}, "matches no target"),
        ({"include": "q_proj.weight[0:4]"}, "part of a tensor"),
    ],
)
def test_options(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    refused(written(tmp_path, model(), model(1)), text, **options)


def test_files(tmp_path: Path) -> None:
    files = written(tmp_path, model(), model(1))
    refused((files[0], tmp_path / "none.safetensors"), "none.safetensors", "cannot be read")
    refused((tmp_path / "none", files[1]), "none")
    folder = tmp_path / "pickles"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    refused((files[0], folder), "pytorch_model.bin", "pickles")


def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = written(tmp_path, model(), model(1))

    def cut(*args: Any) -> Any:
        files[1].write_bytes(files[1].read_bytes()[:4000])
        return scope_of(*args)

    monkeypatch.setattr("lora_fx.checkpoint.extract.scope_of", cut)
    refused(files, "tuned.safetensors", "ends inside a tensor")


def sharded(folder: Path, arrays: Arrays, config: dict[str, Any]) -> Path:
    folder.mkdir()
    names = list(arrays)
    home: dict[str, str] = {}
    for i, part in enumerate((names[:2], names[2:])):
        save_file({n: arrays[n] for n in part}, folder / f"m-{i}.safetensors")
        home |= dict.fromkeys(part, f"m-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_folders_with_shards_and_a_tied_table(tmp_path: Path) -> None:
    base, tuned = model(), model(1)
    base.pop("lm_head.weight")
    tuned.pop("lm_head.weight")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    one = sharded(tmp_path / "one", base, config)
    two = sharded(tmp_path / "two", dict(reversed(tuned.items())), config)
    adapter = lora_fx.extract(one, two, rank=6)
    low = adapter.lowrank["model.embed_tokens.weight"]
    assert low.origin.tied and low.a.shape == (6, 6) and low.b.shape == (1000, 6)
    assert any("also the output head" in n for n in adapter.metadata["notes"])
    notes = lora_fx.save_adapter(adapter, tmp_path / "x")
    assert any("share the tensor" in n for n in notes)
    again = lora_fx.load_adapter(tmp_path / "x")
    for key, delta in again.deltas().items():
        np.testing.assert_allclose(delta, tuned[key].astype(float) - base[key], atol=1e-5)
    untied = sharded(tmp_path / "three", base, {**config, "tie_word_embeddings": False})
    low = lora_fx.extract(untied, two).lowrank["model.embed_tokens.weight"]
    assert not low.origin.tied and low.origin.op == "embedding"


@pytest.mark.parametrize(("kind", "turned"), [("gpt_oss", True), ("qwen3_moe", False)])
def test_the_orientation_of_experts(tmp_path: Path, kind: str, turned: bool) -> None:
    key = "model.layers.0.mlp.experts.down_proj"
    rng = np.random.default_rng(0)
    base, tuned = ({key: rng.standard_normal((3, 8, 5)).astype(np.float32)} for _ in range(2))
    for name, arrays in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(arrays, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    low = lora_fx.extract(tmp_path / "base", tmp_path / "tuned", rank=5).lowrank[key]
    assert low.a.shape == (3, 5, 8 if turned else 5) and low.b.shape == (3, 5 if turned else 8, 5)
    delta = lora_fx.Adapter({key: low}).deltas()[key]
    np.testing.assert_allclose(delta, tuned[key].astype(float) - base[key], atol=1e-5)
