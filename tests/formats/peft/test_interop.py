"""PEFT itself as the judge: its folders read by us, ours loaded by it, equal ΔW both ways."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.dtypes import Array
from lora_fx.files.tensor_files import read_tensors
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.formats.peft.names import OWN
from lora_fx.ir.layout import Layout, plain_layout

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from lora_fx.passes.verbs.insert_onnx import insert_onnx  # noqa: E402

TARGETS = ["fc", "up", "emb", "c1", "c2", "point", "gpt"]


class Tiny(nn.Module):
    """One rectangular layer of every class that PEFT adapts, two of them of the same ending.

    Its operators in ONNX are Gemm, MatMul, Gather and Conv.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 10)
        self.block = nn.ModuleDict({"fc": nn.Linear(10, 7), "up": nn.Linear(7, 5, bias=False)})
        self.emb = nn.Embedding(11, 6)
        self.c1 = nn.Conv1d(3, 4, 5)
        self.c2 = nn.Conv2d(3, 4, (3, 2))
        self.point = nn.Conv2d(4, 5, 1)
        self.gpt = Conv1D(9, 6)  # weight [6, 9]
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(7, 3)

    def forward(self, words: Any, image: Any) -> Any:
        x = self.fc(self.emb(words))  # [batch, words, 10]
        y = self.point(self.c2(image)).mean((2, 3))  # [batch, 5]
        z = self.c1(self.gpt(image[:, :, 0]))  # [batch, 4, 5]
        h = self.block["fc"](x).mean(1)  # [batch, 7]
        return self.block["up"](h) + self.head(h).sum(1, keepdim=True) + y + z.mean(1)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PEFT warns about its own choices (fan_in_fan_out, embeddings saved)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def deltas(model: Any) -> dict[str, Array]:
    """ΔW by parameter name as PEFT computes it, in stored layout."""
    result = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            result[f"{name}.weight"] = delta.numpy().astype(np.float64)
    return result


def close(got: dict[str, Array], want: dict[str, Array]) -> None:
    """Equal keys, shapes and, up to fp32 rounding, values; none of them a no-op."""
    assert set(got) == set(want)
    for key, value in want.items():
        assert got[key].shape == value.shape, key
        assert np.abs(value).max() > 1e-3, key
        assert np.abs(got[key] - value).max() <= 1e-6 * np.abs(value).max(), key


def stored(adapter: Adapter, model: nn.Module) -> dict[str, Array]:
    """ΔW of an unbound adapter in the layout that the model's parameters have."""
    shapes = {k: tuple(p.shape) for k, p in model.named_parameters()}
    result = {}
    for key, low in adapter.lowrank.items():
        matrix = low.matrix()
        turned = low.origin.op == "embedding" or key == "gpt.weight"
        result[key] = (matrix.T if turned else matrix).reshape(shapes[key])
    return result


@pytest.mark.parametrize("rslora", [False, True])
def test_read_what_peft_writes(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        rank_pattern={"^fc": 2, r"block\.fc": 3, "emb": 5},
        alpha_pattern={"fc": 9, "c2": 1},
        modules_to_save=["head", "norm"],
        use_rslora=rslora,
        init_lora_weights=False,
        lora_dropout=0.25,
        fan_in_fan_out=True,
    )
    model = peft.get_peft_model(Tiny(), config)
    model.save_pretrained(tmp_path)
    got = load_adapter(tmp_path)
    assert got.metadata["dropout"] == 0.25
    assert [got.lowrank[f"{k}.weight"].rank for k in ("fc", "block.fc", "emb", "c1")] == [
        2,
        3,
        5,
        4,
    ]
    assert {low.layout for low in got.lowrank.values()} == {None}
    close(stored(got, Tiny()), deltas(model))
    assert set(got.full) == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    head = model.base_model.model.head.modules_to_save["default"].weight
    np.testing.assert_array_equal(got.full["head.weight"].value, head.detach().numpy())


def bound(variant: str) -> Adapter:
    """An adapter for Tiny with the layouts that find gives, and updates beyond PEFT."""
    rng = np.random.default_rng(0)
    model = Tiny()
    entries: dict[str, LowRank | Full] = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        module = name.removesuffix(".weight")
        if module == name or module.rpartition(".")[2] not in TARGETS:
            continue
        shape = tuple(p.shape)
        layout, op = plain_layout(shape), {3: "conv1d", 4: "conv2d"}.get(len(shape), "linear")
        if module in ("emb", "gpt"):
            layout = Layout(shape, (), (1,), (0,), shape)
            op = "embedding" if module == "emb" else "addmm"
        rank = 2 + i % 3
        a = rng.standard_normal((rank, layout.in_size), np.float32)
        b = rng.standard_normal((layout.out_size, rank), np.float32)
        entries[name] = LowRank(a, b, 3.0 + i % 2, layout, variant, origin=Origin(op=op))
    entries["norm.weight"] = Full(np.arange(6, dtype=np.float32))
    entries["norm.bias"] = Full(np.arange(6, 12, dtype=np.float32))
    part = Layout((2, 7), (), (0,), (1,), (2, 7))
    ones = np.ones((1, 7), np.float32), np.ones((2, 1), np.float32)
    entries["head.weight[0:2]"] = LowRank(*ones, 1.0, part, variant)
    return Adapter(entries)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_peft_loads_what_we_write(tmp_path: Path, variant: str) -> None:
    adapter = bound(variant)
    notes = save_adapter(adapter, tmp_path / "x")
    assert len(notes) == 1 and "head.weight[0:2]" in notes[0]
    model = peft.PeftModel.from_pretrained(Tiny(), str(tmp_path / "x"))
    tensors = peft.load_peft_weights(str(tmp_path / "x"), device="cpu")
    result = peft.set_peft_model_state_dict(model, tensors)
    assert not [k for k in result.missing_keys if "lora_" in k or "modules_to_save" in k]
    assert all(k.startswith(OWN) for k in result.unexpected_keys)
    want = {k: v for k, v in adapter.deltas().items() if "[" not in k}
    close(deltas(model), want)
    norm = model.base_model.model.norm.modules_to_save["default"]
    np.testing.assert_array_equal(norm.weight.detach().numpy(), np.arange(6))


def test_peft_loads_what_an_onnx_file_holds(tmp_path: Path) -> None:
    base = tmp_path / "base.onnx"
    rng = torch.Generator().manual_seed(0)
    words, image = torch.arange(8).view(2, 4), torch.randn(2, 3, 7, 6, generator=rng)
    lora_fx.export(Tiny().eval(), base, (words, image), provider="cpu")
    assert {n.op_type for n in onnx.load(base).graph.node} >= {"Gemm", "MatMul", "Gather", "Conv"}
    insert_onnx(base, tmp_path / "slots.onnx", rank=2, include="*", provider="cpu")
    adapter = load_adapter(tmp_path / "slots.onnx")
    for low in adapter.lowrank.values():
        low.b[:] = np.random.default_rng(1).standard_normal(low.b.shape)
    assert save_adapter(adapter, tmp_path / "x") == ()
    model = peft.PeftModel.from_pretrained(Tiny(), str(tmp_path / "x"))
    torchs = {k: tuple(p.shape) for k, p in Tiny().named_parameters()}
    found = adapter.deltas().items()  # a MatMul has the weight of a Linear as [in, out]
    close(deltas(model), {k: w if w.shape == torchs[k] else w.T for k, w in found})
    names = (*TARGETS, "block.fc", "block.up", "head")
    assert set(adapter.lowrank) == {f"{n}.weight" for n in names if n != "up"}


def test_names_without_dots_adapt_nothing_else(tmp_path: Path) -> None:
    """`fc` alone would make PEFT adapt block.fc as well, or fail on a class it does not know."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 10)
            self.block = nn.ModuleDict({"fc": nn.Sequential(nn.Linear(2, 3))})

    layout = plain_layout((10, 6))
    ones = np.ones((2, 6), np.float32), np.ones((10, 2), np.float32)
    adapter = Adapter({"fc.weight": LowRank(*ones, 2.0, layout)})
    save_adapter(adapter, tmp_path / "x")
    model = peft.PeftModel.from_pretrained(Nested(), str(tmp_path / "x"))
    close(deltas(model), adapter.deltas())
    assert load_adapter(tmp_path / "x").lowrank["fc.weight"].layout == layout


def test_peft_loads_its_own_folder_after_us(tmp_path: Path) -> None:
    """PEFT → lora-fx, unbound → PEFT keeps every tensor, and every scale."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False, rank_pattern={"c2": 2}
    )
    model = peft.get_peft_model(Tiny(), config)
    model.save_pretrained(tmp_path / "theirs")
    assert save_adapter(load_adapter(tmp_path / "theirs"), tmp_path / "ours") == ()
    again = peft.PeftModel.from_pretrained(Tiny(), str(tmp_path / "ours"))
    close(deltas(again), deltas(model))
    theirs, ours = (
        read_tensors(tmp_path / n / "adapter_model.safetensors")[0] for n in ("theirs", "ours")
    )
    assert {k: v.tobytes() for k, v in theirs.items()} == {k: v.tobytes() for k, v in ours.items()}


def test_every_field_that_peft_writes_is_known(tmp_path: Path) -> None:
    """A config of this version of PEFT gives no note; a new field should be looked at."""
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(target_modules=["fc"]))
    model.save_pretrained(tmp_path)
    assert load_adapter(tmp_path).metadata["notes"] == []
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"use_dora", "kasa_config", "use_bdlora"} <= set(written)
