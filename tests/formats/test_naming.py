"""Names of foreign files against a model's: kohya's underscores, components, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.formats.naming import ForeignNames

LOW = LowRank(np.ones((2, 4), np.float32), np.ones((3, 2), np.float32), 2.0)
UNET = (
    "conv_in.weight",
    "conv_in.bias",
    "time_embedding.linear_1.weight",
    "add_embedding.linear_2.weight",
    "down_blocks.0.resnets.1.conv1.weight",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight",
    "down_blocks.1.downsamplers.0.conv.weight",
    "mid_block.attentions.0.proj_in.weight",
    "mid_block.resnets.1.time_emb_proj.weight",
    "up_blocks.0.attentions.2.proj_out.weight",
    "up_blocks.0.upsamplers.0.conv.weight",
    "up_blocks.2.resnets.0.conv_shortcut.weight",
    "conv_out.weight",
)
SGM = (
    "input_blocks_0_0",
    "input_blocks_0_0",
    "time_embed_0",
    "label_emb_0_2",
    "input_blocks_2_0_in_layers_2",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
    "input_blocks_6_0_op",
    "middle_block_1_proj_in",
    "middle_block_2_emb_layers_1",
    "output_blocks_2_1_proj_out",
    "output_blocks_2_2_conv",
    "output_blocks_6_0_skip_connection",
    "out_2",
)
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"


def named(*keys: str, naming: str = "kohya") -> Adapter:
    return Adapter({key: LOW for key in keys}, names=ForeignNames(naming))


def resolved(key: str, *names: str) -> str:
    (got,) = named(key).resolved(names)
    return got


@pytest.mark.parametrize("name", UNET)
def test_underscores(name: str) -> None:
    module, _, leaf = name.rpartition(".")
    key = f"lora_unet_{module.replace('.', '_')}.{leaf}"
    assert resolved(key, *UNET) == name
    for home in ("unet.", "model.diffusion_model."):
        assert resolved(key, *(f"{home}{n}" for n in UNET)) == f"{home}{name}"


@pytest.mark.parametrize(("name", "old"), list(zip(UNET, SGM, strict=True)))
def test_names_of_the_original_unet(name: str, old: str) -> None:
    assert resolved(f"lora_unet_{old}.{name.rpartition('.')[2]}", *UNET) == name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"lora_te_{CLIP.replace('.', '_')}.weight", f"{CLIP}.weight"),
        (f"lora_te1_{CLIP.replace('.', '_')}.weight", f"text_encoder.{CLIP}.weight"),
        (f"lora_te_{CLIP.replace('.', '_')}.weight", f"{CLIP.removeprefix('text_model.')}.weight"),
        (f"lora_te_{CLIP.replace('.', '_')}.weight", f"cond_stage_model.transformer.{CLIP}.weight"),
        ("lora_unet_unet_mid_block_a_b.weight", "mid_block.a_b.weight"),
        ("lora_unet_unet_mid_block_a_b.weight", "unet.mid_block.a_b.weight"),
        (f"lora_te_text_encoder_{CLIP.replace('.', '_')}.weight", f"text_encoder.{CLIP}.weight"),
        ("lycoris_h_0_my_fc.weight", "h.0.my_fc.weight"),
        ("lora_h_0_my_fc.weight", "h.0.my_fc.weight"),
        ("lora_transformer_blocks_0_ff.weight", "blocks.0.ff.weight"),
        ("lora_unet_double_blocks_0_ff.weight", "transformer.double_blocks.0.ff.weight"),
        ("h.0.my_fc.weight", "h.0.my_fc.weight"),
    ],
)
def test_components(key: str, name: str) -> None:
    assert resolved(key, name, "other.weight") == name


def test_ambiguity_is_refused_by_name() -> None:
    with pytest.raises(LoraFxError, match=r"fits 'a_b\.c\.weight' and 'a\.b_c\.weight'"):
        resolved("lora_unet_a_b_c.weight", "a_b.c.weight", "a.b_c.weight")
    exact = resolved("a_b.c.weight", "a_b.c.weight", "a.b_c.weight")
    assert exact == "a_b.c.weight", "a name of the model's is no other's spelling"
    both = named("lora_te1_x.weight", "lora_te2_x.weight")
    with pytest.raises(LoraFxError, match=r"'lora_te1_x.weight' and 'lora_te2_x.weight' both"):
        both.resolved(["x.weight"])
    got = both.resolved(["text_encoder.x.weight", "text_encoder_2.x.weight"])
    assert list(got) == ["text_encoder.x.weight", "text_encoder_2.x.weight"]
    assert got.names is None


def test_a_name_that_fits_nothing() -> None:
    with pytest.raises(LoraFxError, match=r"lora_unet_mid_x\.weight' fits no") as caught:
        named("lora_unet_mid_x.weight", "lora_unet_a.weight").resolved(["mid.z.weight", "a.weight"])
    assert "mid.z.weight" in caught.value.hint


def test_other_components_are_left_out_and_said() -> None:
    adapter = named("lora_unet_a.weight", "lora_te_b.weight", "lora_te_c.weight")
    got = adapter.resolved(["a.weight"])
    assert list(got) == ["a.weight"]
    assert got.metadata["notes"] == [
        "2 updates of text_encoder are for another model and are not applied ('lora_te_b.weight' …)"
    ]
    theirs = named("unet.a.weight", "text_encoder.b.weight", naming="diffusers")
    assert list(theirs.resolved(["b.weight"])) == ["b.weight"]
    assert list(theirs.resolved(["unet.a.weight"])) == ["unet.a.weight"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.my_fc = nn.Linear(4, 3)
        self.deep = nn.ModuleDict({"c_1": nn.Conv2d(3, 4, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.my_fc(self.deep["c_1"](x).mean((2, 3)))


def test_bind_resolves(tmp_path: Path) -> None:
    """A kohya file goes straight into a model, with the same effect as its formula."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 3, 5, 6)
    rng = np.random.default_rng(0)
    d1, u1 = rng.standard_normal((2, 4)), rng.standard_normal((3, 2))
    d2, u2 = rng.standard_normal((2, 3, 3, 3)), rng.standard_normal((4, 2, 1, 1))
    tensors = {"my_fc.lora_down.weight": d1, "my_fc.lora_up.weight": u1}
    tensors |= {"deep_c_1.lora_down.weight": d2, "deep_c_1.lora_up.weight": u2}
    tensors |= {"deep_c_1.alpha": np.array(1.0)}
    file = tmp_path / "k.safetensors"
    save_file({f"lora_unet_{k}": v.astype(np.float32) for k, v in tensors.items()}, file)
    adapter = load_adapter(file).bind(net, (x,))
    assert sorted(adapter) == ["deep.c_1.weight", "my_fc.weight"]
    assert all(update.layout is not None for update in adapter.lowrank.values())
    folded = lora_fx.fold(net, (x,), adapter=load_adapter(file))
    with torch.no_grad():
        net.my_fc.weight += torch.tensor(u1 @ d1).float()
        net.deep["c_1"].weight += torch.tensor(0.5 * np.einsum("orhw,rchw->ochw", u2, d2)).float()
    torch.testing.assert_close(folded(x), net(x))


def test_base_folders(tmp_path: Path) -> None:
    """--base: one component's folder, and a pipeline's with model_index.json."""
    for name, tensors in (("unet", ["a.b_c"]), ("text_encoder", ["t.x_y"])):
        (tmp_path / "pipe" / name).mkdir(parents=True)
        zeros = {f"{t}.weight": np.zeros((3, 4), np.float32) for t in tensors}
        save_file(zeros, tmp_path / "pipe" / name / "model.safetensors")
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({}))
    parts: dict[str, Any] = {"lora_down.weight": LOW.a, "lora_up.weight": LOW.b}
    file = tmp_path / "k.safetensors"
    names = ("lora_unet_a_b_c", "lora_te_t_x_y")
    save_file({f"{n}.{k}": v for n in names for k, v in parts.items()}, file)
    one = load_adapter(file, base=tmp_path / "pipe" / "unet")
    assert list(one) == ["a.b_c.weight"] and len(one.metadata["notes"]) == 1
    both = load_adapter(file, base=tmp_path / "pipe")
    assert sorted(both) == ["text_encoder.t.x_y.weight", "unet.a.b_c.weight"]
    assert both.names == ForeignNames("diffusers", ("text_encoder", "unet"))
    save_adapter(both, tmp_path / "d.safetensors", "diffusers")
    assert sorted(load_adapter(tmp_path / "d.safetensors")) == sorted(both)
    save_adapter(both, tmp_path / "again.safetensors", "kohya")
    from safetensors.numpy import load_file

    assert set(load_file(file)) <= set(load_file(tmp_path / "again.safetensors"))
