"""Tiny mixtures of transformers under PEFT itself: our files do there what they do here."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.expert_families import family_of
from lora_fx.adapter.expert_layouts import LAYOUTS, laid
from lora_fx.files.tensor_files import read_tensors
from lora_fx.formats.servers import DROPS, READS, seen, verdicts

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12, "num_experts_per_tok": 2,
}  # fmt: skip
SPARSE = {"moe_intermediate_size": 12, "num_experts": 3, "decoder_sparse_step": 1}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 3}),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 3, "layer_types": ["full_attention"] * 2, "rope_scaling": None},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {"n_routed_experts": 4, "moe_intermediate_size": 12, "n_group": 2, "topk_group": 1,
         "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
         "qk_rope_head_dim": 12, "v_head_dim": 12, "n_shared_experts": 1},
    ),
    "qwen2_moe": ("Qwen2MoeConfig", {**SPARSE, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", SPARSE),
    "llama4_text": (
        "Llama4TextConfig",
        {"intermediate_size_mlp": 20, "num_local_experts": 3, "num_experts_per_tok": 1,
         "interleave_moe_layer_step": 1},
    ),
}  # fmt: skip
IDS = torch.arange(14).reshape(2, 7)
slow = [pytest.mark.slow]
each = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if i < 3 else slow) for i, k in enumerate(KINDS)]
)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(kind: str) -> Any:
    torch.manual_seed(0)
    name, more = KINDS[kind]
    config = getattr(transformers, name)(**{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.config.use_cache = False
    return model


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded(kind: str, folder: Path) -> Any:
    return logits(peft.PeftModel.from_pretrained(build(kind), folder).eval())


def rel(got: Any, want: Any) -> float:
    return float((got - want).abs().max() / want.abs().max())


@each
def test_peft_computes_the_same_from_every_layout_and_back(kind: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["o_proj"], init_lora_weights=False,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    model = build(kind)
    base = logits(model)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config)
    want = logits(wrapped)
    assert rel(base, want) > 0.05
    wrapped.save_pretrained(tmp_path / "theirs")
    family, adapter = family_of([kind]), lora_fx.load_adapter(tmp_path / "theirs")
    assert family is not None
    for name in ("per-expert", "peft-0.18", "sglang-3d"):
        entries = laid(adapter.entries, LAYOUTS[name], family, peft.__version__)
        lora_fx.save_adapter(replace(adapter, entries=entries), tmp_path / name)
        there = lora_fx.load_adapter(tmp_path / name)
        back = laid(there.entries, LAYOUTS["peft"], family, LAYOUTS[name].version)
        lora_fx.save_adapter(replace(there, entries=back), tmp_path / f"back-{name}")
        one, two = (
            read_tensors(tmp_path / folder / "adapter_model.safetensors")[0]
            for folder in ("theirs", f"back-{name}")
        )
        assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
    assert torch.equal(loaded(kind, tmp_path / "back-sglang-3d"), want)
    # PEFT's own conversion of experts one by one, and what the table says of it.
    tensors, _ = read_tensors(tmp_path / "per-expert" / "adapter_model.safetensors")
    found = seen({k: v.shape for k, v in tensors.items()}, {}, family)
    ((rule, _),) = verdicts("peft", found, family, frozenset({kind}))
    assert rule.outcome == (READS if kind in ("mixtral", "deepseek_v3", "qwen3_moe") else DROPS)
    assert (rel(loaded(kind, tmp_path / "per-expert"), want) < 1e-6) == (rule.outcome == READS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_experts_trained_here_are_applied_by_peft(kind: str, tmp_path: Path) -> None:
    """Shared experts and dense layers beside them: PEFT takes their names for experts."""
    model = build(kind)
    inserted = lora_fx.insert(model, (), {"input_ids": IDS}, rank=3)
    trained, rng = inserted.adapter(), np.random.default_rng(0)
    entries = {
        key: replace(low, b=0.1 * rng.standard_normal(low.b.shape).astype(np.float32))
        for key, low in trained.lowrank.items()
    }
    given = Adapter(entries, {**trained.metadata, "dropout": 0.25})
    inserted.load_adapter(given)
    want = logits(inserted.eval())
    notes = lora_fx.save_adapter(given, tmp_path / "ours")
    assert not any("will not load" in note for note in notes), notes
    assert any("is_transposed" in n for n in notes) == (kind in ("gpt_oss", "llama4_text"))
    again = lora_fx.load_adapter(tmp_path / "ours")
    assert again.entries.keys() == entries.keys() and again.metadata["dropout"] == 0.25
    for key, low in again.lowrank.items():
        mine = entries[key]
        assert np.array_equal(low.a, mine.a) and np.array_equal(low.b, mine.b)
        assert (low.layout, low.alpha) == (mine.layout, mine.alpha)
    if kind == "llama4_text":  # whose stacks are [E, in, out] and do not say so
        turned = laid(again.entries, LAYOUTS["peft"], family_of([kind]))
        lora_fx.save_adapter(replace(again, entries=turned), tmp_path / "ours", force=True)
    assert rel(logits(build(kind)), want) > 0.05
    assert rel(loaded(kind, tmp_path / "ours"), want) < 1e-6
