"""PEFT as the judge: it loads what extract wrote, and merged it is the tuned model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_fx
from lora_fx.adapter.truncate import truncation
from lora_fx.checkpoint.extract import extraction
from lora_fx.checkpoint.extract_options import ExtractOptions

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama(tied: bool = False) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def tune(model: Any, rank: int, only: str = "") -> None:
    """Low-rank changes of every matrix, some noise, and other norms."""
    for name, p in model.named_parameters():
        if p.ndim < 2 and "norm" not in name and "ln_" not in name:
            continue
        if only not in name:
            continue
        with torch.no_grad():
            if p.ndim < 2:
                p += 0.1 * torch.randn_like(p)
                continue
            low = torch.randn(p.shape[0], rank) @ torch.randn(rank, p.shape[1])
            p += 0.02 * low + 0.002 * torch.randn_like(p)


def judged(tmp_path: Path, base: Any, tuned: Any, **options: Any) -> Any:
    """PEFT merges the extracted adapter; every weight is within the reported error of tuned."""
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    result = extraction(tmp_path / "base", tmp_path / "tuned", ExtractOptions(**options))
    lora_fx.save_adapter(result.adapter, tmp_path / "adapter")
    before = {k: v.detach().double().clone() for k, v in base.state_dict().items()}
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    merged = model.merge_and_unload().state_dict()
    wanted = tuned.state_dict()
    for row in result.rows:
        delta = wanted[row.key].double() - before[row.key]
        gap = wanted[row.key].double() - merged[row.key].double()
        measured = float(gap.norm() / delta.norm())
        assert abs(measured - row.relative) < 1e-5, row.key
        assert 0 < row.relative < 0.3, row.key
    for name in result.adapter.full:
        torch.testing.assert_close(merged[name], wanted[name])
    return result


@pytest.mark.parametrize(("rank", "share"), [(4, 0.3), (24, 1e-5)])
def test_llama(tmp_path: Path, rank: int, share: float) -> None:
    """At the rank of the hidden size nothing is left out, and the logits are those of tuned."""
    torch.manual_seed(0)
    base = llama()
    torch.manual_seed(0)
    tuned = llama()
    tune(tuned, 4)
    result = judged(tmp_path, base, tuned, rank=rank, also_full=True)
    assert len(result.rows) == 16 and len(result.adapter.full) == 5 and not result.left_out
    ids = torch.arange(12)[None]
    torch.manual_seed(0)
    with torch.no_grad():
        got, want, old = (m(ids).logits for m in (base, tuned, llama()))
    assert (old - want).norm() > 0.5 * want.norm()
    assert (got - want).norm() < share * want.norm()


def test_gpt2_stores_its_weights_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = gpt2()
    torch.manual_seed(0)
    tuned = gpt2()
    tune(tuned, 3, only=".h.")
    result = judged(tmp_path, base, tuned, rank=3)
    assert len(result.rows) == 8 and len(result.left_out) == 8
    c_fc = result.adapter.lowrank["transformer.h.0.mlp.c_fc.weight"]
    assert c_fc.a.shape == (3, 24) and c_fc.b.shape == (96, 3)
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert config.fan_in_fan_out
    (tmp_path / "base" / "config.json").unlink()
    paths = tmp_path / "base", tmp_path / "tuned"
    turned = lora_fx.extract(*paths, rank=3, fan_in_fan_out=True)
    plain = lora_fx.extract(*paths, rank=3)
    for key, delta in result.adapter.deltas().items():
        np.testing.assert_array_equal(turned.deltas()[key], delta)
        np.testing.assert_allclose(plain.deltas()[key], delta, atol=1e-6)
    key = "transformer.h.0.mlp.c_fc.weight"
    assert turned.lowrank[key].b.shape == (96, 3) and plain.lowrank[key].b.shape == (24, 3)


def test_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama().bfloat16()
    torch.manual_seed(0)
    tuned = llama()
    tune(tuned, 4)
    tuned = tuned.bfloat16()
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    result = extraction(tmp_path / "base", tmp_path / "tuned", ExtractOptions(rank=4))
    deltas = result.adapter.deltas()
    for row in result.rows:
        old, new = (m.state_dict()[row.key].double().numpy() for m in (base, tuned))
        measured = np.linalg.norm(new - old - deltas[row.key]) / np.linalg.norm(new - old)
        assert abs(measured - row.relative) < 1e-6


def test_a_truncated_adapter(tmp_path: Path) -> None:
    """Uneven ranks and removed updates: PEFT merges what was measured."""
    torch.manual_seed(0)
    base = llama()
    torch.manual_seed(0)
    tuned = llama()
    tune(tuned, 4)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    adapter = lora_fx.extract(tmp_path / "base", tmp_path / "tuned", rank=6)
    result = truncation(adapter, energy=0.5)
    assert len({r.after for r in result.rows}) > 1 and result.removed
    lora_fx.save_adapter(result.adapter, tmp_path / "adapter")
    before = {k: v.detach().double().clone() for k, v in base.state_dict().items()}
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    merged = model.merge_and_unload().state_dict()
    lost = 0.0
    for key, delta in adapter.deltas().items():
        lost += float((before[key] + torch.from_numpy(delta) - merged[key].double()).norm()) ** 2
    assert lost**0.5 == pytest.approx(result.error, rel=1e-5)
