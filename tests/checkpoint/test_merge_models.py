"""merge and real models of transformers and PEFT: tied heads, GPT-2, mixes of adapters, DoRA."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_fx import merge
from tests.checkpoint.made import Array, adapter, factors, read

ROWS, SIDE = 96, 32
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(14).reshape(2, 7) * 5 % ROWS


def small(folder: Path, *, tied: bool = False, family: str = "llama") -> Path:
    """A folder of a tiny model in fp32."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(n_embd=SIDE, n_layer=1, n_head=2, vocab_size=ROWS, n_positions=16)
        )
    else:
        config = LlamaConfig(
            hidden_size=SIDE, intermediate_size=48, num_hidden_layers=1, vocab_size=ROWS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
            tie_word_embeddings=tied, initializer_range=0.2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a tensor that is missing or unused is a warning
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any) -> Array:
    with torch.no_grad():
        return np.asarray(model(IDS).logits.numpy())


@pytest.mark.parametrize("uses", [("head",), ("table",), ("head", "table")])
def test_untied(uses: tuple[str, ...], tmp_path: Path) -> None:
    base = small(tmp_path / "base", tied=True)
    rng, old = np.random.default_rng(1), read(base)[TABLE]
    assert HEAD not in read(base)
    stored: dict[str, Array] = {}
    want = {"head": old, "table": old}
    for use in uses:
        a, b = factors(rng, ROWS, SIDE, 4)
        want[use] = old + 2 * (b @ a)
        if use == "head":
            lead = "base_model.model.lm_head.lora_"
            stored |= {f"{lead}A.weight": a, f"{lead}B.weight": b}
        else:  # PEFT's lookup: A [r, rows], B [dim, r], and the table's change is (B A)ᵀ
            lead = "base_model.model.model.embed_tokens.lora_embedding_"
            stored |= {f"{lead}A": b.T.copy(), f"{lead}B": a.T.copy()}
    adapter(tmp_path / "adapter", {}, tensors=stored, r=4, lora_alpha=8)
    report = merge(base, tmp_path / "adapter", tmp_path / "out", untie=True)
    assert any("untied" in w for w in report.warnings)
    found = read(tmp_path / "out")
    assert np.allclose(found[HEAD], want["head"], atol=1e-6)
    assert np.allclose(found[TABLE], want["table"], atol=1e-6)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    model, reference = load(tmp_path / "out"), load(base)
    with torch.no_grad():
        reference.lm_head.weight = torch.nn.Parameter(torch.from_numpy(want["head"]).float())
        reference.model.embed_tokens.weight.copy_(torch.from_numpy(want["table"]))
    assert np.allclose(logits(model), logits(reference), atol=1e-4)
    assert np.abs(logits(model) - logits(load(base))).max() > 0.1


def peft_model(base: Path, folder: Path, count: int = 1, **config: Any) -> Any:
    """A PEFT model with `count` trained adapters a0, a1 …, each saved in a folder of its name."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(**settings), "a0")
        for i in range(1, count):
            model.add_adapter(f"a{i}", LoraConfig(**settings))
        for name, p in model.named_parameters():
            if "lora_B" in name or "embedding_A" in name:
                torch.nn.init.normal_(p, std=0.2)
            if "magnitude" in name:
                p.data *= 1 + 0.2 * torch.rand_like(p)
        model.save_pretrained(folder)
    return model


def state(model: Any) -> dict[str, Array]:
    return {n: t.numpy().copy() for n, t in model.state_dict().items()}


def check(base: Path, out: Path, theirs: Any, tolerance: float = 2e-6) -> None:
    """Every tensor of `out` is that of PEFT's merged model, and some changed."""
    ours, want, before = read(out), state(theirs), read(base)
    changed = 0
    for name, value in ours.items():
        assert np.abs(value - want[name]).max() <= tolerance * np.abs(want[name]).max(), name
        changed += not np.array_equal(value, before[name])
    assert changed >= 2
    assert np.allclose(logits(load(out)), logits(theirs.eval()), atol=1e-3)


@pytest.mark.parametrize("weights", [(0.7, 0.4), (0.7, -0.4)])
@pytest.mark.parametrize("how", ["svd", "linear", "cat"])
def test_mixes_are_pefts(how: str, weights: tuple[float, float], tmp_path: Path) -> None:
    base = small(tmp_path / "base")
    linears = ["q_proj", "down_proj"]
    model = peft_model(base, tmp_path / "peft", 2, target_modules=linears)
    options = {"svd_rank": 3} if how == "svd" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["a0", "a1"], list(weights), "m", how, **options)
        theirs = model.merge_and_unload(adapter_names=["m"])
    given = [(tmp_path / "peft" / f"a{i}", w) for i, w in enumerate(weights)]
    merge(base, given, tmp_path / "out", how=how, rank=3 if how == "svd" else None)
    check(base, tmp_path / "out", theirs, 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_linears_and_conv1d(family: str, dora: bool, tmp_path: Path) -> None:
    """GPT-2 stores [in, out], one of its weights square; PEFT sets fan_in_fan_out by itself."""
    base = small(tmp_path / "base", family=family)
    targets = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}
    model = peft_model(
        base, tmp_path / "peft", target_modules=targets[family], use_dora=dora, use_rslora=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = model.merge_and_unload()
    merge(base, tmp_path / "peft" / "a0", tmp_path / "out")
    check(base, tmp_path / "out", theirs)


def test_only_square_conv1d_weights(tmp_path: Path) -> None:
    base = small(tmp_path / "base", family="gpt2")
    model = peft_model(base, tmp_path / "peft", target_modules=["attn.c_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = model.merge_and_unload()
    merge(base, tmp_path / "peft" / "a0", tmp_path / "out")
    ours, want = read(tmp_path / "out"), state(theirs)
    name = "transformer.h.0.attn.c_proj.weight"
    assert ours[name].shape == (SIDE, SIDE)
    assert np.allclose(ours[name], want[name], atol=1e-6)
    assert np.abs(ours[name] - read(base)[name]).max() > 0.01
