"""merge --dequantise: checkpoints of every format become floats with the update in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import lora_fx
from lora_fx.checkpoint.base_fingerprint import FIELD, ends, fingerprint
from lora_fx.checkpoint.merge import merge
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.formats.io import load_adapter
from tests.checkpoint.made import Array, adapter, checkpoint, read
from tests.cli.test_cli import run
from tests.files.quantised.rows import WEIGHTS, golden
from tests.files.quantised.rows import read as read_row

GOLDEN = {row.name: row for row in golden() if row.reader in WEIGHTS}
CT = {"quant_method": "compressed-tensors", "sparsity_config": {}, "transform_config": {}}
SAID: dict[str, Any] = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "compressed-tensors": CT,
    "nvfp4": CT,
    "mxfp4": CT,
    "fp8": {"quant_method": "modelopt"},
    "fp8 blocks": {"quant_method": "fp8"},
    "mxfp4 stack": {"quant_method": "mxfp4"},
}
"""Reader → what config.json says."""


def said_of(name: str) -> dict[str, Any]:
    row = GOLDEN[name]
    said = {**SAID.get(row.reader, {"quant_method": "bitsandbytes"}), **row.options}
    if said.pop("version", None) == 2:
        said["checkpoint_format"] = "gptq_v2"
    return said


def base(path: Path, name: str, shards: int = 3, **config: Any) -> tuple[dict[str, Array], str]:
    """A base whose two layers are one row of the golden ones; and the first layer's weight."""
    row = GOLDEN[name]
    leaf = "" if row.reader == "mxfp4 stack" else "."
    tensors: dict[str, Array] = {"model.norm.weight": np.ones(24, np.float32)}
    for layer in (0, 1):
        module = f"model.layers.{layer}.mlp"
        tensors |= {f"{module}{leaf or '.'}{n}": a for n, a in row.arrays.items()}
    tensors["model.embed.weight"] = np.ones((5, 6), ml_dtypes.bfloat16)
    tensors["model.layers.0.mlp.input_scale"] = np.ones(1, np.float32)
    said = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": said_of(name)}
    checkpoint(path, tensors, shards, config=said | config)
    return tensors, f"model.layers.0.mlp.{'weight' if leaf else 'w'}"


def update(path: Path, shape: tuple[int, ...], key: str, size: float = 0.01) -> tuple[Path, Array]:
    """An adapter of one weight, and its s·BA in the order of the weight."""
    rng = np.random.default_rng(7)
    *stack, rows, columns = shape
    if stack:  # PEFT's target_parameters: one pair for all experts, [out, in] by [in, out]
        a = rng.standard_normal((4 * stack[0], rows)).astype(np.float32)
        b = (rng.standard_normal((columns, 4 * stack[0])) * size).astype(np.float32)
        pairs = zip(a.reshape(-1, 4, rows), b.reshape(columns, 4, -1).T, strict=True)
        delta = np.stack([(p.astype(float).T @ q.astype(float)) * 2 for p, q in pairs])
        name = key.rpartition(".")[0]
        made = adapter(path, {name: (a, b)}, r=4, lora_alpha=8, target_parameters=["mlp.w"])
        return made, delta
    a = rng.standard_normal((4, columns)).astype(np.float32)
    b = (rng.standard_normal((rows, 4)) * size).astype(np.float32)
    made = adapter(path, {key.removesuffix(".weight"): (a, b)}, r=4, lora_alpha=8)
    return made, b.astype(np.float64) @ a.astype(np.float64) * 2


def nearly(found: Array, exact: Array, product: Array) -> None:
    """One rounding from the fp64 sum; equal to it wherever fp32 cannot round it otherwise."""
    want = exact.astype(found.dtype)
    slack = 16 * np.finfo(np.float32).eps * (np.abs(exact) + product)
    step = np.abs(np.spacing(want.astype(np.float32))) * (2**16 if found.itemsize == 2 else 0)
    assert (np.abs(found.astype(float) - exact) <= np.maximum(step, slack)).all()
    same = (exact - slack).astype(found.dtype) == (exact + slack).astype(found.dtype)
    assert (same.mean() > 0.5 or found.itemsize == 4) and np.array_equal(found[same], want[same])


PLAIN = [n for n in GOLDEN if GOLDEN[n].reader != "mxfp4 stack"]
FEW = {GOLDEN[n].reader: n for n in PLAIN}
"""One of each format; the others are slow ones."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FEW.values() else pytest.mark.slow) for n in PLAIN]
)
def test_every_format_becomes_floats_with_the_update(name: str, tmp_path: Path) -> None:
    tensors, key = base(tmp_path / "base", name)
    weight = read_row(GOLDEN[name]).dequantise().astype(np.float64)
    path, delta = update(tmp_path / "a", weight.shape, key)
    report = merge(tmp_path / "base", path, tmp_path / "out", dequantise=True)
    found = read(tmp_path / "out")
    other = key.replace("layers.0", "layers.1")
    assert set(found) == {"model.norm.weight", "model.embed.weight", key, other}
    nearly(found[key], weight + delta, np.abs(delta).max() * np.ones_like(delta))
    assert np.array_equal(found[other], weight.astype(ml_dtypes.bfloat16))
    for plain in ("model.norm.weight", "model.embed.weight"):
        assert np.array_equal(found[plain], tensors[plain])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "bfloat16"}
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert any("1 scales of activations" in w for w in report.warnings)
    assert any("--dtype float32 keeps them" in w for w in report.warnings)  # the norm's
    assert lora_fx.verify(tmp_path / "out", tmp_path / "base", adapter=path)


def test_a_stack_of_experts(tmp_path: Path) -> None:
    name = "gpt-oss float32"
    _, key = base(tmp_path / "base", name, model_type="gpt_oss")
    weight = read_row(GOLDEN[name]).dequantise().astype(np.float64)
    path, delta = update(tmp_path / "a", weight.shape, key)
    merge(tmp_path / "base", path, tmp_path / "out", dequantise=True)
    found = read(tmp_path / "out")
    nearly(found[key], weight + delta, np.abs(delta).max() * np.ones_like(delta))
    other = found[key.replace("layers.0", "layers.1")]
    assert np.array_equal(other, weight.astype(ml_dtypes.bfloat16))


def test_dtype_shards_and_index(tmp_path: Path) -> None:
    name = "FP8 128 torch.float32"
    _, key = base(tmp_path / "base", name)
    weight = read_row(GOLDEN[name]).dequantise().astype(np.float64)
    path, delta = update(tmp_path / "a", weight.shape, key)
    out = tmp_path / "out"
    merge(tmp_path / "base", path, out, dequantise=True, dtype="float32", max_shard_size="132 kB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(p.name for p in out.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(set(index["weight_map"].values())) == names
    opened = open_checkpoint(out)
    sizes = sum(t.stop - t.start for t in opened.tensors.values())
    assert index["metadata"]["total_size"] == sizes
    for file in names:
        header = open_checkpoint(out / file)
        assert sum(t.stop - t.start for t in header.tensors.values()) <= 132_000
    found = read(out)
    nearly(found[key], weight + delta, np.abs(delta).max() * np.ones_like(delta))
    assert lora_fx.verify(out, tmp_path / "base", adapter=path)


def test_a_verify_that_fails(tmp_path: Path) -> None:
    name = "nf4 float32 64 64"
    _, key = base(tmp_path / "base", name)
    path, _ = update(tmp_path / "a", GOLDEN[name].want.shape, key)
    out = tmp_path / "out"
    merge(tmp_path / "base", path, out, dequantise=True)
    (file,) = out.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    info = open_checkpoint(out).tensors[key.replace("layers.0", "layers.1")]
    raw[info.start + 1] ^= 1
    file.write_bytes(bytes(raw))
    assert not lora_fx.verify(out, tmp_path / "base", adapter=path, rows=None)


def test_codes_that_are_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What headers show, and what the numbers show while they are read: file and tensor."""
    name = "FP8 32 torch.float32"
    tensors, key = base(tmp_path / "base", name, 1)
    path, _ = update(tmp_path / "a", GOLDEN[name].want.shape, key)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    scale = f"{key}_scale_inv"
    cases = {
        "nan": (tensors | {scale: np.full((2, 1), np.nan, np.float32)}, "scale that is not finite"),
        "short": (tensors | {scale: np.ones((1, 1), np.float32)}, r"float32 [1, 1]; expected"),
    }
    for case, (changed, words) in cases.items():
        checkpoint(tmp_path / case, changed, config=config)
        for way in ("--dequantise", "--requantise"):
            args = ["merge", str(tmp_path / case), str(path), "-o", str(tmp_path / "out"), way]
            code, _, err = run(capsys, *args)
            line = next(text for text in err.splitlines() if text.startswith("Error"))
            assert code == 2 and str(tmp_path / case) in line and key in line and words in line
            assert not (tmp_path / "out").exists()


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, key = base(tmp_path / "base", "awq 16")
    path, _ = update(tmp_path / "a", GOLDEN["awq 16"].want.shape, key)
    checkpoint(tmp_path / "plain", {"x.weight": np.ones((4, 4), np.float32)}, config={})
    code, _, err = run(
        capsys, "merge", str(tmp_path / "plain"), str(path), "-o", "x", "--dequantise"
    )
    assert code == 2 and "none of its weights is quantised" in err
    rows = [
        (["--max-shard-size", "2GB"], "works only with --dequantise"),
        (["--dequantise", "--max-shard-size", "big"], "'big' is not a size"),
        (["--dequantise", "--max-shard-size", "0"], "shards of 0 bytes"),
        (["--dequantise", "--max-shard-size", "9" * 400], "is not a size"),
    ]
    for more, words in rows:
        args = ["merge", str(tmp_path / "base"), str(path), "-o", str(tmp_path / "x"), *more]
        code, _, err = run(capsys, *args)
        assert code == 2 and words in err, err
    _, key = base(tmp_path / "odd", "awq 16", quantization_config={"quant_method": "hqq"})
    with pytest.raises(LoraFxError, match=r"GPTQ or AWQ.*cannot be read"):
        merge(tmp_path / "odd", path, tmp_path / "x", dequantise=True)
    assert not (tmp_path / "x").exists()


def test_short_names_of_dtypes(tmp_path: Path) -> None:
    _, key = base(tmp_path / "base", "awq 16")
    path, _ = update(tmp_path / "a", GOLDEN["awq 16"].want.shape, key)
    for short, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
        merge(tmp_path / "base", path, tmp_path / short, dequantise=True, dtype=short)
        opened = open_checkpoint(tmp_path / short)
        assert opened.tensors[key].dtype == name and opened.config()["torch_dtype"] == name
    with pytest.raises(LoraFxError, match="unknown dtype 'fp8'"):
        merge(tmp_path / "base", path, tmp_path / "x", dequantise=True, dtype="fp8")


F8 = ml_dtypes.float8_e4m3fn
LEFT: dict[str, dict[str, Array]] = {
    "experts.up": {"up": np.ones((2, 4, 6), F8), "up_scale_inv": np.ones((2, 1, 1), np.float32)},
    "experts.q": {"q": np.ones((8, 1), np.uint8), "q.absmax": np.ones(1, np.float32)},
    "act.scales": {"scales": np.ones(6, np.float16)},
    "weight": {"pre_quant_scale": np.ones(32, np.float32)},
}
"""Tensor that is named → what lies in a checkpoint beside weights that are read."""


@pytest.mark.parametrize("what", LEFT)
def test_codes_that_would_stay(what: str, tmp_path: Path) -> None:
    """What no float model reads as it is: stacks in layouts that are not read, scaled inputs."""
    name = "awq 16" if what == "act.scales" else "FP8 32 torch.float32"
    tensors, key = base(tmp_path / "base", name, 1)
    path, _ = update(tmp_path / "a", GOLDEN[name].want.shape, key)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    module = f"model.layers.0.mlp.{what}".rpartition(".")[0]
    more = {f"{module}.{n}": a for n, a in LEFT[what].items()}
    checkpoint(tmp_path / "odd", tensors | more, config=config)
    with pytest.raises(
        LoraFxError,
        match=rf"model\.layers\.0\.mlp\.{what}.* in a layout that lora-fx does not read",
    ):
        merge(tmp_path / "odd", path, tmp_path / "x", dequantise=True)
    assert not (tmp_path / "x").exists()


def test_scales_of_a_model_are_its_own(tmp_path: Path) -> None:
    """AutoAWQ alone keeps scales of inputs under this name."""
    name = "FP8 32 torch.float32"
    tensors, key = base(tmp_path / "base", name, 1)
    path, _ = update(tmp_path / "a", GOLDEN[name].want.shape, key)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    tensors["model.act.scales"] = np.ones(6, np.float16)
    checkpoint(tmp_path / "own", tensors, config=config)
    merge(tmp_path / "own", path, tmp_path / "out", dequantise=True)
    assert np.array_equal(read(tmp_path / "out")["model.act.scales"], np.ones(6, np.float16))


def test_names_that_transformers_finds(tmp_path: Path) -> None:
    """AutoGPTQ's file names and AutoAWQ's config are of codes."""
    _, key = base(tmp_path / "base", "awq 16", 1)
    path, _ = update(tmp_path / "a", GOLDEN["awq 16"].want.shape, key)
    folder = tmp_path / "base"
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    (folder / "quant_config.json").write_text("{}")
    merge(folder, path, tmp_path / "one", dequantise=True)
    found = {p.name for p in (tmp_path / "one").iterdir()}
    assert "model.safetensors" in found and "quant_config.json" not in found
    merge(folder, path, tmp_path / "many", dequantise=True, max_shard_size=1)
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("way", ["dequantise", "requantise"])
def test_the_base_that_an_adapter_was_trained_on(way: str, tmp_path: Path) -> None:
    """Its sample is that of the numbers that the codes stand for, in the dtype of the model."""
    name = "FP8 32 torch.float32"
    _, key = base(tmp_path / "base", name)
    weight = read_row(GOLDEN[name]).dequantise()
    path, _ = update(tmp_path / "a", weight.shape, key)
    loaded = load_adapter(path)
    for values, same in ((weight, True), (weight + 1, False)):
        narrow = values.astype(ml_dtypes.bfloat16).reshape(-1)
        both = np.concatenate([narrow[part] for part in ends(narrow.size)])
        told = {FIELD: fingerprint([(key, weight.shape, both)])}
        known = replace(loaded, metadata={**loaded.metadata, **told})
        options: dict[str, Any] = {way: True, "force": True}
        if same:
            report = merge(tmp_path / "base", known, tmp_path / "out", **options)
            assert report.details["base_verified"]
        else:
            with pytest.raises(LoraFxError, match="trained on other weights"):
                merge(tmp_path / "base", known, tmp_path / "out", **options)


def test_two_adapters_of_one_weight(tmp_path: Path) -> None:
    name = "NVFP4 float32"
    _, key = base(tmp_path / "base", name)
    weight = read_row(GOLDEN[name]).dequantise().astype(np.float64)
    one, first = update(tmp_path / "a", weight.shape, key)
    two, second = update(tmp_path / "b", weight.shape, key, 0.02)
    merge(tmp_path / "base", [(one, 0.5), two], tmp_path / "out", dequantise=True)
    exact = weight + 0.5 * first + second
    nearly(read(tmp_path / "out")[key], exact, np.full(exact.shape, np.abs(second).max()))
