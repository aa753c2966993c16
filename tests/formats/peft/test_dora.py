"""DoRA, biases and attention as PEFT merges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.adapter.adapter import Adapter, mix
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Dense
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter, save_adapter
from tests.formats.merging import check_with_peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

LINEAR = ["fc", "block.up", "gpt", "c1", "c2", "c3", "point"]


class Tiny(nn.Module):
    """A rectangular layer of every class that PEFT adapts, all with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 10)
        self.block = nn.ModuleDict({"up": nn.Linear(7, 5)})
        self.emb = nn.Embedding(11, 6)
        self.c1 = nn.Conv1d(3, 4, 5)
        self.c2 = nn.Conv2d(3, 4, (3, 2))
        self.c3 = nn.Conv3d(2, 3, (1, 2, 3))
        self.point = nn.Conv2d(4, 5, 1)
        self.gpt = Conv1D(9, 6)  # weight [6, 9]
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.block["up"](self.fc(self.emb(x))))


def build(cls: type[nn.Module] = Tiny) -> nn.Module:
    torch.manual_seed(0)
    model = cls()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)  # biases and gains of their own
    return model


def config(**fields: Any) -> Any:
    usual = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": LINEAR}
    return peft.LoraConfig(**{**usual, **fields})


@pytest.mark.parametrize("rslora", [False, True])
def test_dora(tmp_path: Path, rslora: bool) -> None:
    given = config(
        use_dora=True, use_rslora=rslora, target_modules=[*LINEAR, "emb"], rank_pattern={"c2": 2}
    )
    got = check_with_peft(tmp_path, build, given, turned=("gpt.weight",), changed=8)
    sizes = {k: low.magnitude.shape for k, low in got.lowrank.items() if low.magnitude is not None}
    assert sizes == {
        "fc.weight": (10,), "block.up.weight": (5,), "gpt.weight": (9,), "emb.weight": (6,),
        "c1.weight": (4,), "c2.weight": (4,), "c3.weight": (3,), "point.weight": (5,),
    }  # fmt: skip
    assert set(got.others) == set(got.lowrank)
    with pytest.raises(LoraFxError, match="DoRA"):
        got.deltas()


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_bias(tmp_path: Path, rslora: bool) -> None:
    got = check_with_peft(
        tmp_path,
        build,
        config(lora_bias=True, use_rslora=rslora),
        turned=("gpt.weight",),
        changed=14,
    )
    bias = got.entries["fc.bias"]
    assert isinstance(bias, Dense) and bias.scale == got.lowrank["fc.weight"].scale


@pytest.mark.parametrize(("bias", "changed"), [("lora_only", 14), ("all", 16)])
def test_trained_biases(tmp_path: Path, bias: str, changed: int) -> None:
    got = check_with_peft(
        tmp_path, build, config(bias=bias), turned=("gpt.weight",), changed=changed
    )
    assert len(got.full) + len(got.lowrank) == changed


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_biases_of_both_kinds(tmp_path: Path, bias: str) -> None:
    got = check_with_peft(
        tmp_path, build, config(bias=bias, lora_bias=True), turned=("gpt.weight",), changed=14
    )
    assert bool(got.full) == (bias == "lora_only")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)

    def forward(self, x: Any) -> Any:
        return self.mha(x, x, x)[0]


@pytest.mark.parametrize("fields", [{}, {"lora_bias": True}, {"bias": "lora_only"}])
def test_attention(tmp_path: Path, fields: dict[str, Any]) -> None:
    """PEFT adds the update of out_proj twice, when it merges and in every forward."""
    given = config(target_modules=["mha"], **fields)
    got = check_with_peft(tmp_path, lambda: build(Attention), given)
    one, two = got.lowrank["mha.in_proj_weight"], got.lowrank["mha.out_proj.weight"]
    assert two.scale == 2 * one.scale
    noted = any("in_proj" not in n and "mha.lora_B.bias" in n for n in got.metadata["notes"])
    assert noted == ("lora_bias" in fields)


def plain(magnitude: Any = None) -> LowRank:
    a, b = np.ones((2, 3), np.float32), np.ones((4, 2), np.float32)
    return LowRank(a, b, 2.0, magnitude=magnitude)


def test_dora_on_some_updates_is_beyond_peft(tmp_path: Path) -> None:
    some = {"x.weight": plain(np.ones(4, np.float32)), "y.weight": plain()}
    with pytest.raises(LoraFxError, match=r"'x\.weight' is DoRA and 'y\.weight' is not"):
        save_adapter(Adapter(some), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_dora_is_neither_mixed_nor_weighted() -> None:
    adapter = Adapter({"x.weight": plain(np.ones(4, np.float32))})
    with pytest.raises(LoraFxError, match=r"a mix: .*DoRA"):
        mix([(adapter, 1.0), (adapter, 2.0)])
    with pytest.raises(LoraFxError, match=r"weight 2: .*DoRA"):
        adapter.weighted(2.0)


def test_what_peft_cannot_say_of_biases_is_kept_as_ours(tmp_path: Path) -> None:
    """A ΔW of a bias at another scale, or beside DoRA, stays exact in our own form."""
    entries = {"x.weight": plain(), "x.bias": Dense(np.arange(4, dtype=np.float32), 0.3)}
    notes = save_adapter(Adapter(entries), tmp_path / "x")
    assert any("'x.bias'" in note for note in notes)
    got = load_adapter(tmp_path / "x").entries["x.bias"]
    assert isinstance(got, Dense) and got.scale == 0.3
    np.testing.assert_array_equal(got.value, np.arange(4))
