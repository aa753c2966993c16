"""Hugging Face folders: what loads, with which inputs, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fx.fx.load.models import load_model
from tests.fx.load.loading import LFS, block_network, found, net, refused

SMALL: dict[str, Any] = {"vocab_size": 61}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    block_network(monkeypatch)


def bert(**more: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, num_labels=10, **{**SMALL, **more},
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_positions=16, n_embd=24, n_layer=1, n_head=3, bos_token_id=1, eos_token_id=2,
                   **SMALL)
    )  # fmt: skip


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40,
                  image_size=[16, 24], patch_size=8, num_channels=1)
    )  # fmt: skip


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=4,
                 relative_attention_num_buckets=8, **SMALL)
    )  # fmt: skip


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(num_mel_bins=8, d_model=24, encoder_layers=1, decoder_layers=1,
                      encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=40,
                      decoder_ffn_dim=40, max_source_positions=6, max_target_positions=16,
                      pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
                      **SMALL)
    )  # fmt: skip


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json; None takes a key away."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


IDS: dict[str, tuple[int, ...]] = {"input_ids": (2, 5), "attention_mask": (2, 5)}
FOLDERS: dict[str, tuple[Callable[[], Any], dict[str, tuple[int, ...]], int]] = {
    "bert": (bert, IDS, 11),
    "gpt2": (gpt2, IDS, 6),
    "vit": (vit, {"pixel_values": (2, 1, 16, 24)}, 8),
    "t5": (t5, IDS | {"decoder_input_ids": (2, 5)}, 19),
    "whisper": (whisper, {"input_features": (2, 8, 12), "decoder_input_ids": (2, 5)}, 20),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, shapes, targets = FOLDERS[name]
    model = make().eval()
    saved(model, tmp_path)
    capfd.readouterr()
    loaded = load_model(tmp_path)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "") and loaded.notes == () and loaded.origin == str(tmp_path)
    assert {k: tuple(v.shape) for k, v in loaded.kwargs.items()} == shapes
    assert not loaded.module.training and loaded.tokenizer_folder is None
    state = loaded.module.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert len(found(loaded).targets) == targets
    light = load_model(str(tmp_path), meta=True)
    assert all(p.is_meta for p in light.module.parameters())
    assert all(torch.equal(v, loaded.kwargs[k]) for k, v in light.kwargs.items())


@pytest.mark.parametrize("shards", ["1GB", "8KB"])
def test_a_pickled_folder(shards: str, tmp_path: Path) -> None:
    """As transformers wrote it before safetensors: read where it is trusted, and the same model."""
    model = bert()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    index = tmp_path / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (tmp_path / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()
    for file in sorted(tmp_path.glob("*.safetensors")):
        torch.save(load_file(file), tmp_path / f"pytorch_{file.stem}.bin")
        file.unlink()
    refused(tmp_path, "pickles", "trust=True")
    for meta in (False, True):
        loaded = load_model(tmp_path, trust=True, meta=meta)
        assert len(found(loaded).targets) == 11 and not loaded.notes
    state = load_model(tmp_path, trust=True).module.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_meta_finds_the_same_targets(tmp_path: Path) -> None:
    saved(gpt2(), tmp_path)
    light, loaded = load_model(tmp_path, meta=True), load_model(tmp_path)
    assert found(light).to_json() == found(loaded).to_json()


def test_folder_dtype_shards_and_tokenizer(tmp_path: Path) -> None:
    bert().to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.bfloat16}
    assert loaded.tokenizer_folder == tmp_path
    edit(tmp_path, dtype=None, torch_dtype=None)
    assert next(load_model(tmp_path).module.parameters()).dtype == torch.bfloat16
    assert next(load_model(tmp_path, meta=True).module.parameters()).dtype == torch.bfloat16


def test_missing_tensors_are_said_and_the_same_each_time(tmp_path: Path) -> None:
    model = bert()
    saved(model, tmp_path)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("classifier")}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    before = torch.random.get_rng_state()
    one, two = load_model(tmp_path), load_model(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    note = (
        f"2 tensors have random values, since they are not in {tmp_path}: "
        "classifier.bias, classifier.weight"
    )
    assert one.notes == (note,)
    assert torch.equal(net(one).classifier.weight, net(two).classifier.weight)
    save_file({"classifier.bias": torch.zeros(10)}, tmp_path / "model.safetensors")
    refused(tmp_path, "does not fit BertForSequenceClassification", "are missing")


def test_causal_classifier_gets_a_padding_token(tmp_path: Path) -> None:
    from transformers import GPT2ForSequenceClassification

    saved(GPT2ForSequenceClassification(gpt2().config), tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.notes == ("config.json has no pad_token_id: 2 is used",)
    assert found(loaded).targets


@pytest.mark.parametrize("meta", [False, True])
def test_unknown_architecture(meta: bool, tmp_path: Path) -> None:
    edit(saved(bert(), tmp_path), architectures=["NopeForNothing"])
    refused(tmp_path, "'NopeForNothing'", "unknown to transformers", "FACTORY", meta=meta)
    edit(tmp_path, architectures=["pipeline"])
    refused(tmp_path, "'pipeline'", meta=meta)
    edit(tmp_path, model_type="nope", architectures=["NopeForNothing"])
    edit(tmp_path, auto_map={"AutoConfig": "configuration_nope.NopeConfig"})
    (tmp_path / "configuration_nope.py").write_text("raise SystemExit('was run')")
    refused(tmp_path, "(model_type 'nope')", "auto_map", "never run", meta=meta)


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    code = {"AutoConfig": "mine.Config", "AutoModelForSequenceClassification": "mine.Model"}
    edit(saved(bert(), tmp_path), auto_map=code, attn_implementation="someone/kernel")
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')")
    notes = load_model(tmp_path).notes
    assert any("auto_map" in n and "BertForSequenceClassification is used" in n for n in notes)
    assert any("'someone/kernel' is ignored" in n for n in notes)


def test_an_adapter_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    saved(bert(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    assert load_model(tmp_path).notes == ()
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "an adapter, not a model")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json")
    saved(bert(), tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(LFS)
    refused(tmp_path, "model.safetensors", "git-LFS")
    (tmp_path / "model.safetensors").write_bytes(weights[:-5])
    refused(tmp_path, "cut off")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "convert it to safetensors")
    assert load_model(tmp_path, meta=True).notes == ()
    (tmp_path / "pytorch_model.bin").unlink()
    refused(tmp_path, "no .safetensors file")
    edit(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    (tmp_path / "model.safetensors").write_bytes(weights)
    refused(tmp_path, "it has quantised weights (gptq) in a format that lora-fx does not read")
    edit(tmp_path, quantization_config=None, vocab_size="many")
    refused(tmp_path, "config.json")
    (tmp_path / "config.json").write_bytes(LFS)
    refused(tmp_path, "config.json", "git-LFS")


def test_folder_whose_shapes_differ(tmp_path: Path) -> None:
    edit(saved(bert(), tmp_path), vocab_size=62)
    refused(tmp_path, "'bert.embeddings.word_embeddings.weight' is [61, 24], expected [62, 24]")


def test_folder_with_other_weights(tmp_path: Path) -> None:
    model = bert()
    saved(model, tmp_path / "m")
    with torch.no_grad():
        model.classifier.weight.fill_(3)
    file = tmp_path / "w.safetensors"
    save_file(model.state_dict(), file)
    loaded = load_model(tmp_path / "m", weights=str(file))
    assert net(loaded).classifier.weight[0, 0].item() == 3
    state = model.state_dict()
    del state["classifier.weight"]
    save_file(state, file)
    refused(tmp_path / "m", "1 of its tensors are missing: classifier.weight", weights=file)


def test_transformers_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused(tmp_path, "cannot be imported").hint == "pip install 'lora-fx[hf]'"


BIG = """
import sys, time
from lora_fx.passes.verbs.open import capture
from lora_fx.fx.load.models import load_model
from lora_fx.passes.find import find
m = load_model(sys.argv[1], meta=True)
found = find(capture(m.module, m.args, m.kwargs).fx_graph())
# not ru_maxrss, which begins with what the process had before exec: that of the tests
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(found.targets), time.process_time(), int(peak) / 2**20)
"""


@pytest.mark.slow
def test_targets_of_an_8b_model_need_no_memory(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", BIG, str(tmp_path)], capture_output=True, text=True, check=True
    )
    targets, seconds, gigabytes = map(float, run.stdout.split())
    assert targets == 226 and seconds < 20 and gigabytes < 1
