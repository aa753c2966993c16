"""kohya files: every kind of tensor against ΔW by its formula in fp64, and every refusal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Dense
from lora_fx.errors import LoraFxError
from lora_fx.formats import kohya
from lora_fx.formats.header_json import FIELD, describe, restore
from lora_fx.formats.io import format_of, load_adapter, save_adapter
from lora_fx.formats.naming import ForeignNames
from lora_fx.ir.layout import plain_layout

Array = np.ndarray[Any, Any]
X = "lora_unet_mid_x"


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def stored(tmp_path: Path, tensors: Mapping[str, Array | float]) -> Path:
    """A file of tensors of X by the ends of their names; safetensors writes it."""
    file = tmp_path / "k.safetensors"
    save_file({f"{X}.{k}": np.asarray(v, np.asarray(v).dtype) for k, v in tensors.items()}, file)
    return file


def whole(entry: Any) -> Array:
    """All of s·ΔW, put together from two blocks."""
    out, in_ = entry.shape
    cut = in_ // 2
    halves = (entry.block(0, slice(0, out), c) for c in (slice(0, cut), slice(cut, in_)))
    return np.concatenate(list(halves), 1)


def wide(**parts: Array) -> tuple[Array, ...]:
    return tuple(p.astype(np.float64) for p in parts.values())


def close(got: Array, want: Array) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * float(np.abs(want).max()))


@pytest.mark.parametrize("alpha", [None, 3.0, np.float16(1.5)])
def test_linear(tmp_path: Path, alpha: Any) -> None:
    down, up = normal(0, 4, 6), normal(1, 8, 4)
    parts = {"lora_down.weight": down, "lora_up.weight": up}
    file = stored(tmp_path, parts if alpha is None else {**parts, "alpha": alpha})
    adapter = load_adapter(file)
    assert format_of(file) == "kohya" and adapter.names == ForeignNames("kohya")
    scale = 1.0 if alpha is None else float(alpha) / 4
    close(whole(adapter.entries[f"{X}.weight"]), scale * np.matmul(*wide(up=up, down=down)))


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 1), (2, 3, 2)])
def test_convolution(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    down, up = normal(0, 4, 5, *kernel), normal(1, 8, 4, *(1 for _ in kernel))
    file = stored(tmp_path, {"lora_down.weight": down, "lora_up.weight": up, "alpha": 2.0})
    entry = load_adapter(file).entries[f"{X}.weight"]
    assert isinstance(entry, LowRank)
    assert (entry.origin.op, entry.origin.kernel) == (f"conv{len(kernel)}d", kernel)
    want = 0.5 * np.einsum("or...,rc...->oc...", *wide(up=up, down=down))
    close(whole(entry).reshape(want.shape), want)


def test_tucker(tmp_path: Path) -> None:
    down, mid, up = normal(0, 4, 5, 1, 1), normal(1, 4, 4, 3, 2), normal(2, 8, 4, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": 2.0}
    entry = load_adapter(stored(tmp_path, parts)).entries[f"{X}.weight"]
    assert isinstance(entry, LowRank) and entry.origin.kernel == (3, 2)
    u, m, d = wide(up=up[..., 0, 0], mid=mid, down=down[..., 0, 0])
    want = 0.5 * np.einsum("oi,ijhw,jc->ochw", u, m, d)
    close(whole(entry).reshape(want.shape), want)


def test_dora(tmp_path: Path) -> None:
    for tail in ((), (1, 1)):
        down, up = normal(0, 4, 6, *tail), normal(1, 8, 4, *tail)
        scale = np.abs(normal(2, 8, 1, *tail)) + 1
        parts = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": scale}
        entry = load_adapter(stored(tmp_path, parts)).entries[f"{X}.weight"]
        assert isinstance(entry, LowRank) and entry.magnitude is not None
        np.testing.assert_array_equal(entry.magnitude, scale.reshape(-1), strict=True)


def test_whole_differences(tmp_path: Path) -> None:
    diff, bias = normal(0, 8, 5, 3, 3), normal(1, 8)
    parts = {"diff": diff, "diff_b": bias, "alpha": 2.0}
    adapter = load_adapter(stored(tmp_path, parts))
    for key, value in ((f"{X}.weight", diff), (f"{X}.bias", bias)):
        entry = adapter.entries[key]
        assert isinstance(entry, Dense) and entry.scale == 1
        np.testing.assert_array_equal(entry.value, value)
    assert any("diff has no scale" in n for n in adapter.metadata["notes"])
    norms = load_adapter(stored(tmp_path, {"w_norm": bias, "b_norm": 2 * bias})).entries
    assert [type(e) for e in norms.values()] == [Dense, Dense]
    assert set(norms) == {f"{X}.weight", f"{X}.bias"}


def test_a_bias_beside_an_update(tmp_path: Path) -> None:
    parts = {"lora_down.weight": normal(0, 4, 6), "lora_up.weight": normal(1, 8, 4)}
    entries = load_adapter(stored(tmp_path, {**parts, "diff_b": normal(2, 8)})).entries
    assert [type(e) for e in entries.values()] == [LowRank, Dense]


LORA = {"lora_down.weight": normal(0, 4, 6), "lora_up.weight": normal(1, 8, 4)}
CONV = {"lora_down.weight": normal(0, 4, 6, 3, 3), "lora_up.weight": normal(1, 8, 4, 1, 1)}
NAN = np.full((8, 4), np.nan, np.float32)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"lora_down.weight": normal(0, 4, 6)}, "no lora_up"),
        ({"lora_up.weight": normal(0, 4, 6)}, "no lora_down"),
        ({**LORA, "lora_up.weight": normal(1, 8, 3)}, r"lora_up.weight \[8, 3\]"),
        ({**CONV, "lora_up.weight": normal(1, 8, 4, 3, 3)}, r"\[out, r, 1"),
        ({**CONV, "lora_mid.weight": normal(1, 4, 4, 3, 3)}, r"\[r, in, \*kernel\]"),
        ({**LORA, "alpha": 0.0}, "is 0"),
        ({**LORA, "alpha": float("inf")}, "is inf"),
        ({**LORA, "alpha": normal(0, 2)}, "expected one number"),
        ({**LORA, "dora_scale": normal(0, 1, 6)}, r"\[1, 6\]; expected \[8, 1"),
        ({**LORA, "diff": normal(0, 8, 6)}, "two changes of one tensor"),
        ({"diff_b": normal(0, 8), "b_norm": normal(0, 8)}, "two changes of one tensor"),
        ({**LORA, "lokr_w1": normal(0, 2, 2), "lokr_w2": normal(0, 2, 2)}, "two changes"),
        ({**LORA, "lora_up.weight": NAN}, "NaN"),
        ({**LORA, "lora_up.weight": np.ones((8, 4), np.int32)}, "int32"),
        ({**LORA, "oft_blocks": normal(0, 2, 2, 2)}, "OFT"),
        ({**LORA, "bias_values": normal(0, 2)}, "sparse"),
        ({**LORA, "lora_down.wait": normal(0, 2)}, "not a name that kohya"),
        ({**LORA, "lora_down.weight": normal(0, 0, 6)}, "no size of 0"),
    ],
)
def test_refused(tmp_path: Path, parts: Mapping[str, Any], word: str) -> None:
    file = stored(tmp_path, parts)
    with pytest.raises(LoraFxError, match=word) as caught:
        kohya.read(file)
    assert str(file) in caught.value.message and X in caught.value.message
    assert caught.value.hint and "\n" not in caught.value.message


def test_an_alpha_alone(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="not an adapter in a known format") as caught:
        load_adapter(stored(tmp_path, {"alpha": 1.0}))
    assert "alpha" in caught.value.message and "kohya" in caught.value.hint


# --- writing -------------------------------------------------------------------------------------


def low(rank: int = 2, out: int = 8, in_: int = 6, **fields: Any) -> LowRank:
    return LowRank(normal(0, rank, in_), normal(1, out, rank), **{"alpha": 3.0, **fields})


def test_names_that_other_readers_know(tmp_path: Path) -> None:
    conv = low(in_=27, layout=plain_layout((8, 3, 3, 3)), origin=Origin(op="conv2d"))
    rs = low(rank=4, variant="rslora", alpha=3.0)
    entries = {
        "unet.mid_block.a_b.weight": conv,
        "text_encoder.text_model.fc.weight": rs,
        "text_encoder_2.text_model.fc.weight": low(magnitude=np.ones(8, np.float32)),
        "up_blocks.0.c.weight": low(),
        "unet.mid_block.a_b.bias": Dense(normal(5, 8), 0.5),
    }
    file = tmp_path / "k.safetensors"
    assert save_adapter(Adapter(entries), file, "kohya") == ()
    from safetensors.numpy import load_file

    got = load_file(file)
    assert {k.partition(".")[0] for k in got} == {
        "lora_unet_mid_block_a_b",
        "lora_te1_text_model_fc",
        "lora_te2_text_model_fc",
        "lora_unet_up_blocks_0_c",
    }
    assert got["lora_unet_mid_block_a_b.lora_down.weight"].shape == (2, 3, 3, 3)
    assert got["lora_unet_mid_block_a_b.lora_up.weight"].shape == (8, 2, 1, 1)
    assert got["lora_unet_mid_block_a_b.alpha"] == 3 and got[
        "lora_te2_text_model_fc.dora_scale"
    ].shape == (8, 1)
    assert got["lora_te1_text_model_fc.alpha"] == 3.0 * 4 / 2  # alpha/√4, as alpha/4
    np.testing.assert_array_equal(got["lora_unet_mid_block_a_b.diff_b"], normal(5, 8) / 2)


def test_two_names_that_become_one(tmp_path: Path) -> None:
    adapter = Adapter({"a_b.c.weight": low(), "a.b_c.weight": low()})
    with pytest.raises(LoraFxError, match=r"'a_b\.c\.weight' and 'a\.b_c\.weight' would both be"):
        save_adapter(adapter, tmp_path / "k.safetensors", "kohya")


def test_numbers_that_fp32_cannot_hold(tmp_path: Path) -> None:
    """An alpha is stored in fp64 then; a whole ΔW has no field for its scale."""
    file = tmp_path / "k.safetensors"
    save_adapter(Adapter({"h.x.weight": low(alpha=1e39)}), file, "kohya")
    assert load_adapter(file).lowrank["h.x.weight"].alpha == 1e39
    whole = Adapter({"h.x.bias": Dense(normal(0, 8), scale=1e39)})
    with pytest.raises(LoraFxError, match=r"'h\.x\.bias': .* times 1e\+39 are out of fp32's range"):
        save_adapter(whole, tmp_path / "d.safetensors", "kohya")


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file

    file = tmp_path / "k.safetensors"
    save_adapter(Adapter({"h.x.weight": low(layout=plain_layout((8, 6)))}), file, "kohya")
    with safe_open(file, "np") as f:
        header = f.metadata()
    good = load_file(file)
    name = "lycoris_h_x"
    changes: list[tuple[dict[str, Array], dict[str, str], str]] = [
        ({f"{name}.alpha": np.array(4.0)}, header, "scale 2, but 1.5 in the JSON"),
        ({f"{name}.lora_up.weight": normal(0, 9, 2)}, header, "does not fit its layout"),
        ({}, {"lora_fx_names": "{}"}, "format None"),
        ({}, {"lora_fx_names": '{"format": 1}'}, "KeyError"),
        ({}, {"lora_fx_names": '{"version": 2}'}, "format 2"),
    ]
    for tensors, metadata, word in changes:
        save_file({**good, **tensors}, file, metadata)
        with pytest.raises(LoraFxError, match=word):
            load_adapter(file)
    save_file(good, file, {"format": "pt"})  # without the JSON it is any kohya file
    assert list(load_adapter(file)) == [f"{name}.weight"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"alpha": 2.0}, "has only an alpha; expected the tensors of an update too"),
        (
            {"dora_scale": normal(0, 4, 1), "lokr_w1": normal(1, 2, 2), "lokr_w2": normal(2, 2, 2)},
            "has dora_scale together with lokr",
        ),
        (
            {"lokr_w1_a": normal(0, 2, 1), "lokr_w1_b": normal(1, 1, 2),
             "lokr_w2_a": normal(2, 2, 3), "lokr_w2_b": normal(3, 3, 2)},
            "has rank 1 in w1 and 3 in w2",
        ),
    ],
)  # fmt: skip
def test_what_no_module_of_one_method_has(
    tmp_path: Path, tensors: Mapping[str, Array | float], words: str
) -> None:
    with pytest.raises(LoraFxError, match=words):
        kohya.read(stored(tmp_path, tensors))


def test_a_header_with_one_key_for_two_names() -> None:
    low = LowRank(normal(0, 2, 3), normal(1, 4, 2), 2.0)
    text = describe(Adapter({"p": low, "q": low}), {"p": "a.weight", "q": "b.weight"})
    header = {FIELD: text.replace('"key": "q"', '"key": "p"')}
    with pytest.raises(LoraFxError, match="'p' appears twice"):
        restore({"a.weight": low, "b.weight": low}, header, "x.safetensors")


def test_whole_tensors_have_no_row_in_the_header() -> None:
    full = Full(normal(0, 2))
    assert '"names": {}' in describe(Adapter({"x.bias": full}), {"x.bias": "x.bias"})
