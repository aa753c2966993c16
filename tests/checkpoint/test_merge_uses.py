"""An update of one use of a tensor goes to that use's own tensor, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_fx
from lora_fx import Adapter, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import ReplacedRows
from lora_fx.ir.layout import plain_layout

TABLE, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.w.weight"
ROWS, WIDTH = 40, 16


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal((ROWS, WIDTH)).astype("f4") for n in (TABLE, OTHER)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def low(seed: int, use: str = "", **facts: Any) -> LowRank:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, WIDTH)), rng.standard_normal((ROWS, 2))
    layout = plain_layout((ROWS, WIDTH))
    return LowRank(a.astype("f4"), b.astype("f4"), 3.0, layout, "lora", use, **facts)


CASES = {
    "by alias": ({TABLE: low(1, HEAD)}, {HEAD: 1}),
    "by operation": ({TABLE: low(1, "op:linear")}, {HEAD: 1}),
    "the lookup": ({TABLE: low(1, "op:embedding")}, {TABLE: 1}),
    "by key": ({f"{TABLE}@{HEAD}": low(1)}, {HEAD: 1}),
    "one for each": (
        {f"{TABLE}@{HEAD}": low(1), f"{TABLE}@op:embedding": low(2)},
        {HEAD: 1, TABLE: 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_uses_of_a_tied_table_are_told_apart(case: str, base: Path, tmp_path: Path) -> None:
    entries, moved = CASES[case]
    with pytest.raises(lora_fx.LoraFxError, match="one of two uses of a tied tensor"):
        lora_fx.merge(base, Adapter(entries), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = lora_fx.merge(base, Adapter(entries), tmp_path / "out", untie=True)
    said = {t["key"]: t["updates"] for t in report.details["tensors"]}
    assert said[HEAD][0] == f"copy of {TABLE}" and len(said[HEAD]) == 1 + (HEAD in moved)
    old = load_file(base / "model.safetensors")
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert set(new) == {TABLE, HEAD, OTHER}
    for name in new:
        want = old.get(name, old[TABLE]).astype(np.float64)
        if name in moved:
            want = want + low(moved[name]).matrix()
        np.testing.assert_allclose(new[name], want, rtol=1e-6, atol=1e-6, err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_an_update_of_both_uses_needs_no_untying(base: Path, tmp_path: Path) -> None:
    lora_fx.merge(base, Adapter({TABLE: low(1, origin=Origin(tied=True))}), tmp_path / "out")
    new = load_file(tmp_path / "out" / "model.safetensors")
    want = load_file(base / "model.safetensors")[TABLE] + low(1).matrix()
    np.testing.assert_allclose(new[TABLE], want, rtol=1e-6, atol=1e-6)
    assert set(new) == {TABLE, OTHER}


@pytest.mark.parametrize("key", [f"{OTHER}@call:1", f"{OTHER}@model.layers.1.w.weight"])
def test_one_use_of_a_tensor_stored_once_is_refused(key: str, base: Path, tmp_path: Path) -> None:
    for untie in (False, True):
        with pytest.raises(lora_fx.LoraFxError, match="stores one tensor for several"):
            lora_fx.merge(base, Adapter({key: low(1)}), tmp_path / "out", untie=untie)
    assert not (tmp_path / "out").exists()


def test_a_new_head_beside_a_prefix(tmp_path: Path) -> None:
    """The head is new, and all other names have a prefix that the base lacks."""
    rng = np.random.default_rng(0)
    old = rng.standard_normal((ROWS, WIDTH)).astype("f4")
    base = tmp_path / "base.safetensors"
    save_file({"encoder.w.weight": old, "encoder.w.bias": old[0]}, base)
    head = rng.standard_normal((3, WIDTH)).astype("f4")
    adapter = Adapter(
        {
            "classifier.weight": lora_fx.Full(head),
            "bert.encoder.w.bias": lora_fx.Full(head[0]),
            "bert.encoder.w.weight": low(1),
        }
    )
    with pytest.raises(lora_fx.LoraFxError, match=r"keys: classifier\.weight") as refusal:
        lora_fx.merge(base, adapter, tmp_path / "out.safetensors")
    assert "--add" in refusal.value.hint
    report = lora_fx.merge(base, adapter, tmp_path / "out.safetensors", add=True)
    said = {t["key"]: t["updates"] for t in report.details["tensors"]}
    assert said["classifier.weight"] == ["added"]
    assert said["encoder.w.bias"] == ["replaced whole"]
    new = load_file(tmp_path / "out.safetensors")
    assert set(new) == {"encoder.w.weight", "encoder.w.bias", "classifier.weight"}
    np.testing.assert_array_equal(new["classifier.weight"], head)
    np.testing.assert_array_equal(new["encoder.w.bias"], head[0])
    want = old + low(1).matrix()
    np.testing.assert_allclose(new["encoder.w.weight"], want, rtol=1e-6, atol=1e-6)


TOKENS = Adapter({TABLE: ReplacedRows((3, 7), np.ones((2, WIDTH), "f4"))})


@pytest.mark.parametrize("stored", [False, True])
def test_tokens_of_a_tied_table_are_those_of_its_head(
    stored: bool, base: Path, tmp_path: Path
) -> None:
    if stored:
        old = load_file(base / "model.safetensors")
        save_file({**old, HEAD: old[TABLE]}, base / "model.safetensors", metadata={"format": "pt"})
    lora_fx.merge(base, TOKENS, tmp_path / "out")
    new = load_file(tmp_path / "out" / "model.safetensors")
    for name in (TABLE, HEAD) if stored else (TABLE,):
        assert (new[name][[3, 7]] == 1.0).all() and not (new[name][4] == 1.0).any()


def configured(base: Path, **changes: Any) -> Path:
    file = base / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return base


def test_a_class_without_a_head_is_not_tied(base: Path, tmp_path: Path) -> None:
    configured(base, architectures=["LlamaForSequenceClassification"])
    lora_fx.merge(base, Adapter({TABLE: low(1, origin=Origin(op="embedding"))}), tmp_path / "out")


def test_a_table_that_may_be_the_head_is_refused(base: Path, tmp_path: Path) -> None:
    """Its name is not known as a table's, but its size is the vocabulary's."""
    configured(base, vocab_size=ROWS, architectures=["XLNetLMHeadModel"])
    old = load_file(base / "model.safetensors")
    renamed = {"transformer.word_embedding.weight": old[TABLE]}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    for entry in (
        low(1, origin=Origin(op="embedding")),
        ReplacedRows((3,), np.ones((1, WIDTH), "f4")),
    ):
        adapter = Adapter({"transformer.word_embedding.weight": entry})
        with pytest.raises(
            lora_fx.LoraFxError, match="is an embedding, the file has no output head"
        ):
            lora_fx.merge(base, adapter, tmp_path / "out")
    configured(base, tie_word_embeddings=False)
    lora_fx.merge(base, adapter, tmp_path / "out")


def test_a_head_whose_logits_are_scaled_is_not_untied(base: Path, tmp_path: Path) -> None:
    adapter = Adapter({HEAD: low(1)})
    configured(base, model_type="t5", architectures=["T5ForConditionalGeneration"])
    with pytest.raises(lora_fx.LoraFxError, match="scales its logits"):
        lora_fx.merge(base, adapter, tmp_path / "out", untie=True)
    configured(base, scale_decoder_outputs=True)
    lora_fx.merge(base, adapter, tmp_path / "out", untie=True)


@pytest.mark.parametrize("said", [True, None])
def test_a_file_that_holds_the_table_as_the_head(
    said: bool | None, base: Path, tmp_path: Path
) -> None:
    """As safetensors.torch.save_model writes a tied model: of two names the first in order."""
    configured(base, tie_word_embeddings=said)
    old = load_file(base / "model.safetensors")
    held = {HEAD: old[TABLE], OTHER: old[OTHER][:7]}
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    for untie in (False, True):
        with pytest.raises(lora_fx.LoraFxError, match="it is the embedding too"):
            lora_fx.merge(base, Adapter({HEAD: low(1)}), tmp_path / "out", untie=untie)
    lora_fx.merge(base, Adapter({HEAD: low(1, origin=Origin(tied=True))}), tmp_path / "out")
    save_file({**held, TABLE: old[TABLE]}, base / "model.safetensors", metadata={"format": "pt"})
    configured(base, tie_word_embeddings=False)
    lora_fx.merge(base, Adapter({HEAD: low(1)}), tmp_path / "apart")
