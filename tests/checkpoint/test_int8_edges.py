"""int8 bases at their edges: what is refused, doctor, and the libraries that write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import Layout
from tests.checkpoint.int8_bases import BNB, CT, SCALES, SCHEMES, Q, base, config, quantised, wide
from tests.checkpoint.made import Array, adapter, checkpoint, factors, read

RNG = np.random.default_rng(8)


def one(path: Path, size: float = 0.3, **more: Any) -> tuple[Path, Array]:
    """An adapter of q_proj and its s·BA in fp64."""
    a, b = factors(RNG, 40, 24, 3, size)
    return adapter(path, {Q: (a, b)}, **more), 2.0 * b.astype(np.float64) @ a.astype(np.float64)


def refused(base_: Path, adapter_: Any, out: Path, match: str, **more: Any) -> None:
    with pytest.raises(LoraFxError, match=match):
        lora_fx.merge(base_, adapter_, out, **more)
    assert not out.exists()


def test_updates_that_mean_the_float_original(tmp_path: Path) -> None:
    base(tmp_path / "base", BNB)
    one(tmp_path / "pissa", init_lora_weights="pissa")
    refused(tmp_path / "base", tmp_path / "pissa", tmp_path / "out", "is int8: .*pissa")
    whole = Adapter({f"{Q}.weight": Full(np.ones((40, 24), np.float32))})
    refused(tmp_path / "base", whole, tmp_path / "out", "q_proj.*a whole float tensor cannot")


def test_scales_that_are_changed_twice(tmp_path: Path) -> None:
    base(tmp_path / "base", BNB)
    a, b = factors(RNG, 40, 24, 3)
    both = {f"{Q}.weight": LowRank(a, b, 6.0), f"{Q}.SCB": Full(np.ones(40, np.float32))}
    refused(tmp_path / "base", Adapter(both), tmp_path / "out", "SCB' changes the scales")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_scale_that_is_no_number(bad: float, tmp_path: Path) -> None:
    scales = np.ones(40, np.float32)
    scales[17] = bad
    base(tmp_path / "base", BNB, SCB=scales)
    one(tmp_path / "adapter")
    refused(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "the base has .* at row 17")


def test_a_scale_that_its_dtype_cannot_hold(tmp_path: Path) -> None:
    base(tmp_path / "base", CT, dtype=np.float16)
    one(tmp_path / "adapter", 1e8)
    refused(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out",
        r"weight_scale': float16 cannot hold the scale of row \d+",
    )  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_as_small_as_their_scales_can_be(scheme: str, tmp_path: Path) -> None:
    """Scales below the normal numbers round, and none becomes zero beside a weight that is not."""
    dtype = np.float16
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    scales = np.full(40, 3 * tiny, dtype)
    rows = {SCALES[scheme]: scales if scheme == BNB else scales[:, None]}
    codes = np.zeros((40, 24), np.int8)
    codes[:, 0] = 100
    old = base(tmp_path / "small", scheme, dtype=dtype, weight=codes, **rows)
    a, b = np.eye(1, 24, dtype=np.float32), np.zeros((40, 1), np.float32)
    # What is left of the rows needs scales from 2.7 times the smallest to a 20th of it.
    left = np.geomspace(0.9, 1 / 60, 40)
    b[:, 0] = (left - 1) * wide(old, Q, scheme)[:, 0]
    adapter(tmp_path / "adapter", {Q: (a, b)}, lora_alpha=1)
    lora_fx.merge(tmp_path / "small", tmp_path / "adapter", tmp_path / "out")
    new = read(tmp_path / "out")
    scales = new[f"{Q}.{SCALES[scheme]}"]
    assert (scales > 0).all() and scales.min() == tiny
    assert lora_fx.verify(
        tmp_path / "out", tmp_path / "small", adapter=tmp_path / "adapter", rows=None
    )


def test_a_square_layer_of_gpt2_is_out_in(tmp_path: Path) -> None:
    """GPT-2's own weights are [in, out]; quantised, its layers are Linear's."""
    name, w = "h.0.attn.c_proj", RNG.standard_normal((24, 24)) * 0.05
    old = {f"{name}.{n}": v for n, v in quantised(w, BNB).items()}
    checkpoint(tmp_path / "base", old, config=config(BNB) | {"model_type": "gpt2"})
    a, b = factors(RNG, 24, 24, 3)
    adapter(tmp_path / "adapter", {name: (a, b)})
    lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    want = wide(old, name, BNB) + 2.0 * b.astype(np.float64) @ a.astype(np.float64)
    step = np.abs(want).max(axis=1, keepdims=True) / 127
    assert (np.abs(wide(read(tmp_path / "out"), name, BNB) - want) <= 0.5001 * step).all()
    # One that says where it lies, of a float Conv1D, is no update of these codes.
    low = LowRank(a, b, 6.0, Layout((24, 24), (), (1,), (0,), (24, 24)))
    refused(
        tmp_path / "base",
        Adapter({f"{name}.weight": low}),
        tmp_path / "out2",
        r"stored \[in, out\]",
    )


def test_a_part_of_a_weight(tmp_path: Path) -> None:
    """Rows outside of the region stay, byte for byte."""
    old = base(tmp_path / "base", CT)
    a, b = factors(RNG, 9, 10, 2)
    key = f"{Q}.weight[6:15, 4:14]"
    lora_fx.merge(tmp_path / "base", Adapter({key: LowRank(a, b, 3.0)}), tmp_path / "out")
    new, want = read(tmp_path / "out"), wide(old, Q, CT)
    want[6:15, 4:14] += 1.5 * b.astype(np.float64) @ a.astype(np.float64)
    outside = np.r_[0:6, 15:40]
    for name in ("weight", "weight_scale"):
        assert (new[f"{Q}.{name}"][outside] == old[f"{Q}.{name}"][outside]).all()
    step = np.abs(want).max(axis=1, keepdims=True) / 127
    error = np.abs(wide(new, Q, CT) - want)[6:15]
    assert (error <= (0.5 + 127 * 2**-8) * step[6:15]).all() and np.median(error / step[6:15]) < 0.5


def test_doctor_warns_and_estimates(tmp_path: Path) -> None:
    old = base(tmp_path / "base", BNB)
    path, delta = one(tmp_path / "adapter", 0.05)
    found = lora_fx.doctor(tmp_path / "base", path)
    (said,) = [f for f in found.details["findings"] if f["severity"] != "note"]
    assert found and (said["check"], said["severity"]) == ("quantised base", "warning")
    assert said["keys"] == [f"{Q}.weight"] and "bitsandbytes int8" in said["found"]
    assert "how much of each update is kept" in said["hint"]
    (row,) = found.details["updates"]
    truth = np.linalg.norm(delta) / np.linalg.norm(wide(old, Q, BNB))
    assert row["ratio"] == pytest.approx(truth, rel=0.15)


def test_doctor_and_verify_say_why_not(tmp_path: Path) -> None:
    base(tmp_path / "base", BNB, weight_format=np.array(3, np.uint8))
    path, _ = one(tmp_path / "adapter")
    found = lora_fx.doctor(tmp_path / "base", path)
    said = [f for f in found.details["findings"] if f["check"] == "quantised base"]
    assert not found and said[0]["severity"] == "error" and "weight_format is 3" in said[0]["found"]
    with pytest.raises(LoraFxError, match="weight_format is 3"):
        lora_fx.verify(tmp_path / "base", path)
    base(tmp_path / "good", BNB)
    assert lora_fx.verify(tmp_path / "good", path)


# --- what the libraries write and read: run where they are installed --------------------------


def test_bitsandbytes_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tests.checkpoint.doctor.pairs import llama

    llama().save_pretrained(tmp_path / "float")
    how = transformers.BitsAndBytesConfig(load_in_8bit=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(tmp_path / "float", quantization_config=how, device_map="cpu").save_pretrained(
        tmp_path / "base"
    )
    module = "model.layers.0.self_attn.q_proj"
    out, in_ = read(tmp_path / "base")[f"{module}.weight"].shape
    a, b = factors(RNG, out, in_, 3)
    adapter(tmp_path / "adapter", {module: (a, b)})
    lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    old, new = (load(tmp_path / n, device_map="cpu").get_submodule(module) for n in ("base", "out"))
    x = torch.eye(in_)
    delta = (new(x) - old(x)).T.double().numpy()
    want = 2.0 * b.astype(np.float64) @ a.astype(np.float64)
    assert np.linalg.norm(delta - want) < 0.1 * np.linalg.norm(want)


def test_compressed_tensors_reads_it(tmp_path: Path) -> None:
    codec = pytest.importorskip("compressed_tensors.compressors").IntQuantizationCompressor
    library = pytest.importorskip("compressed_tensors.quantization")
    torch = pytest.importorskip("torch")
    args = library.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scheme = library.QuantizationScheme(targets=["Linear"], weights=args)
    w = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * 0.05
    scale = (w.abs().amax(1, keepdim=True) / 127.5).float()
    state = {"weight": w, "weight_scale": scale}
    packed = codec.compress(state, scheme)
    base(tmp_path / "base", CT, **{n: v.numpy() for n, v in packed.items()})
    path, delta = one(tmp_path / "adapter")
    lora_fx.merge(tmp_path / "base", path, tmp_path / "out")

    def opened(folder: str) -> Array:
        tensors = read(tmp_path / folder)
        state = {n: torch.tensor(tensors[f"{Q}.{n}"]) for n in ("weight", "weight_scale")}
        weight = codec.decompress(state, scheme)["weight"]
        return np.asarray(weight.double().numpy())

    want = opened("base") + delta
    step = np.abs(want).max(axis=1, keepdims=True) / 127
    assert (np.abs(opened("out") - want) <= 0.5001 * step).all()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config(CT)
