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
from lora_fx.checkpoint.difference import read_bytes
from lora_fx.compare import rel
from lora_fx.dtypes import Array
from lora_fx.fx.codes import forms
from lora_fx.fx.load import huggingface
from lora_fx.fx.load.huggingface import load_folder
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
}  # fmt: skip


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=9, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def made(folder: Path, name: str, change: dict[str, Any] | None = None) -> Any:
    """A folder whose one layer is quantised, and the float model with what it stands for."""
    row, said, layer, _, _ = MADE[name]
    model = llama()
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
def test_a_folder_gives_the_numbers_of_its_codes(name: str, tmp_path: Path) -> None:
    plain = made(tmp_path / "m", name)
    built = load_folder(tmp_path / "m")
    _, _, layer, form, bits = MADE[name]
    assert list(forms(built.module)) == [f"{layer}.weight"]
    assert any(f"1 weights are read as codes: {form}" in n for n in built.notes)
    with torch.no_grad():
        ours, want = (m(input_ids=IDS).logits.numpy() for m in (built.module, plain))
    assert rel(ours, want) < 1e-6
    found = {t.key: t.parameter for t in lora_fx.find(str(tmp_path / "m")).targets}
    assert found[f"{layer}.weight"].bits == bits


@pytest.mark.parametrize("name", MADE)
def test_targets_reads_headers_only(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "m", name)
    sizes: list[int] = []

    def reading(info: Any, start: int, stop: int) -> Any:
        sizes.append(stop - start)
        return read_bytes(info, start, stop)

    monkeypatch.setattr(huggingface, "read_bytes", reading)
    code, out, _ = run(capsys, "targets", str(tmp_path / "m"), "--json")
    told = {t["key"]: t for t in json.loads(out)["targets"]}
    assert code == 0
    assert sum(sizes) <= 16, "a shape at most"
    _, _, layer, _, bits = MADE[name]
    target = told[f"{layer}.weight"]
    assert target["bits"] == bits and target["format"]
    assert target["shape"] == list(read(ROWS[MADE[name][0]]).shape)


HOSTILE: dict[str, tuple[str, dict[str, Any], str]] = {
    "codes of another shape": ("gptq", {"qweight": np.zeros((3, 32), np.int32)}, "q_proj"),
    "codes of another length": ("awq", {"qweight": np.zeros((32, 5), np.int32)}, "q_proj"),
    "no scales": ("gptq", {"scales": None}, "scales"),
    "no zero points": ("awq", {"qzeros": None}, "qzeros"),
    "another model": (
        "packed", {"weight_shape": np.array([7, 32], np.int64)}, "gate_proj",
    ),
    "a scale that is no number": (
        "fp8", {"weight_scale": np.full((9, 1), np.nan, np.float32)}, "no number",
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
