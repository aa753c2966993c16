"""merge --requantise: the codes of every format are the nearest to W̃ + Δ, and the loss is told."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import lora_fx
from lora_fx.checkpoint.merge import merge
from lora_fx.checkpoint.provenance import history
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.files.quantised.fp8 import fp8_blocks
from lora_fx.files.quantised.read import quantised_weights
from lora_fx.files.stored_tensors import stored
from lora_fx.ir.quantised import Quantised
from tests.checkpoint.made import Array, adapter, checkpoint
from tests.checkpoint.test_dequantise import FEW, GOLDEN, PLAIN, base, update
from tests.cli.test_cli import run
from tests.files.quantised.rows import parts_of
from tests.files.quantised.rows import read as read_row


def read(folder: Path) -> dict[str, Array]:
    """Every tensor; numpy's own reader of the library knows no floats of 8 bits."""
    return {n: stored(info) for n, info in open_checkpoint(folder).tensors.items()}


STACK = "gpt-oss float32"
OLD_INT8 = ("int8", "int-quantized 8 channel float16 symmetric")
"""Rows that a merge without --requantise takes, too; tested in test_merge_int8."""
CODED = [n for n in (*PLAIN, STACK) if n not in OLD_INT8]


def weights(folder: Path) -> dict[str, Quantised]:
    opened = open_checkpoint(folder)
    return {n: w.read() for n, w in quantised_weights(opened.tensors, opened.config()).items()}


def spread(q: Quantised, what: Array) -> Array:
    """A number a block as a number an element, in fp64, by plain indexing."""
    if q.flat:
        index = np.arange(q.codes.size) // q.block[0]
        return np.asarray(what.astype(float)[index].reshape(q.shape))
    places = [np.arange(n) // b for n, b in zip(q.shape, q.block, strict=True)]
    return np.asarray(what.astype(float)[np.ix_(*places)])


def nearest(q: Quantised, want: Array) -> Array:
    """The smallest distance from each value to one of all that its code could stand for, fp64."""
    if q.order is not None:
        plain = replace(q, order=None)
        return np.asarray(nearest(plain, want[:, q.order])[:, np.argsort(q.order)])
    scale = spread(q, q.scale.reshape(blocks(q))) * q.unit
    zero = 0.0 if q.zero is None else spread(q, q.zero.reshape(blocks(q)))
    kind = q.codes.dtype
    if q.levels is not None:
        every = q.levels.astype(float)
    elif kind.kind in "iu":
        every = np.arange(-128.0, 128) if kind.kind == "i" else np.arange(256.0)
    else:
        every = np.arange(256, dtype=np.uint8).view(kind).astype(float)
    best = np.full(want.shape, np.inf)
    for level in every[np.isfinite(every)]:
        if q.levels is None and kind.kind in "iu" and not q.codes.min() <= level <= q.codes.max():
            continue
        best = np.fmin(best, np.abs((level - zero) * scale - want))
    return best


def blocks(q: Quantised) -> tuple[int, ...]:
    if q.flat:
        return (-(-q.codes.size // q.block[0]),)
    return tuple(-(-n // b) for n, b in zip(q.shape, q.block, strict=True))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in (*FEW.values(), STACK) else pytest.mark.slow) for n in CODED],
)
def test_codes_are_the_nearest(name: str, tmp_path: Path) -> None:
    tensors, key = base(tmp_path / "base", name, model_type="gpt_oss" if name == STACK else "llama")
    old = read_row(GOLDEN[name]).dequantise().astype(np.float64)
    size = 0.15 * float(np.sqrt(np.mean(old**2)))
    path, delta = update(tmp_path / "a", old.shape, key, size)
    out = tmp_path / "out"
    report = merge(tmp_path / "base", path, out, requantise=True, lossy=True)
    found, want = read(out), old + delta
    assert set(found) == set(tensors)
    assert (out / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    (row,) = (r for r in report.details["tensors"] if r["requantised"])
    touched = {r["key"] for r in report.details["tensors"]}
    for n, a in tensors.items():
        same = (
            np.array_equal(found[n].view(np.uint8), np.atleast_1d(a).view(np.uint8))
            if a.ndim
            else True
        )
        assert same or n in touched, n
    made = weights(out)[key]
    values = made.dequantise().astype(np.float64)
    gap, slack = np.abs(values - want), 4e-6 * (np.abs(want).max() + np.abs(delta).max())
    if row["requantised"]["scales"] == "stored" and GOLDEN[name].reader != "bitsandbytes int8":
        assert (gap <= nearest(made, want) + slack).all()
    else:
        assert len(touched) == 2
        assert np.linalg.norm(gap) <= 1.0001 * np.linalg.norm(nearest(made, want)) + slack
    # by definition
    kept = float(np.sum((values - old) * delta) / np.sum(delta**2))
    noise = float(np.linalg.norm(gap) / np.linalg.norm(delta))
    assert row["requantised"]["kept"] == pytest.approx(kept, abs=1e-4)
    assert row["requantised"]["noise"] == pytest.approx(noise, rel=1e-3)
    assert report.details["requantised"] == pytest.approx({"kept": kept, "noise": noise}, rel=1e-3)
    assert lora_fx.verify(out, tmp_path / "base", adapter=path, rows=None)


NEW = ("FP8 32 torch.float32", "MXFP8", "NVFP4 float32", "mxfp4-pack-quantized", STACK)


@pytest.mark.parametrize("name", NEW)
def test_new_scales_are_those_of_the_rule(name: str, tmp_path: Path) -> None:
    """Each block's largest value, of W̃ + Δ, decides; blocks without an update keep their bits."""
    _, key = base(tmp_path / "base", name, model_type="gpt_oss" if name == STACK else "llama")
    q = read_row(GOLDEN[name])
    old = q.dequantise().astype(np.float64)
    path, delta = update(tmp_path / "a", old.shape, key, 0.02)
    merge(tmp_path / "base", path, tmp_path / "out", requantise=True, lossy=True)
    made, want = weights(tmp_path / "out")[key], np.abs(old + delta)
    top = 448.0 if q.levels is None else 6.0
    axes = range(want.ndim)
    for place in np.ndindex(made.scale.shape):
        cut = tuple(slice(place[i] * made.block[i], (place[i] + 1) * made.block[i]) for i in axes)
        largest, scale = float(want[cut].max()), float(made.scale[place])
        if "NV" in name:
            step = float(GOLDEN[name].arrays["weight_scale_2"])
            wanted = min(largest / top, 448 * step)  # the scale of the whole tensor stays
            assert abs(scale - wanted) <= max(wanted / 16, step * 2**-10) * 1.001
        elif "FP8 32" in name:
            assert scale == pytest.approx(largest / top, rel=1e-5)
        else:
            assert scale == 2.0 ** (np.floor(np.log2(largest)) - (8 if top > 9 else 2))


def test_what_no_update_touches_keeps_its_bits(tmp_path: Path) -> None:
    name = "FP8 32 torch.float32"
    _, key = base(tmp_path / "base", name)
    b = np.zeros((64, 4), np.float32)
    b[:3] = 5.0
    a = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    adapter(tmp_path / "a", {key.removesuffix(".weight"): (a, b)}, r=4, lora_alpha=8)
    merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", requantise=True, lossy=True)
    before, after = read(tmp_path / "base")[key], read(tmp_path / "out")[key]
    assert np.array_equal(before[32:], after[32:]) and not np.array_equal(before, after)


def test_a_loss_is_refused_and_a_way_on_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "gptq 4 16 version 2"
    _, key = base(tmp_path / "base", name)
    old = read_row(GOLDEN[name]).dequantise()
    path, _ = update(tmp_path / "a", old.shape, key, 1e-3 * float(np.abs(old).mean()))
    args = ["merge", str(tmp_path / "base"), str(path), "-o", str(tmp_path / "out")]
    code, _, err = run(capsys, *args)
    assert (
        code == 2
        and "--dequantise writes floats (" in err
        and "--requantise keeps the codes" in err
    )
    code, _, err = run(capsys, *args, "--requantise")
    assert code == 1 and "expected 50% or more" in err and "--lossy" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]
    code, text, _ = run(capsys, *args, "--requantise", "--lossy", "--json")
    told = json.loads(text)
    assert code == 0 and told["requantised"]["kept"] < 0.5
    rows = [
        (["--requantise", "--dequantise"], "--dequantise and --requantise exclude each other"),
        (["--lossy"], "--lossy works only with --requantise"),
        (["--requantise", "--dtype", "float32"], "keeps the dtypes"),
    ]
    for more, words in rows:
        code, _, err = run(capsys, *args, "--force", *more)
        assert code == 2 and words in err, err


def test_a_whole_tensor_is_no_code(tmp_path: Path) -> None:
    _, key = base(tmp_path / "base", "awq 16")
    whole = np.ones(GOLDEN["awq 16"].want.shape, np.float32)
    name = f"base_model.model.{key}"
    adapter(tmp_path / "a", {}, tensors={name: whole}, modules_to_save=["mlp"])
    with pytest.raises(LoraFxError, match="quantised again: the adapter replaces the whole tensor"):
        merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", requantise=True)


@pytest.mark.parametrize("part", ["qweight", "weight_scale"])
def test_a_wrong_bit_is_caught(part: str, tmp_path: Path) -> None:
    name = "gptq 4 16 version 2" if part == "qweight" else "MXFP8"
    _, key = base(tmp_path / "base", name)
    old = read_row(GOLDEN[name]).dequantise()
    path, _ = update(tmp_path / "a", old.shape, key, 0.1 * float(np.abs(old).mean()))
    out = tmp_path / "out"
    merge(tmp_path / "base", path, out, requantise=True, lossy=True)
    info = open_checkpoint(out).tensors[key.replace("weight", part)]
    raw = bytearray(info.file.read_bytes())
    raw[info.start] ^= 4
    info.file.write_bytes(bytes(raw))
    assert not lora_fx.verify(out, tmp_path / "base", adapter=path, rows=None)


def test_mixed_checkpoints_come_as_they_are(tmp_path: Path) -> None:
    """An attention in floats beside quantised experts: both are changed, each in its own way."""
    tensors, key = base(tmp_path / "base", "FP8 32 torch.float32", 1)
    rng = np.random.default_rng(1)
    tensors["model.layers.0.self_attn.q_proj.weight"] = rng.standard_normal((8, 8)).astype("f4")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    checkpoint(tmp_path / "mixed", tensors, 3, config=config)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 8), (8, 2)))
    c, d = (rng.standard_normal(s).astype(np.float32) for s in ((2, 32), (64, 2)))
    modules = {"model.layers.0.self_attn.q_proj": (a, b), key.removesuffix(".weight"): (c, d)}
    adapter(tmp_path / "a", modules, r=2, lora_alpha=2)
    for way in ("requantise", "dequantise"):
        merge(tmp_path / "mixed", tmp_path / "a", tmp_path / way, **{way: True})
        found = read(tmp_path / way)
        q = "model.layers.0.self_attn.q_proj.weight"
        assert np.abs(found[q] - (tensors[q] + b @ a)).max() < 1e-5
        assert lora_fx.verify(tmp_path / way, tmp_path / "mixed", adapter=tmp_path / "a")


def test_a_merge_that_is_in_a_later_shard(tmp_path: Path) -> None:
    """A merge's record is in the shards that it changed, which need not be the first."""
    _, key = base(tmp_path / "base", "FP8 32 torch.float32", 3)
    opened = open_checkpoint(tmp_path / "base")
    assert opened.tensors[key].file.name != next(iter(opened.shards))
    b = np.zeros((64, 4), np.float32)
    b[:3] = 5.0
    a = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    adapter(tmp_path / "a", {key.removesuffix(".weight"): (a, b)}, r=4, lora_alpha=8)
    merge(tmp_path / "base", tmp_path / "a", tmp_path / "one", requantise=True, lossy=True)
    for way in ("requantise", "dequantise"):
        with pytest.raises(LoraFxError, match="already merged into it"):
            merge(tmp_path / "one", tmp_path / "a", tmp_path / way, **{way: True})
    merge(tmp_path / "one", tmp_path / "a", tmp_path / "two", dequantise=True, again=True)
    assert len(history(open_checkpoint(tmp_path / "two"))) == 2


def test_a_wrong_bit_of_the_last_expert(tmp_path: Path) -> None:
    _, key = base(tmp_path / "base", STACK, model_type="gpt_oss")
    path, _ = update(tmp_path / "a", read_row(GOLDEN[STACK]).dequantise().shape, key, 0.2)
    merge(tmp_path / "base", path, tmp_path / "out", requantise=True, lossy=True)
    info = open_checkpoint(tmp_path / "out").tensors[f"{key}_blocks"]
    raw = bytearray(info.file.read_bytes())
    raw[info.stop - 3] ^= 4
    info.file.write_bytes(bytes(raw))
    assert not lora_fx.verify(tmp_path / "out", tmp_path / "base", adapter=path, rows=None)


@pytest.mark.parametrize("kind", ["float8_e4m3fnuz", "float8_e5m2"])
def test_the_top_is_that_of_the_dtype(kind: str) -> None:
    """240 and 57344: with scales for 448 half of a block would be cut off."""
    w = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    top = float(ml_dtypes.finfo(kind).max)
    arrays = {"weight": (w / 4 * top).astype(kind), "weight_scale_inv": np.full((1, 1), 4 / top)}
    weight = fp8_blocks(parts_of("m", arrays), {})
    assert weight.anew is not None
    found, _ = weight.anew.recode(weight.read(slice(0, 32)), slice(0, 32), w * 2, w)
    assert np.abs(found.dequantise() - w * 2).max() <= np.abs(w * 2).max() / 7
    assert float(found.scale.max()) == pytest.approx(float(np.abs(w * 2).max()) / top)


def test_scales_that_are_said_to_be_powers_of_two() -> None:
    """DeepSeek-V3.1 has them as floats of 32 bits."""
    w = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    arrays = {
        "weight": w.astype(ml_dtypes.float8_e4m3fn),
        "weight_scale_inv": np.ones((1, 1), "f4"),
    }
    weight = fp8_blocks(parts_of("m", arrays), {"scale_fmt": "ue8m0"})
    assert weight.anew is not None
    found, _ = weight.anew.recode(weight.read(slice(0, 32)), slice(0, 32), w * 3, w)
    assert np.frexp(found.scale)[0].max() == 0.5


def test_a_chain_that_leaves_the_codes(tmp_path: Path) -> None:
    name = "pack-quantized 4 group float32 symmetric"
    _, key = base(tmp_path / "base", name)
    old = read_row(GOLDEN[name]).dequantise()
    one, _ = update(tmp_path / "a", old.shape, key, float(np.abs(old).mean()))
    two, _ = update(tmp_path / "b", old.shape, key, 0.01)
    merge(tmp_path / "base", one, tmp_path / "one", requantise=True, lossy=True)
    merge(tmp_path / "one", two, tmp_path / "two", dequantise=True)
    with pytest.raises(LoraFxError, match="that a later merge turned into floats"):
        lora_fx.verify(tmp_path / "two", tmp_path / "base", adapter=[one, two])
    assert lora_fx.verify(tmp_path / "two", tmp_path / "one", adapter=two)


def test_overflow_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error and no warning of numpy's above it."""
    tensors, key = base(tmp_path / "base", "FP8 32 torch.float32", 1)
    path, _ = update(tmp_path / "a", GOLDEN["FP8 32 torch.float32"].want.shape, key)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    scale = f"{key}_scale_inv"
    huge = tensors | {scale: np.full_like(tensors[scale], 3e38)}
    checkpoint(tmp_path / "huge", huge, config=config)
    args = ["merge", str(tmp_path / "huge"), str(path), "-o", str(tmp_path / "out"), "--dequantise"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, _, err = run(capsys, *args)
    assert code == 2 and "the base has" in err


@pytest.mark.parametrize("name", ["mxfp4-pack-quantized", "NVFP4 float32", "fp4 float32 64 64"])
def test_negative_zeros_keep_their_bits(name: str, tmp_path: Path) -> None:
    """Two codes are zero; a block without an update keeps the one that it has."""
    tensors, key = base(tmp_path / "base", name, 1)
    rows, columns = read_row(GOLDEN[name]).dequantise().shape
    full = f"{key}_packed" if f"{key}_packed" in tensors else key
    codes = {full: np.full_like(tensors[full], 0x80)}  # 0 and -0 in turns
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    checkpoint(tmp_path / "zeros", tensors | codes, config=config)
    b = np.zeros((rows, 4), np.float32)
    b[-1] = 5.0
    a = np.random.default_rng(0).standard_normal((4, columns)).astype(np.float32)
    adapter(tmp_path / "a", {key.removesuffix(".weight"): (a, b)}, r=4, lora_alpha=8)
    merge(tmp_path / "zeros", tmp_path / "a", tmp_path / "out", requantise=True, lossy=True)
    found = read(tmp_path / "out")[full].reshape(-1)
    assert (found[: (rows - 1) * columns // 2] == 0x80).all()
