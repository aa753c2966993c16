"""Hugging Face folders with a quantization_config: loaded from their tensors alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx.compare import rel
from lora_fx.dtypes import Array
from lora_fx.files.quantised import weight_parts
from lora_fx.files.stored_tensors import stored
from lora_fx.fx.load.huggingface import load_folder
from lora_fx.fx.quantised_parameters import forms
from lora_fx.ir.quantised import NF4
from tests.checkpoint.made import checkpoint
from tests.cli.test_cli import run
from tests.files.quantised.rows import golden, read

pytest.importorskip("transformers")
ROWS = {row.name: row for row in golden()}
CT = {"quant_method": "compressed-tensors", "sparsity_config": {}, "transform_config": {}}
Q, GATE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"
# row of 32 inputs, quantization_config, the layer, format, bits
MADE: dict[str, tuple[str, dict[str, Any], str, str, int]] = {
    "gptq": ("gptq 4 -1 version 1", {"quant_method": "gptq", "bits": 4}, Q, "GPTQ", 4),
    "gptq in an order": (
        "gptq 4 16 version 1 in an order", {"quant_method": "gptq", "bits": 4}, Q, "GPTQ", 4,
    ),
    "awq": ("awq 16", {"quant_method": "awq", "bits": 4, "version": "gemm"}, Q, "AWQ", 4),
    "packed": ("pack-quantized 4 group bfloat16", CT, GATE, "compressed-tensors packed", 4),
    "fp8": (
        next(n for n in ROWS if n.startswith("float-quantized 8 channel")),
        CT, GATE, "compressed-tensors fp8", 8,
    ),
    "fp8 in blocks": (
        "FP8 32 torch.float32", {"quant_method": "fp8", "weight_block_size": [32, 32]}, GATE,
        "FP8 in blocks of 32×32", 8,
    ),
    "mxfp8": ("MXFP8", {"quant_method": "modelopt"}, GATE, "MXFP8", 8),
    "nvfp4": ("NVFP4 float32", {"quant_method": "modelopt"}, GATE, "NVFP4", 4),
    "nvfp4 packed": ("nvfp4-pack-quantized", CT, GATE, "NVFP4", 4),
    "mxfp4": ("mxfp4-pack-quantized", CT, GATE, "MXFP4", 4),
}  # fmt: skip


def llama(rows: int = 9, hidden: int = 32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=hidden, intermediate_size=rows, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def made(folder: Path, name: str, change: dict[str, Any] | None = None) -> Any:
    """A folder whose one layer is quantised, and the float model with what it stands for."""
    row, said, layer, _, _ = MADE[name]
    model = llama(*read(ROWS[row]).shape)
    tensors: dict[str, Array] = {n: t.numpy() for n, t in model.state_dict().items()}
    del tensors[f"{layer}.weight"], tensors["lm_head.weight"]
    tensors["lm_head.weight"] = model.lm_head.weight.detach().numpy()
    arrays = {**ROWS[row].arrays, **(change or {})}
    tensors |= {f"{layer}.{n}": a for n, a in arrays.items() if a is not None}
    config = {**model.config.to_dict(), "quantization_config": said, "dtype": "float32"}
    checkpoint(folder, tensors, config={**config, "architectures": ["LlamaForCausalLM"]})
    want = torch.from_numpy(read(ROWS[row]).dequantise())
    model.get_submodule(layer).weight.data = want
    return model


IDS = torch.tensor([[3, 5, 7, 9], [1, 2, 3, 4]])


@pytest.mark.parametrize("name", MADE)
def test_targets_reads_headers_only_and_the_numbers_are_those_of_the_codes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = made(tmp_path / "m", name)
    _, _, layer, form, bits = MADE[name]
    sizes: list[int] = []

    def reading(info: Any, *part: Any) -> Any:
        sizes.append(info.stop - info.start)
        return stored(info, *part)

    with monkeypatch.context() as patched:
        patched.setattr(weight_parts, "stored", reading)
        code, out, _ = run(capsys, "targets", str(tmp_path / "m"), "--json")
    told = {t["key"]: t for t in json.loads(out)["targets"]}
    assert code == 0
    assert sum(sizes) <= 16, "a shape at most"
    target = told[f"{layer}.weight"]
    assert target["bits"] == bits and target["format"]
    assert target["shape"] == list(read(ROWS[MADE[name][0]]).shape)
    built = load_folder(tmp_path / "m")
    assert list(forms(built.module)) == [f"{layer}.weight"]
    assert any(f"1 weights are read as codes: {form}" in n for n in built.notes)
    with torch.no_grad():
        ours, want = (m(input_ids=IDS).logits.numpy() for m in (built.module, plain))
    assert rel(ours, want) < 1e-6


HOSTILE: dict[str, tuple[str, dict[str, Any], str]] = {
    "codes of another shape": ("gptq", {"qweight": np.zeros((3, 32), np.int32)}, "q_proj"),
    "codes of another length": ("awq", {"qweight": np.zeros((32, 5), np.int32)}, "q_proj"),
    "no scales": ("gptq", {"scales": None}, "scales"),
    "no zero points": ("awq", {"qzeros": None}, "qzeros"),
    "another model": (
        "packed", {"weight_shape": np.array([7, 32], np.int64)}, "gate_proj",
    ),
    "a scale that is not finite": (
        "fp8", {"weight_scale": np.full((9, 1), np.nan, np.float32)}, "not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change, words = HOSTILE[case]
    made(tmp_path / "m", name, change)
    out = tmp_path / "m.onnx"
    code, _, err = run(capsys, "export", str(tmp_path / "m"), "-o", str(out))
    lines = err.strip().splitlines()
    assert code == 2
    errors = [i for i in lines if i.startswith("Error:")]
    assert len(errors) == 1 and words in errors[0], lines
    assert lines[-1].startswith("Hint:") and not any("Traceback" in i for i in lines)
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["nf4", "fp4 nested", "int8"])
def test_a_folder_of_bitsandbytes_without_it(
    kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=61, n_positions=16, n_embd=64, n_layer=2, n_head=2
        )
        model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "float")
    options: dict[str, Any] = {"load_in_8bit": True}
    if way != "int8":
        nested = "nested" in way
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": way[:3]}
        options |= {"bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": torch.float32}
    quantised = type(model).from_pretrained(
        tmp_path / "float",
        quantization_config=transformers.BitsAndBytesConfig(**options),
        device_map="cpu",
        dtype=torch.float32,
    )
    quantised.save_pretrained(tmp_path / "codes")
    live = lora_fx.capture(quantised.eval(), (), {"input_ids": IDS})
    with torch.no_grad():
        want = live.model(input_ids=IDS).logits
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    built = load_folder(tmp_path / "codes")
    held = forms(built.module)
    assert len(held) == (14 if kind == "llama" else 8)
    assert {s.turned for s in held.values()} == {kind == "gpt2"}
    assert {n: s.format for n, s in held.items()} == {
        n: s.format for n, s in forms(live.model).items()
    }
    with torch.no_grad():
        assert rel(built.module(input_ids=IDS).logits.numpy(), want.numpy()) < 1e-6
    shapes = {n: list(p.shape) for n, p in model.named_parameters()}
    found = {t.key: t for t in lora_fx.find(str(tmp_path / "codes")).targets}
    assert all(list(found[n].parameter.shape) == shapes[n] for n in held)
    report = lora_fx.export(str(tmp_path / "codes"), tmp_path / "m.onnx", provider="cpu")
    assert report.ok


@pytest.mark.parametrize("name", ["gptq", "awq", "packed", "nf4", "int8"])
def test_experts_apart_are_the_stacks_of_the_model(name: str, tmp_path: Path) -> None:
    """As the files of Mixtral have them; the model reads gate and up of all experts as one."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=64, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    experts = model.model.layers[0].mlp.experts
    tensors: dict[str, Array] = {
        n.replace(".mlp.", ".block_sparse_moe."): t.detach().numpy()
        for n, t in model.state_dict().items()
        if ".experts." not in n
    }
    rng, lead = np.random.default_rng(0), "model.layers.0.block_sparse_moe.experts"
    said = CT
    for e in range(3):
        for leaf, rows in (("w1", 32), ("w3", 32), ("w2", 64)):
            said, arrays, want = coded(name, rng, rows, 64 if leaf != "w2" else 32)
            tensors |= {f"{lead}.{e}.{leaf}.{n}": a for n, a in arrays.items()}
            whole = torch.from_numpy(want)
            with torch.no_grad():
                if leaf == "w2":
                    experts.down_proj[e] = whole
                else:
                    experts.gate_up_proj[e, slice(0, 32) if leaf == "w1" else slice(32, 64)] = whole
    made_of = {**config.to_dict(), "quantization_config": said, "dtype": "float32"}
    made_of["architectures"] = ["MixtralForCausalLM"]
    checkpoint(tmp_path / "m", tensors, config=made_of)
    built = load_folder(tmp_path / "m")
    names = [f"model.layers.0.mlp.experts.{n}" for n in ("down_proj", "gate_up_proj")]
    assert sorted(forms(built.module)) == names
    assert not any("unused" in n for n in built.notes), built.notes
    with torch.no_grad():
        ours, theirs = (m(input_ids=IDS).logits.numpy() for m in (built.module, model))
    assert rel(ours, theirs) < 1e-6
    told = {t.key: t.parameter.bits for t in lora_fx.find(str(tmp_path / "m")).targets}
    assert all(told[n] == (8 if name == "int8" else 4) for n in names)


def coded(
    name: str, rng: np.random.Generator, out: int, inner: int
) -> tuple[dict[str, Any], dict[str, Array], Array]:
    """A quantization_config, the tensors of one matrix [out, in], and what they stand for."""
    codes, scale = rng.integers(0, 16, (out, inner)), rng.random((out, 1)).astype(np.float32) / 50
    shifts = 4 * np.arange(8, dtype=np.int64)
    if name == "int8":
        whole = (codes - 8).astype(np.int8)
        want = whole * scale * np.float32(7.874015718698502e-3)
        return {"quant_method": "bitsandbytes"}, {"weight": whole, "SCB": scale[:, 0]}, want
    if name == "nf4":
        absmax = rng.random(out * inner // 64).astype(np.float32) / 10
        state = {"quant_type": "nf4", "blocksize": 64, "shape": [out, inner], "dtype": "float32"}
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        flat = codes.reshape(-1, 2).astype(np.uint8)
        arrays = {"weight": flat[:, :1] << 4 | flat[:, 1:], "weight.absmax": absmax}
        arrays["weight.quant_state.bitsandbytes__nf4"] = text
        want = (NF4[codes].reshape(-1, 64) * absmax[:, None]).reshape(out, inner)
        return {"quant_method": "bitsandbytes"}, arrays, want
    want = ((codes - 8) * scale).astype(np.float32)
    if name == "packed":
        words = (codes.reshape(out, -1, 8) << shifts).sum(-1).astype(np.uint32).view(np.int32)
        shape = np.array([out, inner], np.int64)
        return CT, {"weight_packed": words, "weight_scale": scale, "weight_shape": shape}, want
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    if name == "awq":
        words = (codes.T.reshape(inner, -1, 8)[..., order] << shifts).sum(-1)
        zeros = np.full((1, out // 8), 0x88888888, np.uint32).view(np.int32)
    else:
        words = (codes.T.reshape(-1, 8, out) << shifts[:, None]).sum(1)
        zeros = np.full((1, out // 8), 0x77777777, np.uint32).view(np.int32)
    arrays = {"qweight": words.astype(np.uint32).view(np.int32), "qzeros": zeros, "scales": scale.T}
    return {"quant_method": name, "bits": 4, "version": "gemm"}, arrays, want


@pytest.mark.parametrize(
    "name",
    ["nvfp4", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fp8 in blocks", "mxfp8"))],
)
def test_a_file_of_it_is_proven(name: str, tmp_path: Path) -> None:
    """Codes that no operator of ONNX Runtime has are numbers there."""
    made(tmp_path / "m", name)
    model = lora_fx.insert(str(tmp_path / "m"), rank=2, include="gate_proj")
    with torch.no_grad():
        for entry in model.parameters():
            if entry.requires_grad:
                entry.normal_(0, 0.1)
    report = lora_fx.export(model, tmp_path / "m.onnx", mode="switch", provider="cpu")
    assert report and all(p.ok for p in report.parity)
