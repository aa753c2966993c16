"""LoHa and LoKr: PEFT's own folders judged by PEFT, kohya's files by formula in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model
from safetensors.numpy import save_file
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.updates import Hadamard, Kronecker
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import write_tensors
from lora_fx.formats.io import load_adapter, save_adapter
from tests.formats.test_kohya import X, close, normal, stored, whole, wide

Array = np.ndarray[Any, Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 40)
        self.conv = nn.Conv2d(12, 20, (3, 2))
        self.seq = nn.Conv1d(12, 20, 3)


CONFIGS: list[Any] = [
    LoHaConfig(r=3, alpha=5),
    LoHaConfig(r=3, alpha=5, use_effective_conv2d=True),
    LoHaConfig(r=3, alpha=5, alpha_pattern={"fc": 7}, rank_pattern={"conv": 2}),
    LoKrConfig(r=2, alpha=5),
    LoKrConfig(r=2, alpha=5, decompose_both=True, decompose_factor=4),
    LoKrConfig(r=2, alpha=5, use_effective_conv2d=True),  # PEFT itself fails on a Conv1d
    LoKrConfig(r=32, alpha=5),  # w1 and w2 whole: PEFT's scale is alpha/r all the same
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__}-{c.r}")
def test_peft_folders(tmp_path: Path, config: Any) -> None:
    torch.manual_seed(0)
    base = Net()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    broken = isinstance(config, LoKrConfig) and config.use_effective_conv2d
    modules = {"fc", "conv"} if broken else {"fc", "conv", "seq"}
    config.target_modules, config.init_weights = modules, False
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "hada_" in name or "lokr_" in name:
                p.normal_()
    model.save_pretrained(str(tmp_path))
    after = model.merge_and_unload().state_dict()
    adapter = load_adapter(tmp_path)
    assert set(adapter) == {f"{m}.weight" for m in modules}
    assert adapter.metadata["notes"] == []
    for key, entry in adapter.entries.items():
        want = (after[key].double() - before[key].double()).numpy()
        got = before[key].numpy() + whole(entry).reshape(want.shape)
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, after[key].numpy(), rtol=0, atol=1e-6 * np.abs(want).max())


def loha(r: int, out: int, in_: int) -> dict[str, Array]:
    shapes = {"w1_a": (out, r), "w1_b": (r, in_), "w2_a": (out, r), "w2_b": (r, in_)}
    return {f"hada_{k}": normal(i, *s) for i, (k, s) in enumerate(shapes.items())}


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_loha(tmp_path: Path, alpha: float | None) -> None:
    parts = loha(3, 8, 6)
    file = stored(tmp_path, parts if alpha is None else {**parts, "alpha": alpha})
    a1, b1, a2, b2 = wide(**parts)
    scale = 1.0 if alpha is None else alpha / 3
    close(whole(load_adapter(file).entries[f"{X}.weight"]), scale * (a1 @ b1) * (a2 @ b2))


def test_loha_tucker(tmp_path: Path) -> None:
    parts = {f"hada_w{i}_{x}": normal(i + n, 3, n) for i in (1, 2) for x, n in (("a", 8), ("b", 6))}
    parts |= {f"hada_t{i}": normal(i, 3, 3, 2, 2) for i in (1, 2)}
    entry = load_adapter(stored(tmp_path, {**parts, "alpha": 2.0})).entries[f"{X}.weight"]
    sides = [
        np.einsum(
            "ijhw,io,jc->ochw",
            *(parts[f"hada_{p}"].astype(np.float64) for p in (f"t{i}", f"w{i}_a", f"w{i}_b")),
        )
        for i in (1, 2)
    ]
    want = 2.0 / 3 * sides[0] * sides[1]
    close(whole(entry).reshape(want.shape), want)
    assert isinstance(entry, Hadamard) and entry.kernel == (2, 2)


W1, W2 = normal(0, 2, 3), normal(1, 4, 5)
A1, B1, A2, B2 = normal(2, 2, 3), normal(3, 3, 3), normal(4, 4, 3), normal(5, 3, 5)
CASES: list[tuple[dict[str, Array], float]] = [
    ({"w1": W1, "w2": W2}, 1.0),  # alpha is there and means nothing
    ({"w1": W1, "w2_a": A2, "w2_b": B2}, 7 / 3),
    ({"w1_a": A1, "w1_b": B1, "w2": W2}, 7 / 3),
    ({"w1_a": A1, "w1_b": B1, "w2_a": A2, "w2_b": B2}, 7 / 3),
]


@pytest.mark.parametrize(("halves", "scale"), CASES)
def test_lokr(tmp_path: Path, halves: dict[str, Array], scale: float) -> None:
    parts: dict[str, Any] = {f"lokr_{k}": v for k, v in halves.items()}
    entry = load_adapter(stored(tmp_path, {**parts, "alpha": 7.0})).entries[f"{X}.weight"]
    w = {k: v.astype(np.float64) for k, v in halves.items()}
    w1 = w["w1"] if "w1" in w else w["w1_a"] @ w["w1_b"]
    w2 = w["w2"] if "w2" in w else w["w2_a"] @ w["w2_b"]
    close(whole(entry), scale * np.kron(w1, w2))


def test_lokr_of_a_convolution(tmp_path: Path) -> None:
    w2 = normal(1, 4, 5, 3, 2)
    t, a, b = normal(2, 3, 3, 3, 2), normal(3, 3, 4), normal(4, 3, 5)
    tucker = np.einsum("ijhw,io,jc->ochw", *wide(t=t, a=a, b=b))
    for parts, inner, scale in (
        ({"lokr_w2": w2}, w2, 1.0),
        ({"lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b}, tucker, 2 / 3),
        ({"lokr_w2_a": A2, "lokr_w2_b": normal(5, 3, 30)}, None, 2 / 3),
    ):
        if inner is None:
            inner = (A2.astype(np.float64) @ normal(5, 3, 30)).reshape(4, 5, 3, 2)
        file = stored(tmp_path, {**parts, "lokr_w1": W1, "alpha": 2.0})
        entry = load_adapter(file).entries[f"{X}.weight"]
        want = scale * np.kron(W1.astype(np.float64)[:, :, None, None], inner)
        close(whole(entry).reshape(want.shape), want)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_kronecker_is_written_and_read(tmp_path: Path, scale: float) -> None:
    w2 = normal(1, 4, 30)
    entry = Kronecker(W1, w2, scale, kernel=(3, 2))
    file = tmp_path / "k.safetensors"
    save_adapter(Adapter({"unet.c.weight": entry}), file, "kohya")
    got = load_adapter(file).entries["unet.c.weight"]
    assert isinstance(got, Kronecker) and got.scale == scale
    np.testing.assert_array_equal(got.w1, W1, strict=True)
    np.testing.assert_array_equal(got.w2, w2, strict=True)
    from safetensors.numpy import load_file

    tensors = {k.partition(".")[2]: v for k, v in load_file(file).items()}
    assert tensors["lokr_w2"].shape == (4, 5, 3, 2)
    w1 = tensors["lokr_w1"] if scale == 1 else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    factor = 1.0 if scale == 1 else float(tensors["alpha"]) / len(tensors["lokr_w1_b"])
    np.testing.assert_allclose(factor * w1, scale * W1, rtol=1e-6)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({**loha(3, 8, 6), "hada_w2_b": normal(0, 2, 6)}, "do not fit"),
        ({k: v for k, v in loha(3, 8, 6).items() if k != "hada_w2_a"}, "a LoHa needs"),
        ({**loha(3, 8, 6), "hada_t1": normal(0, 3, 3, 2, 2)}, "both or none"),
        ({**loha(3, 8, 6), "dora_scale": normal(0, 8, 1)}, "dora_scale together with hada"),
        ({"lokr_w1": W1}, "a LoKr needs lokr_w2"),
        ({"lokr_w1": W1, "lokr_w2": W2, "lokr_w2_a": A2}, "a LoKr needs"),
        ({"lokr_w1": W1, "lokr_w2_a": A2, "lokr_w2_b": normal(0, 2, 5)}, "do not fit"),
        ({**{f"lokr_{k}": v for k, v in CASES[2][0].items()}, "lokr_t1": W1}, "lokr_t1"),
        (
            {"lokr_w1_a": A1[:, :2], "lokr_w1_b": B1[:2], "lokr_w2_a": A2, "lokr_w2_b": B2},
            "rank 2 in w1 and 3 in w2",
        ),
    ],
)
def test_refused(tmp_path: Path, parts: dict[str, Array], word: str) -> None:
    with pytest.raises(LoraFxError, match=word) as caught:
        load_adapter(stored(tmp_path, parts))
    assert X in caught.value.message


@pytest.mark.parametrize(
    ("config", "name", "word"),
    [
        ({"alpha": None}, "hada_w1_a", "alpha is None"),
        ({"r": 4}, "hada_w1_a", "has rank 3; .* has 4"),
        ({"target_modules": ["other"]}, "hada_w1_a", "does not name"),
        ({}, "lora_A.weight", "does not belong to LOHA"),
    ],
)
def test_peft_folders_refused(tmp_path: Path, config: dict[str, Any], name: str, word: str) -> None:
    tensors = {f"base_model.model.m.fc.{k}": v for k, v in loha(3, 8, 6).items()}
    array = tensors.pop("base_model.model.m.fc.hada_w1_a")
    write_tensors(
        tmp_path / "adapter_model.safetensors",
        {**tensors, f"base_model.model.m.fc.{name}": array},
        {},
    )
    fields = {"peft_type": "LOHA", "r": 3, "alpha": 3, "target_modules": ["fc"], **config}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(LoraFxError, match=word):
        load_adapter(tmp_path)


def test_a_pattern_that_matches_nothing_is_noted(tmp_path: Path) -> None:
    tensors = {f"base_model.model.m.fc.{k}": v for k, v in loha(3, 8, 6).items()}
    write_tensors(tmp_path / "adapter_model.safetensors", tensors, {})
    fields = {"peft_type": "LOHA", "r": 3, "alpha": 3, "rank_pattern": {"fd": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": ["fc"]}))
    (note,) = load_adapter(tmp_path).metadata["notes"]
    assert "rank_pattern 'fd' matches no module" in note and "did you mean fc?" in note


def test_peft_and_graphs_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    entry = Kronecker(W1, W2, 1.0)
    for format, name in (("peft", "p"), ("diffusers", "d"), ("onnx_adapter", "o.onnx_adapter")):
        with pytest.raises(LoraFxError, match=r"unet\.x\.weight.*LoKr"):
            save_adapter(Adapter({"unet.x.weight": entry}), tmp_path / name, format)
    file = tmp_path / "k.safetensors"
    save_file({f"{X}.lokr_w1": W1, f"{X}.lokr_w2": W2}, file)
    with pytest.raises(LoraFxError, match="a name from a kohya file"):
        save_adapter(load_adapter(file), tmp_path / "p")
