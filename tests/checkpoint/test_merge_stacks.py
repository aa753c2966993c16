"""merge with updates of expert stacks: square ones, parts of one, our own, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense
from lora_fx.checkpoint.stored_stacks import stacks_turned
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import Layout, plain_layout
from tests.checkpoint.made import Array, adapter, checkpoint, factors, read
from tests.checkpoint.test_merge_loaded_names import tuned
from tests.checkpoint.test_renaming import MODELS, TEXT, saved

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
MOE = "model.layers.0.block_sparse_moe.experts"
WIDE, INNER, COUNT = 16, 24, 3
SQUARE = {**TEXT, "intermediate_size": 16, "num_local_experts": 3}
GPT_OSS = {**SQUARE, "head_dim": 8, "layer_types": ["full_attention"] * 2}
CASES = {
    "mixtral, down": ("mixtral", "MixtralForCausalLM", SQUARE, ["experts.down_proj"]),
    "mixtral, gate and up": (
        "mixtral", "MixtralForCausalLM", SQUARE | {"intermediate_size": 8}, ["gate_up_proj"],
    ),
    "gpt_oss, down": ("gpt_oss", "GptOssForCausalLM", GPT_OSS, ["mlp.experts.down_proj"]),
    "gpt_oss, both": (
        "gpt_oss", "GptOssForCausalLM", GPT_OSS, ["experts.down_proj", "experts.gate_up_proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_square_stacks_lie_as_the_model_type_says(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, name, fields, parameters = CASES[case]
    monkeypatch.setitem(MODELS, kind, (name, fields))
    saved(kind, tmp_path / "base")
    given = tuned(
        kind, tmp_path / "base", tmp_path, target_modules=[], target_parameters=parameters
    )
    lora_fx.merge(tmp_path / "base", given, tmp_path / "out")
    ours, want, before = (read(tmp_path / n) for n in ("out", "theirs", "base"))
    moved = [n for n in want if not np.array_equal(want[n], before[n])]
    assert len(moved) >= 2
    for n, value in ours.items():
        assert np.abs(value - want[n]).max() <= 2 * np.finfo(np.float32).eps * np.abs(want[n]).max()
    assert lora_fx.doctor(tmp_path / "base", given)


@pytest.mark.parametrize(
    ("version", "gpt_oss", "mixtral"),
    [(None, True, None), ("0.18.1", True, True), ("0.19.0", False, True), ("0.19.1", True, False),
     ("0.20.0", True, False), ("0.21.2", True, False), ("0.22.0.dev0", True, False)],
)  # fmt: skip
def test_how_each_peft_took_a_stack(version: Any, gpt_oss: Any, mixtral: Any) -> None:
    """Facts of the releases, `in_features` and `out_features` of lora.ParamWrapper."""
    made = Adapter({}, {"peft": {"peft_version": version}})
    assert stacks_turned(made, {"model_type": "gpt_oss"}) is gpt_oss
    assert stacks_turned(made, {"text_config": {"model_type": "mixtral"}}) is mixtral
    llama4 = stacks_turned(made, {"model_type": "llama4"})
    assert llama4 is mixtral, "[E, in, out], but its module does not say so"
    assert stacks_turned(made, {"model_type": "newest"}) is None


def mixtral(folder: Path) -> tuple[Path, dict[str, Array]]:
    """A base and its tensors, one layer."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (INNER, WIDE), "w2": (WIDE, INNER), "w3": (INNER, WIDE)}
    tensors = {
        f"{MOE}.{i}.{n}.weight": rng.standard_normal(s).astype(np.float32)
        for i in range(COUNT)
        for n, s in shapes.items()
    }
    return checkpoint(folder, tensors, config={"model_type": "mixtral"}), tensors


def update(out: int, in_: int, count: int, *, turned: bool = False) -> LowRank:
    """Of a stack [count, out, in], or of a use of it that contracts its middle axis."""
    rng = np.random.default_rng(out)
    pairs = [factors(rng, *((in_, out) if turned else (out, in_)), 5) for _ in range(count)]
    shape = (count, out, in_)
    ways = ((2,), (1,)) if turned else ((1,), (2,))
    layout = Layout(shape, (0,), *ways, shape)
    a, b = (np.stack(side) for side in zip(*pairs, strict=True))
    return LowRank(a, b, 10.0, layout)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("part", ["", "[1]", "[:, 8:40]", "[1:3, 0:24, 4:12]", "[2, 30:48]"])
def test_a_part_of_a_stack(part: str, turned: bool, tmp_path: Path) -> None:
    """ΔW of the region, by numpy, at the rows where w1 and w3 lie in it."""
    base, before = mixtral(tmp_path / "base")
    whole = np.zeros((COUNT, 2 * INNER, WIDE))
    slices = eval(f"np.s_{part or '[:]'}")
    shape = np.empty(whole.shape)[slices].shape
    count, out, in_ = shape if len(shape) == 3 else (1, *shape)
    low = update(out, in_, count, turned=turned)
    delta = 2.0 * np.einsum("eor,eri->eoi", low.b.astype(float), low.a.astype(float))
    delta = delta.swapaxes(1, 2) if turned else delta
    whole[slices] = delta.reshape(shape)
    lora_fx.merge(base, Adapter({GATE_UP + part: low}), tmp_path / "out")
    after = read(tmp_path / "out")
    for i in range(COUNT):
        for name, rows in (("w1", slice(0, INNER)), ("w3", slice(INNER, None))):
            key = f"{MOE}.{i}.{name}.weight"
            assert np.abs(after[key] - before[key] - whole[i, rows]).max() < 1e-5, key
            assert np.array_equal(after[key], before[key]) == (not whole[i, rows].any()), key
        assert np.array_equal(after[f"{MOE}.{i}.w2.weight"], before[f"{MOE}.{i}.w2.weight"])


@pytest.mark.parametrize("add", [False, True])
def test_a_whole_stack(add: bool, tmp_path: Path) -> None:
    base, before = mixtral(tmp_path / "base")
    new = np.random.default_rng(1).standard_normal((COUNT, WIDE, INNER)).astype(np.float32)
    lora_fx.merge(base, Adapter({DOWN: Full(new)}), tmp_path / "out", add=add)
    after = read(tmp_path / "out")
    assert set(after) == set(before), "nothing is added that is there in parts"
    for i in range(COUNT):
        assert np.array_equal(after[f"{MOE}.{i}.w2.weight"], new[i])
        assert np.array_equal(after[f"{MOE}.{i}.w1.weight"], before[f"{MOE}.{i}.w1.weight"])


@pytest.mark.parametrize("kind", ["vit", "mixtral"])
def test_an_adapter_of_our_own(kind: str, tmp_path: Path) -> None:
    """insert into the loaded model, merge into its file: the model loaded from that is fold's."""
    saved(kind, tmp_path / "base")
    cls: Any = getattr(transformers, MODELS[kind][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls.from_pretrained(tmp_path / "base").eval()
    model.config.use_cache = False
    images = {"pixel_values": torch.randn(2, 3, 8, 8)}
    inputs = images if kind == "vit" else {"input_ids": torch.randint(0, 64, (2, 7))}
    inserted = lora_fx.insert(model, (), inputs, rank=3)
    update = inserted.adapter()
    assert any("q_proj" in key for key in update)
    assert kind == "vit" or any("experts" in key for key in update)
    rng = np.random.default_rng(0)
    entries = {
        key: replace(low, b=0.1 * rng.standard_normal(low.b.shape).astype(np.float32))
        for key, low in update.lowrank.items()
    }
    given = Adapter(entries, update.metadata)
    report = lora_fx.merge(tmp_path / "base", given, tmp_path / "out")
    assert report.details["base_verified"] == (kind == "vit")
    inserted.load_adapter(given)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        merged = cls.from_pretrained(tmp_path / "out").eval()
        want, got, old = (m(**inputs).logits for m in (inserted.eval(), merged, model))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (want - old).abs().max() > 1e-2 * want.abs().max()


def test_a_model_without_its_outer_class(tmp_path: Path) -> None:
    """PEFT on a ViTModel has no `vit.` before its names."""
    saved("vit", tmp_path / "base")
    a, b = factors(np.random.default_rng(0), 16, 16, 3)
    given = adapter(tmp_path / "adapter", {"layers.1.attention.k_proj": (a, b)})
    report = lora_fx.merge(tmp_path / "base", given, tmp_path / "out")
    name = "vit.encoder.layer.1.attention.attention.key.weight"
    got = read(tmp_path / "out")[name] - read(tmp_path / "base")[name]
    assert np.abs(got - 2 * (b @ a)).max() < 1e-6
    said = " ".join(report.warnings)
    assert "names without 'vit.'" in said and "transformers 5 renames" in said


def test_names_that_are_not_known_are_refused_with_what_helps(tmp_path: Path) -> None:
    tensors = {"backbone.conv.0.out_proj.weight": np.ones((8, 6), np.float32)}
    base = checkpoint(tmp_path / "base", tensors, config={"model_type": "newest"})
    pair = factors(np.random.default_rng(0), 8, 6, 2)
    given = adapter(tmp_path / "adapter", {"backbone.conv.0.o_proj": pair})
    with pytest.raises(LoraFxError) as caught:
        lora_fx.merge(base, given, tmp_path / "out")
    assert "backbone.conv.0.o_proj.weight" in caught.value.message
    for word in ("did you mean backbone.conv.0.out_proj", "transformers 5 renames", "'newest'",
                 "save_original_format=False"):  # fmt: skip
        assert word in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    base, tensors = mixtral(tmp_path / "base")
    shape = (COUNT, WIDE, INNER)
    dense = Dense(np.ones(shape, np.float32), layout=plain_layout(shape))
    with pytest.raises(LoraFxError, match="one tensor for each expert"):
        lora_fx.merge(base, Adapter({DOWN: dense}), tmp_path / "out")
    with pytest.raises(LoraFxError, match="an update for"):
        lora_fx.merge(base, Adapter({DOWN: update(WIDE, INNER, 2)}), tmp_path / "out")
    gap = {n: t for n, t in tensors.items() if ".1." not in n}
    base = checkpoint(tmp_path / "gap", gap, config={"model_type": "mixtral"})
    with pytest.raises(LoraFxError, match="no tensor for 1 of the adapter's keys"):
        lora_fx.merge(base, Adapter({DOWN: update(WIDE, INNER, 2)}), tmp_path / "out")
