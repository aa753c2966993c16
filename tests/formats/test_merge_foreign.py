"""Foreign adapter files merged into checkpoints, against the formulas in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import ReplacedRows
from lora_fx.checkpoint.merge import merge
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter

Array = np.ndarray[Any, Any]
SHAPES = {
    "mid_block.a_b.weight": (8, 6),
    "mid_block.a_b.bias": (8,),
    "conv_in.weight": (8, 3, 3, 2),
    "norm.weight": (8,),
    "loha.weight": (8, 6),
    "lokr.weight": (8, 10, 3, 2),
    "dora.weight": (8, 6),
    "left.weight": (8, 6),
}


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BASE = {name: normal(50 + i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
UPDATES = {
    "mid_block_a_b.lora_down.weight": normal(0, 2, 6),
    "mid_block_a_b.lora_up.weight": normal(1, 8, 2),
    "mid_block_a_b.alpha": np.array(1.0, np.float32),
    "mid_block_a_b.diff_b": normal(2, 8),
    "input_blocks_0_0.lora_down.weight": normal(3, 2, 3, 3, 2),
    "input_blocks_0_0.lora_up.weight": normal(4, 8, 2, 1, 1),
    "norm.w_norm": normal(5, 8),
    **{f"loha.hada_w{i}_a": normal(5 + i, 8, 2) for i in (1, 2)},
    **{f"loha.hada_w{i}_b": normal(7 + i, 2, 6) for i in (1, 2)},
    "lokr.lokr_w1": normal(10, 2, 5),
    "lokr.lokr_w2": normal(11, 4, 2, 3, 2),
    "dora.lora_down.weight": normal(12, 2, 6),
    "dora.lora_up.weight": normal(13, 8, 2),
    "dora.dora_scale": np.abs(normal(14, 8, 1)) + 1,
}


def wanted(weight: float = 1.0) -> dict[str, Array]:
    """W + weight·s·ΔW by the formulas, and DoRA's rows (of weight 1 only)."""
    u = {k: v.astype(np.float64) for k, v in UPDATES.items()}
    w = {k: v.astype(np.float64) for k, v in BASE.items()}

    def pair(name: str) -> tuple[Array, Array]:
        return u[f"{name}.lora_up.weight"], u[f"{name}.lora_down.weight"]

    up, down = pair("mid_block_a_b")
    w["mid_block.a_b.weight"] += weight * 0.5 * up @ down
    w["mid_block.a_b.bias"] += weight * u["mid_block_a_b.diff_b"]
    up, down = pair("input_blocks_0_0")
    w["conv_in.weight"] += weight * np.einsum("or,rchw->ochw", up[:, :, 0, 0], down)
    w["norm.weight"] += weight * u["norm.w_norm"]
    one, two = (u[f"loha.hada_w{i}_a"] @ u[f"loha.hada_w{i}_b"] for i in (1, 2))
    w["loha.weight"] += weight * one * two
    w1 = u["lokr.lokr_w1"][:, :, None, None]
    w["lokr.weight"] += weight * np.kron(w1, u["lokr.lokr_w2"])
    up, down = pair("dora")
    moved = w["dora.weight"] + up @ down
    w["dora.weight"] = u["dora.dora_scale"] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
    return w


def stored(folder: Path, dora: bool = True) -> tuple[Path, Path]:
    (folder / "unet").mkdir()
    save_file(BASE, folder / "unet" / "diffusion_pytorch_model.safetensors")
    kept = {k: v for k, v in UPDATES.items() if dora or not k.startswith("dora")}
    save_file({f"lora_unet_{k}": v for k, v in kept.items()}, folder / "k.safetensors")
    return folder / "unet", folder / "k.safetensors"


def merged(base: Path, adapter: Any, out: Path) -> dict[str, Array]:
    merge(base, [adapter], out)
    return load_file(out / "diffusion_pytorch_model.safetensors")


def close(got: dict[str, Array], want: dict[str, Array]) -> None:
    assert set(got) == set(want)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=2e-6 * np.abs(array).max())
    np.testing.assert_array_equal(got["left.weight"], BASE["left.weight"])


def test_every_kind_of_a_kohya_file(tmp_path: Path) -> None:
    base, adapter = stored(tmp_path)
    close(merged(base, adapter, tmp_path / "out"), wanted())


def test_with_a_weight(tmp_path: Path) -> None:
    base, adapter = stored(tmp_path, dora=False)
    want = {**wanted(0.4), "dora.weight": BASE["dora.weight"]}
    close(merged(base, (adapter, 0.4), tmp_path / "out"), want)


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        (ReplacedRows((1,), normal(0, 1, 6)), "trained rows"),
        (LowRank(normal(0, 2, 6), normal(1, 8, 2), 1.0, magnitude=normal(2, 8)), "DoRA"),
    ],
)
def test_what_has_no_weight(entry: Any, word: str) -> None:
    with pytest.raises(LoraFxError, match=f"'x.weight' is {word}"):
        Adapter({"x.weight": entry}).weighted(0.5)
    assert Adapter({"x.weight": entry}).weighted(1.0).entries["x.weight"] is entry


def test_components_of_a_diffusers_file(tmp_path: Path) -> None:
    """The unet's updates go into its folder; those of the text encoder are said to be left out."""
    base, _ = stored(tmp_path)
    a, b = normal(0, 2, 6), normal(1, 8, 2)
    names = ("unet.mid_block.a_b", "text_encoder.text_model.fc1")
    tensors = {f"{n}.lora_{h}.weight": x for n in names for h, x in (("A", a), ("B", b))}
    save_file(tensors, tmp_path / "d.safetensors")
    report = merge(base, [tmp_path / "d.safetensors"], tmp_path / "out")
    assert any("1 updates of text_encoder are for another" in w for w in report.warnings)
    got = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    changed = [k for k in BASE if not np.array_equal(got[k], BASE[k])]
    assert changed == ["mid_block.a_b.weight"]
    want = BASE["mid_block.a_b.weight"] + b @ a
    np.testing.assert_allclose(got["mid_block.a_b.weight"], want, rtol=1e-5, atol=1e-5)


def test_a_name_that_the_base_lacks(tmp_path: Path) -> None:
    base, _ = stored(tmp_path)
    pair = {"lora_down.weight": normal(0, 2, 6), "lora_up.weight": normal(1, 8, 2)}
    save_file({f"lora_unet_gone.{k}": v for k, v in pair.items()}, tmp_path / "g.safetensors")
    with pytest.raises(LoraFxError, match=r"lora_unet_gone\.weight' fits no parameter"):
        merge(base, [load_adapter(tmp_path / "g.safetensors")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
