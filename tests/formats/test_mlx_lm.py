"""Against the package mlx-lm, where it is installed: what it trains, and what it loads of ours.

MLX runs on Linux CPUs: `pip install 'mlx[cpu]' mlx-lm`. It is in no extra of lora-fx.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_fx
from lora_fx.adapter.lowrank import LowRank

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {
    **LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def base(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of random weights, as Hugging Face has them."""
    rng = np.random.default_rng(0)
    tensors = {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = (0.2 * rng.standard_normal(shape)).astype(np.float32)

    hidden, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    add("model.embed_tokens.weight", rows, hidden)
    add("model.norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", rows, hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        add(f"{name}.input_layernorm.weight", hidden)
        add(f"{name}.post_attention_layernorm.weight", hidden)
        for leaf, size in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            add(f"{name}.self_attn.{leaf}_proj.weight", size, hidden)
        if "num_local_experts" not in config:
            add(f"{name}.mlp.gate_proj.weight", inner, hidden)
            add(f"{name}.mlp.up_proj.weight", inner, hidden)
            add(f"{name}.mlp.down_proj.weight", hidden, inner)
            continue
        add(f"{name}.block_sparse_moe.gate.weight", config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            for leaf in ("w1", "w3"):
                add(f"{name}.block_sparse_moe.experts.{expert}.{leaf}.weight", inner, hidden)
            add(f"{name}.block_sparse_moe.experts.{expert}.w2.weight", hidden, inner)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return model


def parameters(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    from mlx.utils import tree_flatten

    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


class Tokens(list[Any]):
    """Rows of token ids, as a dataset of mlx-lm's trainer."""

    def process(self, row: list[int]) -> tuple[list[int], int]:
        return row, 0


def trained(folder: Path, out: Path, kind: str, lora: dict[str, Any]) -> Path:
    """Two steps by the trainer of mlx-lm, which writes the adapter and its config."""
    from mlx_lm.lora import CONFIG_DEFAULTS, train_model

    rng = np.random.default_rng(1)
    rows = Tokens(rng.integers(0, 64, 12).tolist() for _ in range(4))
    asked = {
        **CONFIG_DEFAULTS, "model": str(folder), "fine_tune_type": kind, "num_layers": 2,
        "iters": 2, "batch_size": 2, "learning_rate": 0.05, "adapter_path": str(out),
        "val_batches": 1, "max_seq_length": 32, "lora_parameters": lora,
    }  # fmt: skip
    train_model(types.SimpleNamespace(**asked), loaded(folder), rows, rows)
    return out


def fused(folder: Path, adapter: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The parameters after `mlx_lm.fuse`."""
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.utils import load_adapters

    model = load_adapters(loaded(folder), str(adapter))
    modules = [(name, part.fuse()) for name, part in model.named_modules() if hasattr(part, "fuse")]
    model.update_modules(tree_unflatten(modules))
    return parameters(model)


CASES = {
    "lora": (LLAMA, "lora", {"rank": 3, "scale": 7.5, "dropout": 0.0}),
    "dora": (
        LLAMA,
        "dora",
        {"rank": 3, "scale": 7.5, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    ),
    "experts": (MIXTRAL, "lora", {"rank": 2, "scale": 5.0, "dropout": 0.0}),
    "table": (
        {**LLAMA, "tie_word_embeddings": True},
        "lora",
        {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": ["model.embed_tokens", "mlp.up_proj"]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_merged_as_mlx_lm_fuses_it(tmp_path: Path, name: str) -> None:
    """And back: what lora-fx writes of it mlx-lm loads, with equal logits and equal tensors."""
    from mlx_lm.tuner.utils import load_adapters

    config, kind, lora = CASES[name]
    folder = base(tmp_path / "base", config)
    theirs = trained(folder, tmp_path / "adapters", kind, lora)
    lora_fx.merge(str(folder), [str(theirs)], str(tmp_path / "merged"))
    got = parameters(loaded(tmp_path / "merged"))
    want = fused(folder, theirs)
    before = parameters(loaded(folder))
    assert got.keys() == want.keys()
    changed = 0
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=0, atol=2e-6 * np.abs(value).max())
        changed += not np.array_equal(got[key], before[key])
    assert changed > 1

    adapter = lora_fx.load_adapter(theirs)
    lora_fx.save_adapter(adapter, tmp_path / "ours", "mlx", base=folder)
    stored, ours = (load_file(f / "adapters.safetensors") for f in (theirs, tmp_path / "ours"))
    assert stored.keys() == ours.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(ours[key], value)
    tokens = mx.array([[1, 5, 9, 60, 3]])
    logits = np.array(load_adapters(loaded(folder), str(tmp_path / "ours"))(tokens))
    merged = np.array(loaded(tmp_path / "merged")(tokens))
    np.testing.assert_allclose(logits, merged, rtol=0, atol=1e-5 * np.abs(merged).max())


def test_an_adapter_of_some_layers_ranks_and_scales(tmp_path: Path) -> None:
    """More than one rank, scale and set of modules: mlx-lm loads it, and adds the same ΔW."""
    rng = np.random.default_rng(2)

    def update(out: int, in_: int, rank: int, alpha: float) -> LowRank:
        a, b = rng.standard_normal((rank, in_)), rng.standard_normal((out, rank))
        return LowRank(a.astype(np.float32), b.astype(np.float32), alpha)

    entries = {
        "model.layers.0.self_attn.q_proj.weight": update(32, 32, 2, 4.0),
        "model.layers.1.mlp.down_proj.weight": update(32, 48, 4, 8.0),
        "model.layers.1.mlp.up_proj.weight": update(48, 32, 4, 3.0),
        "lm_head.weight": update(64, 32, 1, 2.0),
    }
    folder = base(tmp_path / "base", LLAMA)
    notes = lora_fx.save_adapter(lora_fx.Adapter(entries), tmp_path / "ours", "mlx")
    assert len(notes) == 2 and "zeros fill 2 updates" in notes[0]
    want = fused(folder, tmp_path / "ours")
    lora_fx.save_adapter(lora_fx.Adapter(entries), tmp_path / "peft")
    for name in ("ours", "peft"):
        lora_fx.merge(str(folder), [str(tmp_path / name)], str(tmp_path / f"merged-{name}"))
        got = parameters(loaded(tmp_path / f"merged-{name}"))
        for key, value in want.items():
            np.testing.assert_allclose(got[key], value, rtol=0, atol=2e-6 * np.abs(value).max())


def test_whole_weights_are_refused(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", LLAMA)
    tuned = trained(folder, tmp_path / "adapters", "full", {})
    with pytest.raises(lora_fx.LoraFxError, match="fine_tune_type is 'full'") as caught:
        lora_fx.load_adapter(tuned)
    assert "mlx_lm.fuse" in caught.value.hint
