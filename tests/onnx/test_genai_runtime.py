"""onnxruntime-genai generates transformers' tokens from the folders that export writes.

Its wheel brings an onnxruntime of its own, which overwrites the files of onnxruntime-gpu, so it
runs in another environment. `LORA_FX_GENAI` names the python of one; with `LORA_FX_GENAI=1` the
test makes it, and pip downloads the wheel.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from tests.onnx.decoders import gpt2, llama, write_tokenizer
from tests.onnx.test_decoder import STEPS, adapter, with_delta

pytest.importorskip("transformers")
WANTED = os.environ.get("LORA_FX_GENAI", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WANTED, reason="LORA_FX_GENAI names no python with onnxruntime-genai"),
]
PROMPTS = [[5, 17, 29, 31, 8, 77, 12], [44, 3, 61], [70]]
TEXT, CHAT = "the quick fox", [{"role": "user", "content": "hi"}]

RUNTIME = """
import json, sys
import onnxruntime_genai as og

folder, names, prompts, steps, text, chat = json.loads(sys.argv[1])
model = og.Model(folder)
adapters, tokenizer = og.Adapters(model), og.Tokenizer(model)
for name in names:
    adapters.load(f"{folder}/{name}.onnx_adapter", name)

def generate(name, prompt):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + steps, do_sample=False)
    generator = og.Generator(model, params)
    if name:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens([prompt])
    while not generator.is_done():
        generator.generate_next_token()
    return [int(t) for t in generator.get_sequence(0)]

print(json.dumps({
    "tokens": {name: [generate(name, p) for p in prompts] for name in ["", *names]},
    "text": [int(t) for t in tokenizer.encode(text)],
    "chat": tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=False),
}))
"""


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(4)
    config = Qwen2Config(
        vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    if WANTED != "1":
        return WANTED
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = ["-m", "pip", "install", "-q", "onnxruntime-genai", "numpy"]
    subprocess.run([folder / "bin" / "python", *install], check=True)
    return str(folder / "bin" / "python")


def ran(python: str, folder: Path, names: list[str]) -> Any:
    given = json.dumps([str(folder), names, PROMPTS, STEPS, TEXT, CHAT])
    hidden = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", RUNTIME, given], capture_output=True, text=True, env=hidden
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected(model: Any, stop: int | None = None) -> list[list[int]]:
    """Greedy tokens of generate, prompt by prompt."""
    made = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = model.generate(**call, max_new_tokens=STEPS, do_sample=False, eos_token_id=stop)
        made.append(out[0].tolist())
    return made


@pytest.mark.parametrize("mode", ["switch", "merged"])
@pytest.mark.parametrize("build", [llama, qwen2, gpt2])
def test_the_tokens_of_generate(build: Any, mode: str, python: str, tmp_path: Path) -> None:
    """20 tokens: of the base and of two adapters in one folder; or merged, up to an early end."""
    model, source = build(), tmp_path / "model"
    copy.deepcopy(model).save_pretrained(source)
    write_tokenizer(source)
    cap = lora_fx.capture(model, (), {"input_ids": torch.tensor(PROMPTS[:1]), "use_cache": False})
    adapters = {name: adapter(cap, seed, seed + 2) for seed, name in enumerate(("de", "fr"), 1)}
    wanted = {
        "": expected(model), **{n: expected(with_delta(model, a)) for n, a in adapters.items()}
    }  # fmt: skip
    assert wanted["de"] != wanted["fr"] != wanted[""] != wanted["de"]
    never = min({*range(96)} - {t for found in wanted.values() for p in found for t in p})
    end = never if mode == "switch" else wanted["de"][0][len(PROMPTS[0]) + 9]
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [never, end]}))
    lora_fx.export(
        source, tmp_path / "m.onnx", adapters=adapters if mode == "switch" else adapters["de"],
        mode=mode, cache=True, genai=tmp_path / "genai", provider="cpu", external_over=100,
    )  # fmt: skip
    got = ran(python, tmp_path / "genai", list(adapters) if mode == "switch" else [])
    if mode == "switch":
        assert got["tokens"] == wanted
    else:
        early = expected(with_delta(model, adapters["de"]), end)
        assert early[0][-1] == end and len(early[0]) < len(PROMPTS[0]) + STEPS
        # the runtime leaves the token that ends a text out of the sequence
        assert got["tokens"] == {"": [p[:-1] if p[-1] == end else p for p in early]}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    assert got["text"] == tokenizer(TEXT)["input_ids"]
    assert got["chat"] == tokenizer.apply_chat_template(CHAT, tokenize=False)


PARSER = """
import json, pathlib, sys
import onnxruntime_genai as og

folder = sys.argv[1]
og.Config(folder)
results = []
for name in ("cuda", "no provider"):
    file = pathlib.Path(folder, "genai_config.json")
    file.write_text(file.read_text().replace('"cuda"', json.dumps(name)))
    try:
        og.Model(folder)
    except Exception as error:  # the runtime's own classes
        results.append(str(error))
print(json.dumps(results))
"""


def test_a_folder_for_cuda_is_read_by_the_runtime(python: str, tmp_path: Path) -> None:
    """The runtime for the CPU takes the config, and then lacks its library of CUDA."""
    source = tmp_path / "model"
    llama().save_pretrained(source)
    write_tokenizer(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    lora_fx.export(
        source, tmp_path / "m.onnx", cache=True, genai=tmp_path / "genai", provider="cpu",
        target="cuda",
    )  # fmt: skip
    done = subprocess.run(
        [python, "-c", PARSER, tmp_path / "genai"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    of_cuda, of_no_provider = json.loads(done.stdout)
    assert of_cuda.startswith("Cuda interface not available")
    assert of_no_provider.startswith("Unknown provider name 'no provider'")
